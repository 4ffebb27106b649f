"""The feature pass against timm, against the diagnosis, and against a pass that was killed."""

from __future__ import annotations

import dataclasses
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch

import vitreg
from peers import error, perturb
from probes.small import BLOCKS, KILLED, Images, finish_pass, killed_pass, small_vit, validation
from vitreg.images import ImageError, open_image_set
from vitreg.images.files import ImageFiles
from vitreg.probes import FeaturesConfig, FeatureStore, extract


@pytest.fixture
def images(test_data) -> Images:
    """Thirty of a hundred classes."""
    return validation(test_data, 30)


def files_of(store: Path) -> list[str]:
    """All files, by their paths in the store."""
    return sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())


def all_patches(store: FeatureStore, block: int) -> torch.Tensor:
    rows, patches = zip(*store.patches(block), strict=True)
    assert torch.cat(rows).tolist() == list(range(store.num_images))
    return torch.cat(patches)


def forwards(vit: vitreg.VisionTransformer) -> list[int]:
    """Sizes of the batches that go through a model from now on."""
    seen: list[int] = []
    vit.patch_embed.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("normed", [True, False])
def test_tokens_are_those_of_timm(normed, images, tmp_path):
    model = perturb(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=3, embed_dim=48, num_heads=3))
    vit = vitreg.from_timm(model)
    preprocess = vitreg.Preprocess(size=(56, 56))
    config = dataclasses.replace(BLOCKS, normed=normed)
    store = extract(vit, images, tmp_path / "store", config, preprocess=preprocess, batch_size=5)
    batch = torch.stack([preprocess(images.image(i)) for i in range(30)])
    with torch.inference_mode():
        theirs = model.get_intermediate_layers(batch, n=[0, 2], norm=normed, return_prefix_tokens=True)
        plain = model.get_intermediate_layers(batch, n=3)
    for block, (patches, prefix) in zip((0, -1), theirs, strict=True):
        cls = store.cls(block)
        assert cls is not None
        assert error(cls, prefix[:, 0]) < 1e-5
        assert error(store.registers(block), prefix[:, 1:]) < 1e-5
        assert error(store.mean_patch(block), patches.mean(1)) < 1e-5
        assert error(all_patches(store, block), patches) < 1e-5
    assert error(store.norms, torch.stack([p.norm(dim=-1) for p in plain], 1).unflatten(-1, (4, 4))) < 1e-5
    assert store.grid == (4, 4)
    assert store.blocks == store.config.blocks == (0, 2)
    assert torch.equal(store.numbers, torch.arange(30))
    assert images.labels is not None
    assert store.labels is not None
    assert store.labels.tolist() == list(images.labels)
    assert store.classes == images.classes
    assert store.preprocess == preprocess


def test_float16_is_rounded_float32(images, tmp_path):
    vit = small_vit()
    exact = extract(vit, images, tmp_path / "32", BLOCKS)
    rounded = extract(vit, images, tmp_path / "16", dataclasses.replace(BLOCKS, dtype="float16"))
    for block in BLOCKS.blocks:
        cls, exact_cls = rounded.cls(block), exact.cls(block)
        assert cls is not None
        assert exact_cls is not None
        assert torch.equal(cls, exact_cls.half().float())
        assert torch.equal(all_patches(rounded, block), all_patches(exact, block).half().float())
    assert torch.equal(rounded.norms, exact.norms)


def test_a_model_without_class_token_labels_or_registers(test_data, tmp_path):
    files = sorted(map(str, (test_data / "imagenet-samples").glob("*.jpg")))[:5]
    config = dataclasses.replace(small_vit().config, class_token=False, num_registers=0, pool="mean")
    vit = vitreg.VisionTransformer(config)
    store = extract(vit, ImageFiles("samples", files), tmp_path / "store", batch_size=2)
    assert store.cls(-1) is None
    assert store.labels is None
    assert store.registers(-1).shape == (5, 0, 48)
    assert store.mean_patch(-1).shape == (5, 48)


