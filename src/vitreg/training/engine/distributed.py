"""The processes that share a training run: one, or those that `torchrun` started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitreg.common.devices import resolve_device
from vitreg.model import Block
from vitreg.training.engine.method import Method


@dataclass(frozen=True)
class Distributed:
    """This process's number, how many there are, and where this one computes."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Distributed:
        """Meet the processes that `torchrun` started, or be alone.

        Args:
            device: cpu, cuda, mps; auto takes a GPU where there is one, each process its own.

        Raises:
            ValueError: the device does not exist.
        """
        place = resolve_device(device)
        if place.type == "cuda":
            if place.index is None:
                place = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            torch.cuda.set_device(place)
        if "RANK" not in os.environ:
            return cls(0, 1, place)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            # Long, because all wait while the first evaluates; of a process that dies torchrun tells the others.
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        return cls(dist.get_rank(), dist.get_world_size(), place)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parts of these tensors, on the CPU of the first process, and nothing on others; every one has to ask.

        One after the other, so that no device holds more than one whole tensor.
        """
        gathered = {}
        for name, tensor in tensors.items():
            everything = full_tensor(tensor.detach())
            if self.is_rank_zero:
                gathered[name] = everything.cpu()
        return gathered

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Do something on the first process only; all return its result, and all fail where it fails.

        Raises:
            ValueError: what the first process ran into; others raise it too, so that none waits for ever.
        """
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_rank_zero:
            try:
                outcome[0] = work()
            except Exception as caught:
                error = caught
                outcome[1] = f"{caught}" or type(caught).__name__
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise ValueError(f"the first process stopped: {outcome[1]}")
        return outcome[0]


def distribute(method: Method, processes: Distributed, sharding: Literal["ddp", "fsdp"], half: bool) -> nn.Module:
    """The method, on its device, ready to be trained by all processes together; one that is alone leaves it as it is.

    With ddp every process holds everything and gradients are averaged. With fsdp (`fully_shard`) parameters, gradients
    and optimizer state are spread over the processes, and gathered block by block; `half` gathers in bfloat16.
    """
    if processes.world == 1:
        return method
    if sharding == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy()
        if half:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in (module for module in method.modules() if isinstance(module, Block)):
            fully_shard(block, mp_policy=policy)
        # What is outside of the blocks, such as registers, prototypes and CLIP's scale, is not to be rounded.
        fully_shard(method)
        return method
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # what took its place is not in PyTorch 2.6
        return DistributedDataParallel(method, device_ids=device_ids, broadcast_buffers=False)


@torch.no_grad()
def ema_update(followers: Iterable[Tensor], leaders: Iterable[Tensor], momentum: float) -> None:
    """`follower = momentum * follower + (1 - momentum) * leader`, each process on its own parts."""
    get_ema_multi_avg_fn(momentum)([local_tensor(t) for t in followers], [local_tensor(t) for t in leaders], 0)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All parts of a sharded tensor, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
