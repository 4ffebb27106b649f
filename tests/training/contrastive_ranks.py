"""What the processes of the distributed test run; a file of its own, because they import it afresh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from training.captioned import tiny_method
from vitreg.images import ImageSet
from vitreg.training.engine.distributed import full_tensor
from vitreg.training.engine.method import Batch
from vitreg.training.recipes.clip import CLIP


def random_batch(num: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 49000, (num, 24), generator=generator)
    text[:, 10] = 49407
    text[:, 11:] = 0
    return {"image": torch.randn(num, 3, 64, 64, generator=generator), "text": text}


def seeded_method() -> CLIP:
    torch.manual_seed(0)
    return tiny_method()


class Noise(ImageSet):
    """Eight images and sentences, made up."""

    source = "noise"

    def __len__(self) -> int:
        return 8

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8))

    def name(self, index: int) -> str:
        return f"noise {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"image number {index}",)


def two_steps(rank: int, world_size: int, folder: Path) -> None:
    """A step on this process's part of a batch, by DDP and by FSDP2; the first process writes down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    part = {name: tensor.chunk(world_size)[rank] for name, tensor in random_batch(8).items()}
    for sharding in ("ddp", "fsdp"):
        method = seeded_method()
        wrapped = DistributedDataParallel(method) if sharding == "ddp" else sharded(method)
        scalars = wrapped(part, progress=0.0)
        scalars["loss"].backward()
        outcome: dict[str, object] = {}
        for name, scalar in scalars.items():
            outcome[name] = mean = scalar.detach().clone()
            dist.all_reduce(mean)
            mean /= world_size
        text = {name: full_tensor(tensor).detach() for name, tensor in method.text.state_dict().items()}
        outcome["figures"] = method.evaluate(seeded_method().vit, {"text": text}, Noise(), 4)
        for name, parameter in method.named_parameters():
            gradient = parameter.grad
            outcome[name] = full_tensor(gradient)
        torch.optim.AdamW(method.parameters()).step()
        method.after_step(0.0)
        if rank == 0:
            torch.save(outcome, folder / f"{sharding}.pt")
    dist.barrier()  # a process that leaves while another one still talks to it ends that one
    dist.destroy_process_group()


def sharded(method: CLIP) -> CLIP:
    for block in method.vit.blocks:
        fully_shard(block)
    return fully_shard(method)