def test_patches_of_some_images_spread_over_the_set(images, tmp_path):
    vit = small_vit()
    full = all_patches(extract(vit, images, tmp_path / "all", BLOCKS), 0)
    store = extract(vit, images, tmp_path / "some", dataclasses.replace(BLOCKS, patches=4))
    rows, patches = zip(*store.patches(0), strict=True)
    assert torch.cat(rows).tolist() == [0, 10, 19, 29]
    assert torch.equal(torch.cat(patches), full[torch.cat(rows)])
    assert store.num_images == len(store.mean_patch(-1)) == 30
    whole = FeatureStore.open(tmp_path / "all")
    assert torch.equal(store.norms, whole.norms[torch.cat(rows)])
    assert torch.equal(store.registers(0), whole.registers(0)[torch.cat(rows)])
    none = extract(vit, images, tmp_path / "none", dataclasses.replace(BLOCKS, patches=0))
    with pytest.raises(ValueError, match="holds no patch tokens; run the feature pass with patches=None"):
        none.patches(0)


def test_unreadable_images_are_left_out_and_listed(test_data, tmp_path):
    vit, broken = small_vit(), (0, 9, 16, 17, 18, 19, 20, 21, 22, 23)
    whole = extract(vit, validation(test_data, 30), tmp_path / "whole", BLOCKS)
    store = extract(vit, validation(test_data, 30, broken), tmp_path / "store", BLOCKS)
    readable = [number for number in range(30) if number not in broken]
    assert store.numbers.tolist() == readable
    assert whole.labels is not None
    assert store.labels is not None
    assert torch.equal(store.labels, whole.labels[readable])
    assert error(all_patches(store, 0), all_patches(whole, 0)[readable]) < 1e-5
    assert [image.number for image in store.skipped] == list(broken)
    assert "is damaged; replace it" in store.skipped[3].reason
    assert store.skipped[3].name == validation(test_data, 30).name(17)


def test_a_strict_pass_had_no_way_to_refuse_images_that_cannot_be_read(test_data, tmp_path):
    """While it computes, when it goes on, and where the store is there. Without `strict` it goes on from there."""
    vit, images, out = small_vit(), validation(test_data, 30, (17,)), tmp_path / "store"
    for _ in range(2):
        with pytest.raises(ImageError, match="is damaged; replace it"):
            extract(vit, images, out, BLOCKS, batch_size=4, strict=True)
    assert len(extract(vit, images, out, BLOCKS, batch_size=4).skipped) == 1
    with pytest.raises(ValueError, match=r"store lacks 1 image that could not be read; the first: .* is damaged"):
        extract(vit, images, out, BLOCKS, batch_size=4, strict=True)
    extract(vit, validation(test_data, 30), tmp_path / "whole", BLOCKS, strict=True)


def test_no_image_can_be_read(test_data, tmp_path):
    with pytest.raises(ValueError, match=r"no image of .*val.parquet can be read: .* is damaged; replace it"):
        extract(small_vit(), validation(test_data, 3, range(3)), tmp_path / "store")


def test_one_forward_pass_for_every_image_and_none_for_a_finished_store(images, tmp_path):
    vit, progress = small_vit().train(), []
    seen = forwards(vit)
    extract(vit, images, tmp_path / "store", BLOCKS, batch_size=5, on_progress=lambda *done: progress.append(done))
    assert seen == [5, 3, 5, 3, 5, 3, 5, 1]
    assert progress[-1] == (30, 30)
    assert vit.training
    again = extract(vit, images, tmp_path / "store", BLOCKS)
    assert sum(seen) == 30
    assert again.num_images == 30


def test_outliers_are_those_of_the_diagnosis(tiny_vit, photographs, photograph_batch, tmp_path):
    images = ImageFiles("photographs", map(str, photographs[:16]))
    store = extract(tiny_vit, images, tmp_path / "store", FeaturesConfig(patch_blocks=(), shard_size=6))
    diagnosis = vitreg.diagnose(tiny_vit, photograph_batch[:16])
    assert diagnosis.threshold is not None
    assert (store.threshold, store.block) == (diagnosis.threshold, diagnosis.block)
    assert store.onset_block == diagnosis.onset_block
    outliers = store.outliers()
    assert outliers.float().mean().item() == pytest.approx(diagnosis.outlier_fraction)
    torch.testing.assert_close(outliers.double().mean(0), torch.from_numpy(diagnosis.position_frequency))


def test_no_outliers(images, tmp_path):
    store = extract(small_vit(), images, tmp_path / "store", BLOCKS)
    assert store.threshold is store.onset_block is None
    assert store.outliers().shape == (30, 4, 4)
    assert not store.outliers().any()


