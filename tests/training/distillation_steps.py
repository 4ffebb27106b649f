"""A step of self-distillation in one process or several; its own file, because processes import what they run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peers import perturb
from vitreg.training.recipes.dinov2 import DINOv2, DINOv2Config
from vitreg.training.recipes.multi_crop import MultiCropConfig, locate_hidden
from vitreg.training.recipes.sizes import sized

CASES = [
    (sharding, centering, progress)
    for sharding in ("ddp", "fsdp")
    for centering in ("sinkhorn", "mean")
    for progress in (0.0, 0.5)  # prototypes frozen, and not
]


def small_method(centering="sinkhorn", **options) -> DINOv2:
    """Two blocks for images of 32 pixels; no parameter at its initial value."""
    torch.manual_seed(0)
    model = sized("micro", patch_size=8, image_size=32, num_registers=3, layer_scale=True, embed_dim=32, depth=2)
    crops = MultiCropConfig(num_local=2, local_size=16)
    config = DINOv2Config(crops, num_prototypes=64, hidden_dim=48, bottleneck_dim=16, centering=centering, **options)
    method = config.build(model)
    perturb(method)
    return method.train()


def random_batch(size=8) -> dict[str, torch.Tensor]:
    """In whose first half less is hidden than in the second."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(size, 2, 16, generator=generator) < torch.linspace(0, 0.6, size)[:, None, None]
    return {
        "global": torch.randn(size, 2, 3, 32, 32, generator=generator),
        "local": torch.randn(size, 2, 3, 16, 16, generator=generator),
        "mask": mask,
        **locate_hidden(mask),
    }


def step(method, batch, progress, wrap=lambda method: method):
    """The scalars, the gradients, and the teacher after two steps: its center is not zero in the second."""
    wrapped = wrap(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    scalars, gradients = {}, {}
    for _ in range(2):
        optimizer.zero_grad()
        scalars = wrapped(batch, progress)
        scalars["loss"].backward()
        gradients = {name: _whole(p.grad) for name, p in method.named_parameters() if p.requires_grad}
        optimizer.step()
        method.after_step(progress)
    teacher = {name: _whole(p.detach()) for name, p in method.teacher_vit.named_parameters()}
    return {name: value.detach() for name, value in scalars.items()}, gradients, teacher


def _whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def shard(method):
    for vit in (method.vit, method.teacher_vit):
        for block in vit.blocks:
            fully_shard(block)
    return fully_shard(method)


def run(rank: int, num_processes: int, folder: Path) -> None:
    """All cases, in one of the processes; the first writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes)
    results = {}
    batch = random_batch()
    part = len(batch["mask"]) // num_processes
    own = {name: batch[name][rank * part : (rank + 1) * part] for name in ("global", "local", "mask")}
    own |= locate_hidden(own["mask"])
    for sharding, centering, progress in CASES:
        wrap = DistributedDataParallel if sharding == "ddp" else shard
        scalars, gradients, teacher = step(small_method(centering), own, progress, wrap)
        for value in scalars.values():
            dist.all_reduce(value)
            value /= num_processes
        results[sharding, centering, progress] = scalars, gradients, teacher
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()  # a process that leaves while another one still talks to it ends that one
    dist.destroy_process_group()
