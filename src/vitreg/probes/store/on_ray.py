"""The shards of a feature pass as a map on Ray: actors hold the model, and take a shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitreg.common.devices import available_cores
from vitreg.common.progress import OnProgress
from vitreg.images import Shards
from vitreg.model import VisionTransformer
from vitreg.probes.store.manifest import Manifest
from vitreg.probes.store.shard_pass import ShardPass, shard_path
from vitreg.probes.store.shards import open_shard


@dataclass(frozen=True)
class Ray:
    """A cluster.

    Attributes:
        num_workers: actors, each with a GPU where the model is on one, else with its share of this machine's cores.
        address: of a cluster that exists, `"auto"` for the one this machine is of; by default one is started here.
    """

    num_workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}; it must be at least 1")


class _Worker:
    def __init__(self, make: Callable[[], Callable[[int], int]]) -> None:
        self._compute = make()

    def compute(self, index: int) -> int:
        return self._compute(index)


def map_on_ray(
    make: Callable[[], Callable[[int], int]],
    indices: Sequence[int],
    cluster: Ray,
    *,
    device: torch.device,
    on_progress: OnProgress | None,
    total: int | None,
    done: int,
) -> None:
    """Compute shards, each by whichever worker is free; one that is lost is started again and costs its shard only.

    Args:
        make: gives the function that computes a shard, of its index, and returns how many images it has; it is called
            once in each worker.
        indices: of the shards.
        cluster: where.
        device: that the model is on.
        on_progress: called with the number of images done and their total.
        total: images, where it is known.
        done: images that are done.

    Raises:
        ValueError: Ray is not installed, there is no cluster, it went away, or what a worker raised.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
        from ray.util import ActorPool  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("engine ray needs Ray; install it with: pip install 'vitreg[scale]'") from None
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False)
        needs: dict[str, Any] = {"num_gpus": 1} if device.type == "cuda" else {}
        needs["num_cpus"] = 1 if needs else max(1, available_cores() // cluster.num_workers)
        # A shard is written whole or not at all, so that it can be computed again.
        worker = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(_Worker)
        made = ray.put(make)
        pool = ActorPool([worker.remote(made) for _ in range(min(cluster.num_workers, len(indices)))])
        for count in pool.map_unordered(lambda actor, index: actor.compute.remote(index), list(indices)):
            done += count
            if on_progress is not None:
                on_progress(done, total)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ValueError) else ValueError(str(error.cause))) from error
    except (ConnectionError, ray.exceptions.RayError) as error:
        what = str(error).strip().partition("\n")[0]
        raise ValueError(f"Ray gave up ({what}); the shards that are there stay, run it again") from error
    finally:
        if started:
            ray.shutdown()


def run_on_ray(
    cluster: Ray,
    vit: VisionTransformer,
    shards: Shards,
    folder: Path,
    manifest: Manifest,
    strict: bool,
    on_progress: OnProgress | None,
    say: Callable[[str], None] | None,
    batch_size: int,
    indices: Sequence[int],
) -> None:
    """The shards that are missing; here only the first of those that are there is looked at."""
    paths = {index: shard_path(folder, index, manifest.origin, shards) for index in indices}
    there = [open_shard(path) for path in paths.values() if path.exists()]
    missing = [index for index, path in paths.items() if not path.exists()]
    here = ShardPass(vit, shards, folder, manifest, strict, None, say)
    if there:
        here.warn(there[0])

    make = partial(_compute_shards, vit, shards, folder, manifest, strict, batch_size, paths)

    def tell(done: int, total: int | None) -> None:
        if on_progress is not None:
            on_progress(done, total)
        first = next((path for path in paths.values() if path.exists()), None)
        if first is not None:
            here.warn(open_shard(first))

    done = sum(shard.num_rows for shard in there)
    if missing:
        map_on_ray(make, missing, cluster, device=here.device, on_progress=tell, total=shards.num_images, done=done)


def _compute_shards(
    vit: VisionTransformer,
    shards: Shards,
    folder: Path,
    manifest: Manifest,
    strict: bool,
    batch_size: int,
    paths: Mapping[int, Path],
) -> Callable[[int], int]:
    """In a worker: what computes a shard, and says how many images it has."""
    of_worker = ShardPass(vit, shards, folder, manifest, strict, None, None)

    def compute(index: int) -> int:
        of_worker.run(batch_size, [index])
        return open_shard(paths[index]).num_rows

    return compute