def test_features_of_something_else_are_refused_with_both_names(images, test_data, tmp_path):
    vit, out = small_vit(), tmp_path / "store"
    extract(vit, images, out, BLOCKS)
    other = small_vit(seed=1)
    with pytest.raises(ValueError, match=r"another model: small \(weights (\w+)\), not small \(weights (?!\1)\w+\)"):
        extract(other, images, out, BLOCKS)
    wider = vitreg.Preprocess(size=(64, 80), crop_pct=1.0)
    with pytest.raises(ValueError, match=r"preprocessing: size \(64, 64\), not size \(64, 80\); choose another folder"):
        extract(vit, images, out, BLOCKS, preprocess=wider)
    with pytest.raises(ValueError, match=r"another set of images: .*val.parquet \(30 .*, not .*\(29 images"):
        extract(vit, validation(test_data, 29), out, BLOCKS)
    images.labels = [0] * 30
    with pytest.raises(ValueError, match="another set of images"):
        extract(vit, images, out, BLOCKS)
    with pytest.raises(ValueError, match="another config: patches None, dtype float32, not patches 3, dtype float16"):
        extract(vit, validation(test_data, 30), out, dataclasses.replace(BLOCKS, patches=3, dtype="float16"))


def test_a_store_made_under_another_name_is_the_same(images, tmp_path):
    vit = small_vit()
    extract(vit, images, tmp_path / "store", BLOCKS)
    vit.config = dataclasses.replace(vit.config, name="the same")
    seen = forwards(vit)
    assert extract(vit, images, tmp_path / "store", BLOCKS).model.name == "small"
    assert not seen


def test_tokens_that_are_not_finite_name_the_image(images, tmp_path):
    vit = small_vit()

    def spoil(_module, _inputs, output):
        if len(output) == 5:
            output[2, 0] = float("nan")

    vit.blocks[1].register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"not finite \(\w+\) for .*val.parquet, row 14;"):
        extract(vit, images, tmp_path / "store", BLOCKS, batch_size=5)


def test_float16_that_is_too_small_is_said(images, tmp_path):
    vit = small_vit()
    with torch.no_grad():
        vit.norm.weight *= 1e5
    with pytest.raises(ValueError, match="dtype float32 where float16 is too small"):
        extract(vit, images, tmp_path / "16")
    extract(vit, images, tmp_path / "32", BLOCKS)


