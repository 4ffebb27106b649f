"""Order and augmentation: the same images whoever fetches them, and every epoch all of them."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from training.small import small_config
from vitreg.images import ImageError, ImageSet, open_image_set
from vitreg.training.data.samples import MAX_ATTEMPTS, SampleStream, fetch
from vitreg.training.engine.distributed import Distributed
from vitreg.training.engine.failures import failures_in_words
from vitreg.training.engine.method import Augmentation, Batch, Sample

CPU = torch.device("cpu")
CONFIG = small_config()


class Numbered(ImageSet):
    """Ten images that say their number; some cannot be read."""

    source = "numbers"

    def __init__(self, broken: tuple[int, ...] = (), total: int = 10) -> None:
        self.broken, self.total = broken, total

    def __len__(self) -> int:
        return self.total

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise ImageError(f"image {index} is damaged")
        return Image.fromarray(np.full((2, 2, 3), index, np.uint8))

    def name(self, index: int) -> str:
        return f"image {index}"


class Numbers(Augmentation):
    """The number of an image, and what each source of randomness gives it."""

    def __call__(self, sample: Sample) -> Batch:
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])
        return {"number": torch.tensor(np.asarray(sample.image)[0, 0, 0]), "draws": draws}

    def mix(self, pair: Batch) -> Batch:
        return {**pair, "mixed": torch.rand(1).expand(2)}


def numbers(stream: SampleStream, positions: range) -> list[int]:
    return stream[positions][0]["number"].tolist()


def test_every_epoch_is_another_permutation():
    stream = SampleStream(Numbered(), Numbers(), seed=0)
    epochs = [numbers(stream, range(10 * e, 10 * e + 10)) for e in range(5)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert numbers(SampleStream(Numbered(), Numbers(), seed=1), range(10)) != epochs[0]
    # A batch across the end of an epoch, and going back.
    assert numbers(stream, range(16, 26)) == epochs[1][6:] + epochs[2][:6]
    assert numbers(stream, range(10)) == epochs[0]
    # Sets of an odd number of images, too.
    odd = SampleStream(Numbered(total=7), Numbers(), seed=0)
    assert sorted(numbers(odd, range(0, 14))) == sorted([*range(7)] * 2)


def batches(stream: SampleStream, *, world=1, accumulation=1, workers=0, steps=range(4)) -> list[Batch]:
    """Whole batches, put together from those of all processes."""
    parts = [
        fetch(
            stream,
            Distributed(rank, world, CPU),
            batch_size=8,
            accumulation=accumulation,
            steps=steps,
            num_workers=workers,
        )
        for rank in range(world)
    ]
    found = []
    for _ in steps:
        micro = [next(part)[0] for part in parts for _ in range(accumulation)]
        found.append({name: torch.cat([batch[name] for batch in micro]) for name in micro[0]})
    assert all(next(part, None) is None for part in parts)
    return found


@pytest.mark.parametrize(
    ("world", "accumulation", "workers"), [(2, 1, 0), (1, 2, 0), (2, 2, 0), (4, 1, 0), (1, 1, 2), (2, 1, 1)]
)
def test_batches_do_not_depend_on_who_fetches_them(class_folders, world, accumulation, workers):
    images = open_image_set(class_folders / "train")
    stream = SampleStream(images, CONFIG.method.augmentation(CONFIG.model, images), seed=3)
    expected = batches(stream)
    for ours, theirs in zip(
        batches(stream, world=world, accumulation=accumulation, workers=workers), expected, strict=True
    ):
        assert ours.keys() == {"image", "target"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(expected[0]["image"], expected[1]["image"])


def test_workers_may_be_spawned(class_folders):
    """Where processes are not forked, they are sent a copy."""
    images = open_image_set(class_folders / "train")
    stream = SampleStream(images, CONFIG.method.augmentation(CONFIG.model, images), seed=3)
    copy = pickle.loads(pickle.dumps(stream))
    for name, rows in stream[range(8)][0].items():
        assert torch.equal(copy[range(8)][0][name], rows)


def test_going_on_from_the_middle_gives_the_same_batches():
    stream = SampleStream(Numbered(), Numbers(), seed=0)
    whole = batches(stream, steps=range(6))
    fresh = batches(SampleStream(Numbered(), Numbers(), seed=0), steps=range(3, 6))
    for ours, theirs in zip(fresh, whole[3:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_image_and_every_pair_has_its_own_randomness():
    batch = SampleStream(Numbered(), Numbers(), seed=0)[range(10)][0]
    assert len(batch["draws"].unique()) == 30
    assert len(batch["mixed"].unique()) == 5


def test_nothing_is_left_in_the_global_generators():
    """Python's is left out: beartype, with which only tests run, draws from it."""
    np.random.seed(5), torch.manual_seed(5)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(5), torch.manual_seed(5)
    stream = SampleStream(Numbered(broken=(3,)), Numbers(), 0)
    stream[range(10)], stream[range(16, 26)]
    assert (np.random.rand(), torch.rand(1)) == expected


def fetch_alone(stream: SampleStream, workers: int = 0):
    return fetch(stream, Distributed(0, 1, CPU), batch_size=4, accumulation=1, steps=range(9), num_workers=workers)


def test_broken_images_are_replaced_and_named():
    whole, broken = SampleStream(Numbered(), Numbers(), 0), SampleStream(Numbered(broken=(3, 4)), Numbers(), 0)
    before, (after, skipped) = numbers(whole, range(10)), broken[range(10)]
    replaced = after["number"].tolist()
    assert len(replaced) == 10
    assert [n for n in before if n not in (3, 4)] == [
        r for r, n in zip(replaced, before, strict=True) if n not in (3, 4)
    ]
    assert not {3, 4} & set(replaced)
    assert set(skipped) == {"image 3 is damaged", "image 4 is damaged"}
    again, _ = SampleStream(Numbered(broken=(3, 4)), Numbers(), 0)[range(10)]
    assert again["number"].tolist() == replaced
    # Others in other places: one image does not stand in for all that are broken.
    places = [numbers(SampleStream(Numbered(broken=(3,)), Numbers(), 0), range(10 * e, 10 * e + 10)) for e in range(8)]
    assert len({max(set(epoch), key=epoch.count) for epoch in places}) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_readable_image_ends_with_a_sentence(workers):
    """From a worker, too, whose errors PyTorch raises with the worker's traceback as their message."""
    stream = SampleStream(Numbered(broken=tuple(range(10))), Numbers(), 0)
    with pytest.raises(ValueError, match=rf"^{MAX_ATTEMPTS} images in a row cannot be read, the last: image \d is d"):
        next(fetch_alone(stream, workers))


class Deadly(Numbered):
    """An image on which the decoder crashes."""

    def image(self, index: int) -> Image.Image:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_is_told_in_a_sentence():
    with pytest.raises(ValueError, match="decodes images died"), failures_in_words(4):
        next(fetch_alone(SampleStream(Deadly(), Numbers(), 0), workers=1))


def test_workers_end_with_what_fetches():
    import multiprocessing

    before = set(multiprocessing.active_children())
    fetched = fetch_alone(SampleStream(Numbered(), Numbers(), 0), workers=2)
    next(fetched)
    assert len(set(multiprocessing.active_children()) - before) == 2
    fetched.close()
    assert set(multiprocessing.active_children()) == before
