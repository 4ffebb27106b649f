"""`ImageStream`: order, full batches, skipping, bounded memory, and threads that end."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitreg.images import ImageError, ImageStream, SkippedImage, files, find_images
from vitreg.images.files import ImageFiles
from vitreg.model.preprocess import Preprocess

SMALL = Preprocess(size=(16, 16), crop_pct=1.0)


def which(images: torch.Tensor) -> list[int]:
    """The number of each photo, from its red."""
    return [round((red - 10) / 10) for red in SMALL.unnormalize(images)[:, 0].float().mean((1, 2)).tolist()]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("vitreg-images")]


def test_batches_come_in_order_and_equal_preprocessing_one_by_one(photos):
    batches = list(ImageStream(photos, SMALL, batch_size=6))
    assert [len(batch.paths) for batch in batches] == [6, 6, 6, 2]
    assert [path for batch in batches for path in batch.paths] == photos
    images = torch.cat([batch.images for batch in batches])
    assert which(images) == list(range(20))
    assert torch.equal(images, torch.stack([SMALL(Image.open(photo)) for photo in photos]))
    assert not threads()


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_any_number_of_threads_and_any_batch_give_the_same(photos, num_threads, batch_size):
    batches = ImageStream(photos, SMALL, batch_size=batch_size, num_threads=num_threads)
    assert which(torch.cat([batch.images for batch in batches])) == list(range(20))


def test_broken_files_are_skipped_and_made_up_for(photos):
    photos[2].write_bytes(b"")
    photos[9].unlink()
    images = ImageStream(photos, SMALL, batch_size=6)
    assert len(images) == 20
    batches = list(images)
    assert [len(batch.paths) for batch in batches] == [6, 6, 6]
    assert which(torch.cat([batch.images for batch in batches])) == [n for n in range(20) if n not in (2, 9)]
    assert images.skipped[0] == SkippedImage(photos[2], f"{photos[2]} is empty (0 bytes); replace it or leave it out")
    assert images.skipped[1].path == photos[9]


def test_some_images_of_a_set_keep_their_numbers(photos):
    photos[4].write_bytes(b"")
    images = ImageStream(ImageFiles("photos", map(str, photos)), SMALL, numbers=range(0, 20, 2), batch_size=4)
    assert len(images) == 10
    batches = list(images)
    assert [batch.numbers for batch in batches] == [[0, 2, 6, 8], [10, 12, 14, 16], [18]]
    assert [which(batch.images) for batch in batches] == [batch.numbers for batch in batches]
    assert images.skipped[0].number == 4


def test_no_batch_reaches_into_the_next_part_and_a_part_may_be_empty(photos):
    for number in (1, 8, 9, 10, 11):
        photos[number].write_bytes(b"")
    images = ImageStream(photos, SMALL, numbers=[*range(12), *range(16, 20)], batch_size=3)
    with contextlib.closing(images.parts(4)) as parts:
        found = [(part, [batch.numbers for batch in batches]) for part, batches in parts]
    assert found == [(0, [[0, 2, 3]]), (1, [[4, 5, 6], [7]]), (2, []), (4, [[16, 17, 18], [19]])]
    assert [skip.number for skip in images.skipped] == [1, 8, 9, 10, 11]
    assert not threads()


def test_iterates_again_from_the_start_with_a_fresh_list_of_skipped(photos):
    photos[2].write_bytes(b"")
    images = ImageStream(photos, SMALL)
    for _ in range(2):
        assert sum(len(batch.paths) for batch in images) == 19
        assert len(images.skipped) == 1


def test_nothing_but_broken_files_gives_no_batch(photos):
    for photo in photos:
        photo.write_bytes(b"")
    images = ImageStream(photos, SMALL)
    assert list(images) == []
    assert len(images.skipped) == 20


def test_strict_raises_at_the_first_broken_file_after_the_batches_before_it(photos):
    photos[7].write_bytes(b"")
    batches = iter(ImageStream(photos, SMALL, batch_size=4, strict=True))
    assert which(next(batches).images) == [0, 1, 2, 3]
    with pytest.raises(ImageError, match=r"7\.jpg is empty"):
        next(batches)
    assert not threads()


def test_images_of_different_sizes_are_batched_with_neighbors_of_their_size(tmp_path):
    paths = []
    for index, size in enumerate([(32, 16), (32, 16), (16, 32), (16, 32), (16, 32), (32, 16)]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", size).save(paths[-1])
    whole = Preprocess(size=(16, 16), crop="none", multiple_of=8)
    batches = list(ImageStream(paths, whole, batch_size=2))
    assert [tuple(batch.images.shape) for batch in batches] == [
        (2, 3, 16, 32),
        (2, 3, 32, 16),
        (1, 3, 32, 16),
        (1, 3, 16, 32),
    ]
    assert [path for batch in batches for path in batch.paths] == paths


def test_memory_is_bounded_by_batches_ahead_and_not_by_the_number_of_files(photos, monkeypatch):
    decoded = 0
    lock = threading.Lock()
    original = files.read_image

    def counting(path):
        nonlocal decoded
        with lock:
            decoded += 1
        return original(path)

    monkeypatch.setattr(files, "read_image", counting)
    taken = 0
    for batch in ImageStream(photos * 10, SMALL, batch_size=4, num_threads=2):
        taken += len(batch.paths)
        time.sleep(0.005)
        # Two batches ahead, and the chunk that replaces the one being taken.
        assert decoded - taken <= 3 * 4
    assert taken == decoded == 200


def test_stopping_early_ends_the_threads(photos):
    for _ in ImageStream(photos * 50, SMALL, batch_size=4):
        assert threads()
        break
    assert not threads()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loop_ends_the_threads(photos, kind):
    def consume():
        for _ in ImageStream(photos * 50, SMALL, batch_size=4):
            raise kind

    with contextlib.suppress(kind):
        consume()
    assert not threads()


def test_interrupt_while_waiting_for_a_slow_file_ends_the_threads(photos, monkeypatch):
    def interrupted(path):
        if Path(path) == photos[5]:
            raise KeyboardInterrupt
        return Image.new("RGB", (20, 20))

    monkeypatch.setattr(files, "read_image", interrupted)
    try:
        list(ImageStream(photos, SMALL, batch_size=2))
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("the interrupt was swallowed")
    assert not threads()


def test_other_errors_reach_the_consumer(photos, monkeypatch):
    def broken(_):
        raise MemoryError

    monkeypatch.setattr(files, "read_image", broken)
    with pytest.raises(MemoryError):
        list(ImageStream(photos, SMALL))


def test_two_iterations_at_once_do_not_mix(photos):
    images = ImageStream(photos, SMALL, batch_size=5)
    for first, second in zip(images, images, strict=True):
        assert first.paths == second.paths
        assert torch.equal(first.images, second.images)


def test_device(photos):
    for batch in ImageStream(photos, SMALL, device="meta"):
        assert batch.images.device.type == "meta"
        assert batch.images.dtype == torch.float32


@pytest.mark.parametrize("name", ["batch_size", "num_threads"])
def test_counts_below_one_are_refused(photos, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        ImageStream(photos, SMALL, **{name: 0})


def test_a_single_path_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="find_images"):
        ImageStream("photos", SMALL)


def test_real_photos(coco128):
    paths = find_images(coco128)[:40]
    images = ImageStream(paths, Preprocess(), batch_size=16)
    batches = list(images)
    assert images.skipped == []
    assert [tuple(batch.images.shape) for batch in batches] == [(16, 3, 224, 224)] * 2 + [(8, 3, 224, 224)]
    assert torch.allclose(batches[0].images[3], Preprocess()(Image.open(paths[3]).convert("RGB")))
    assert isinstance(batches[0].paths[0], Path)


def test_batches_know_the_sizes_of_the_images_and_pad_them(tmp_path):
    sizes = [(40, 30), (33, 31), (40, 32), (50, 32)]
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, (255, 0, 0)).save(path)
    preprocess = Preprocess(crop="pad", multiple_of=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    first, second = ImageStream(paths, preprocess, batch_size=4)
    assert first.sizes == [(30, 40), (31, 33), (32, 40)]
    assert first.images.shape == (3, 3, 32, 48)
    assert second.sizes == [(32, 50)]
    assert second.images.shape == (1, 3, 32, 64)
    inside = torch.zeros(32, 48, dtype=torch.bool)
    inside[:30, :40] = True
    expected = torch.where(inside, torch.tensor([1.0, -1, -1])[:, None, None], 0)
    # The mean color, 127.5, is no byte.
    torch.testing.assert_close(first.images[0], expected, atol=0.004, rtol=0)