def test_a_full_disk_is_one_sentence_and_costs_no_finished_shard(test_data, tmp_path):
    """Files may not grow beyond the first, in which half of the images are broken."""
    vit, images = small_vit(), validation(test_data, 30, range(4))
    whole, out = tmp_path / "whole", tmp_path / "store"
    extract(vit, images, whole, BLOCKS)
    first, *_ = sorted((whole / "shards").iterdir())
    room, limits = first.stat().st_size + 1000, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"^cannot write to .*/shard-000001-\w+.parquet: File too large; make"):
            extract(vit, images, out, BLOCKS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(file.name for file in out.iterdir()) == [".lock", "manifest.json", "shards"]
    assert [file.name for file in (out / "shards").iterdir()] == [first.name]
    seen = forwards(vit)
    extract(vit, images, out, BLOCKS)
    assert sum(seen) == 22
    for file in files_of(whole):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
        assert (out / file).stat().st_mode == (out / ".lock").stat().st_mode


def test_other_files_are_left_alone(images, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files, such as thesis.txt; choose another folder"):
        extract(small_vit(), images, tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"blocks": ()}, "blocks is empty"),
        ({"blocks": (3,)}, "block 3 does not exist: the model has blocks 0 to 2"),
        ({"patches": -1}, "patches is -1"),
        ({"shard_size": 0}, "shard_size is 0"),
    ],
)
def test_a_config_that_is_wrong(config, sentence, images, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        extract(small_vit(), images, tmp_path / "store", FeaturesConfig(**config))
    assert not (tmp_path / "store").exists()


def test_images_of_several_sizes(images, tmp_path):
    with pytest.raises(ValueError, match="crop 'none' gives images of several sizes"):
        extract(small_vit(), images, tmp_path / "store", preprocess=vitreg.Preprocess(crop="none"))


@pytest.mark.slow
def test_patches_of_fewer_blocks(test_data, tmp_path):
    images, vit = validation(test_data, 10), small_vit()
    store = extract(vit, images, tmp_path / "some", dataclasses.replace(BLOCKS, patch_blocks=(-1,)))
    whole = extract(vit, images, tmp_path / "all", BLOCKS)
    for (_, ours), (_, theirs) in zip(store.patches(-1), whole.patches(-1), strict=True):
        assert torch.equal(ours, theirs)
    cls, of_whole = store.cls(0), whole.cls(0)
    assert cls is not None
    assert of_whole is not None
    assert torch.equal(cls, of_whole)
    for read in (store.patches, store.mean_patch, store.registers):
        with pytest.raises(ValueError, match="no patch tokens of block 0"):
            read(0)
    with pytest.raises(ValueError, match="must be among the blocks"):
        extract(vit, images, tmp_path / "none", dataclasses.replace(BLOCKS, patch_blocks=(1,)))


@pytest.mark.parametrize("config", [
    FeaturesConfig(patches=0),
    FeaturesConfig(blocks=(0, 1, 2), patches=100, patch_blocks=(1,)),
    FeaturesConfig(blocks=(1, 2), dtype="float32"),
])  # fmt: skip
def test_the_bytes_are_known_before(config, test_data, tmp_path):
    vit, images = small_vit(), validation(test_data, 600)
    store = extract(vit, images, tmp_path / "store", config)
    headers = 16000 * len(store.shards)
    written = sum(shard.path.stat().st_size for shard in store.shards)
    names = sum(len(images.id(number)) for number in range(600))
    expected = config.num_bytes(vit.config, vit.preprocess, 600)
    assert expected <= written <= expected + headers + names


def test_too_little_room_is_said_before_the_pass(images, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    vit = small_vit()
    seen = forwards(vit)
    with pytest.raises(ValueError, match=r"features of .* take [\d.]+ kB, but .*store has room for 1 kB; make room"):
        extract(vit, images, tmp_path / "store", BLOCKS)
    assert not seen
    monkeypatch.undo()
    assert extract(vit, images, tmp_path / "store", BLOCKS).num_images == 30


def test_pooled_is_what_the_head_reads(test_data, tmp_path, tiny_vit):
    images = validation(test_data, 6)
    store = extract(tiny_vit, images, tmp_path / "store", FeaturesConfig(dtype="float32", patches=0))
    batch = torch.stack([tiny_vit.preprocess(images.image(i)) for i in range(6)])
    with torch.inference_mode():
        torch.testing.assert_close(tiny_vit.head(store.pooled), tiny_vit.classify(batch), rtol=1e-4, atol=1e-4)


def test_killed_at_random_moments_is_bit_for_bit_as_never_killed(test_data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish_pass(test_data, whole)
    for shards in (1, 8, 17):
        status = killed_pass(
            test_data, killed, lambda n=shards: len(list(killed.glob("shards/shard-*"))) >= n, random.uniform(0, 0.02)
        )
        assert status == -signal.SIGKILL
        with pytest.raises(ValueError, match="is unfinished; run the feature pass again with the same settings"):
            FeatureStore.open(killed)
    before = {file.name: file.stat().st_mtime_ns for file in killed.glob("shards/shard-*")}
    assert 17 <= len(before) < 25
    # What a kill in the middle of a file leaves is not one.
    (killed / "shards" / ".shard-000024-0.vitreg-4711.partial.parquet").write_bytes(b"half")
    finish_pass(test_data, killed)
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in killed.glob("shards/shard-*")}.items()
    files = files_of(whole)
    assert files == files_of(killed)
    assert len(files) == 25 + 2
    for name in files:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    store = FeatureStore.open(killed)
    assert store.config == dataclasses.replace(KILLED, patch_blocks=KILLED.blocks, norm_blocks=(0, 1, 2))
    assert store.numbers.tolist() == [number for number in range(100) if number != 30]


def test_folders_and_parquet_of_real_images(test_data, tmp_path):
    images = open_image_set(test_data / "imagenet-samples")
    some = Images(images, range(0, len(images), 250))
    store = extract(small_vit(), some, tmp_path / "store")
    assert store.data.source == str(test_data / "imagenet-samples")
    assert store.num_images == 4
