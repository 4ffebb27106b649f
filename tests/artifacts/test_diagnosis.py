"""`diagnose` against direct computation, planted outliers, clean models and the real ViT-Ti."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitreg
from peers import perturb
from vitreg.artifacts import NeighbourSimilarity, neighbour_similarity
from vitreg.artifacts.verdict import write_verdict

FAMILIES = (
    "vit_small_patch16_224",
    "vit_base_patch14_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3_qkvb",
    "deit3_small_patch16_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
)


def random_vit(family: str, seed: int = 0, depth: int = 3) -> vitreg.VisionTransformer:
    torch.manual_seed(seed)
    return vitreg.from_timm(
        timm.create_model(family, img_size=112, depth=depth, embed_dim=96, num_heads=3, num_classes=0)
    )


def photos(paths, num: int = 16) -> torch.Tensor:
    from vitreg.images import read_image

    preprocess = vitreg.Preprocess(size=(112, 112))
    return torch.stack([preprocess(read_image(path)) for path in paths[:num]])


def plant(vit, block: int, ratio: float, planted: torch.Tensor):
    """Scale tokens after a block to `ratio` times the median norm, whatever they hold."""

    def hook(module, args, output):
        if len(output) != len(planted):  # the images that a diagnosis looks at for the range
            return output
        prefix = output.shape[1] - planted.shape[1]
        norms = output[:, prefix:].norm(dim=-1)
        factor = torch.where(planted, ratio * norms.median() / norms, 1.0)
        return torch.cat([output[:, :prefix], output[:, prefix:] * factor.unsqueeze(-1)], 1)

    return vit.blocks[block].register_forward_hook(hook)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("perturbed", [False, True], ids=["as initialized", "perturbed"])
def test_no_false_alarm_on_clean_models(family, perturbed, photographs):
    torch.manual_seed(1)
    model = timm.create_model(family, img_size=112, depth=3, embed_dim=96, num_heads=3, num_classes=0)
    vit = vitreg.from_timm(perturb(model) if perturbed else model)
    diagnosis = vitreg.diagnose(vit, photos(photographs))
    assert not diagnosis.has_artifacts
    assert diagnosis.threshold is None
    assert diagnosis.outlier_fraction == 0
    assert diagnosis.onset_block is None
    assert "No artifacts" in diagnosis.verdict[0]


@pytest.mark.parametrize("ratio", [6, 10, 30])
@pytest.mark.parametrize("fraction", [0.003, 0.05])
@pytest.mark.parametrize("family", FAMILIES[::3])
def test_planted_outliers_are_found(family, ratio, fraction, photographs):
    images = photos(photographs, 32)
    vit = random_vit(family)
    patch = 112 // vit.config.patch_size
    planted = torch.rand(len(images), patch * patch) < fraction
    handle = plant(vit, 1, ratio, planted)
    diagnosis = vitreg.diagnose(vit, images, block=1)
    assert diagnosis.threshold is not None
    with torch.inference_mode():
        marks = vit.trace(images).patch_norms[1].flatten(1) >= diagnosis.threshold
    handle.remove()
    assert (marks & planted).sum() / planted.sum() >= 0.99
    assert (marks & planted).sum() / marks.sum() >= 0.99
    assert diagnosis.outlier_fraction == pytest.approx(planted.float().mean().item(), rel=1e-6)
    expected = planted.float().mean(0).view(patch, patch)
    np.testing.assert_allclose(diagnosis.position_frequency, expected, atol=1e-6)


def test_numbers_equal_direct_computation(photographs):
    """Every figure of a diagnosis, recomputed from one trace of all images."""
    vit = vitreg.from_timm(
        perturb(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=112, depth=3, embed_dim=96, num_heads=3))
    )
    images = photos(photographs, 10)
    diagnosis = vitreg.diagnose(vit, images, batch_size=3, threshold="1.1xmedian", block=1)
    with torch.inference_mode():
        trace = vit.trace(images, attention_from="cls", embeddings=True, patches=True)
    norms = trace.patch_norms.flatten(1)
    for i, block in enumerate(diagnosis.blocks):
        assert block.median == pytest.approx(norms[i].median().item(), rel=0.01)
        assert block.p99 == pytest.approx(norms[i].quantile(0.99).item(), rel=0.01)
        assert block.max == pytest.approx(norms[i].max().item(), rel=1e-6)
        assert block.outlier_fraction == pytest.approx((norms[i] >= block.threshold).float().mean().item(), abs=1e-6)
        assert sum(block.histogram[1]) == norms.shape[1] == diagnosis.num_patches
        rows = trace.attention.to_patches[i, :, :, 0].mean(1)
        assert block.attention_on_registers == pytest.approx(
            trace.attention.to_registers[i, :, :, 0].sum(-1).mean().item(), rel=1e-5
        )
        if i:
            before = trace.patch_norms[i - 1] >= diagnosis.blocks[i - 1].threshold
            share = (rows * before).sum((1, 2)).mean().item()
            assert block.attention_on_outliers == pytest.approx(share, rel=1e-5)
    outliers = trace.patch_norms[1] >= diagnosis.threshold
    np.testing.assert_allclose(diagnosis.position_frequency, outliers.float().mean(0), atol=1e-6)
    similarity = neighbour_similarity(trace.embeddings, trace.tokens.grid)
    assert diagnosis.neighbour_similarity.outliers == pytest.approx(similarity[outliers].mean().item(), rel=1e-4)
    assert diagnosis.neighbour_similarity.others == pytest.approx(similarity[~outliers].mean().item(), rel=1e-4)
    np.testing.assert_allclose(diagnosis.register_norms, trace.register_norms.mean(1), rtol=1e-5)
    np.testing.assert_allclose(diagnosis.cls_norms, trace.cls_norms.mean(1), rtol=1e-5)
    largest = trace.patches[1][0][trace.patch_norms[1, 0].flatten().topk(8).indices]
    torch.testing.assert_close(vit.trace(images[:1], largest=8).largest[1, 0], largest, rtol=1e-4, atol=1e-4)
    kept = torch.cat(
        [p[n.flatten().topk(8).indices] for p, n in zip(trace.patches[1], trace.patch_norms[1], strict=True)]
    )
    squares = kept[kept.norm(dim=-1) >= diagnosis.threshold].square().sum(0)
    channel, share = diagnosis.channels[0]
    assert channel == squares.argmax().item()
    assert share == pytest.approx((squares.max() / squares.sum()).item(), abs=1e-3)


def test_neighbour_similarity_equals_a_loop():
    embeddings = torch.randn(2, 12, 5)
    grid = embeddings.unflatten(1, (3, 4))
    ours = neighbour_similarity(embeddings, (3, 4))
    for b, r, c in itertools.product(range(2), range(3), range(4)):
        near = [
            F.cosine_similarity(grid[b, r, c], grid[b, y, x], dim=0)
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
            if 0 <= y < 3 and 0 <= x < 4
        ]
        assert ours[b, r, c].item() == pytest.approx(torch.stack(near).mean().item(), abs=1e-5)


def test_sources_of_images_agree(photographs, tmp_path):
    vit = random_vit("vit_small_patch16_224")
    vit.config = dataclasses.replace(vit.config, preprocess=vitreg.Preprocess(size=(112, 112)))
    paths = photographs[:5]
    images = photos(photographs, 5)
    for path in paths:
        (tmp_path / path.name).symlink_to(path)
    sources = [images, paths, [str(p) for p in paths], tmp_path, str(tmp_path / "*.jpg")]
    sources += [images.split(2), DataLoader(TensorDataset(images, torch.zeros(5)), batch_size=2)]
    results = [vitreg.diagnose(vit, source, batch_size=2) for source in sources]
    for result in results:
        assert result.num_images == 5
        for block, expected in zip(result.blocks, results[0].blocks, strict=True):
            assert block.median == pytest.approx(expected.median, rel=1e-3)
            assert block.max == pytest.approx(expected.max, rel=1e-3)


def test_no_class_token_and_tiny_inputs():
    vit = random_vit("vit_base_patch16_siglip_224")
    diagnosis = vitreg.diagnose(vit, torch.randn(1, 3, 112, 112))
    assert diagnosis.blocks[1].attention_on_outliers is None
    assert diagnosis.cls_norms is None
    assert diagnosis.examples[0].attention == {}
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_a_distillation_token_was_called_a_register(tmp_path):
    def said(**tokens: int) -> str:
        config = vitreg.ViTConfig(
            image_size=(64, 64), patch_size=16, depth=2, embed_dim=32, num_heads=2, mlp_dim=64, **tokens
        )
        diagnosis = vitreg.diagnose(vitreg.VisionTransformer(config), torch.rand(2, 3, 64, 64))
        diagnosis.save(tmp_path)
        return " ".join(diagnosis.verdict)

    assert "its 1 summary token has a mean norm of " in (text := said(num_registers=1, num_summary_tokens=1))
    assert "register" not in text
    assert "Registers</dt><dd>none</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    text = said(num_registers=4, num_summary_tokens=1)
    assert "its 1 summary token has a mean norm of " in text
    assert " and its 3 registers have a mean norm of " in text


def test_non_square_images(tmp_path):
    vit = random_vit("vit_small_patch16_224")
    diagnosis = vitreg.diagnose(vit, torch.randn(3, 3, 80, 144))
    assert diagnosis.position_frequency.shape == (5, 9)
    assert diagnosis.save(tmp_path).is_file()


def test_a_patch_without_neighbors_is_not_dissimilar_to_them():
    vit = random_vit("vit_small_patch16_224")
    assert vitreg.diagnose(vit, torch.randn(4, 3, 16, 16)).neighbour_similarity == NeighbourSimilarity(None, None)
    assert vitreg.diagnose(vit, torch.randn(4, 3, 16, 80)).neighbour_similarity.others is not None


def test_outliers_at_the_output_are_not_called_invisible_where_another_block_was_asked_for(tiny_vit, photograph_batch):
    diagnosis = vitreg.diagnose(tiny_vit, photograph_batch, block=9)
    assert diagnosis.blocks[11].outlier_fraction > 0
    assert "invisible" not in " ".join(diagnosis.verdict)


def test_overflow_is_an_error_not_a_verdict():
    vit = random_vit("vit_small_patch16_224")
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias[0] = float("inf")
    with pytest.raises(ValueError, match="not finite after block 1"):
        vitreg.diagnose(vit, torch.randn(2, 3, 112, 112))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "block 3 does not exist"),
        ({"block": "last"}, "block 'last' does not exist"),
        ({"threshold": "percentile"}, "threshold 'percentile' is unknown"),
    ],
)
def test_impossible_options_say_what_is_possible(options, message):
    with pytest.raises(ValueError, match=message):
        vitreg.diagnose(random_vit("vit_small_patch16_224"), torch.randn(1, 3, 112, 112), **options)


def test_mixed_sizes_are_refused():
    vit = random_vit("vit_small_patch16_224")
    with pytest.raises(ValueError, match="one size"):
        vitreg.diagnose(vit, [torch.randn(1, 3, 112, 112), torch.randn(1, 3, 112, 96)])


def test_training_mode_and_hooks_are_left_as_they_were():
    vit = random_vit("vit_small_patch16_224").train()
    hooks = sum(len(m._forward_hooks) for m in vit.modules())
    vitreg.diagnose(vit, torch.randn(2, 3, 112, 112))
    assert vit.training
    assert sum(len(m._forward_hooks) for m in vit.modules()) == hooks


def test_interrupt_keeps_what_was_done():
    vit = random_vit("vit_small_patch16_224")

    def batches():
        yield torch.randn(4, 3, 112, 112)
        raise KeyboardInterrupt

    diagnosis = vitreg.diagnose(vit, batches(), keep_partial=True)
    assert diagnosis.interrupted
    assert diagnosis.num_images == 4
    with pytest.raises(KeyboardInterrupt):
        vitreg.diagnose(vit, batches())


def test_memory_does_not_grow_with_the_number_of_images():
    """Python's and the sums' memory after 4 and after 40 batches; tensors of batches are freed."""
    vit = random_vit("vit_small_patch16_224")

    def grown(num_batches: int) -> int:
        tracemalloc.start()
        vitreg.diagnose(vit, (torch.randn(2, 3, 112, 112) for _ in range(num_batches)), max_examples=2)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    grown(2)
    assert grown(40) < grown(4) + 100_000


def test_real_vit_tiny(tiny_vit, test_data):
    """What is known of the shared ViT-Ti (its README): 2.0 % from block 7 on, nearly always the corners, unit 417."""
    paths = sorted((test_data / "imagenet-samples").glob("*.jpg"))[::10]
    diagnosis = vitreg.diagnose(tiny_vit, paths)
    assert diagnosis.has_artifacts
    assert diagnosis.block == 11
    assert diagnosis.onset_block == 7
    assert diagnosis.outlier_fraction == pytest.approx(0.020, abs=0.001)
    assert [b.outlier_fraction > 0 for b in diagnosis.blocks] == [False] * 7 + [True] * 5
    corners = diagnosis.position_frequency[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.9
    assert diagnosis.position_frequency.sum() - corners.sum() < 0.1
    assert diagnosis.position_kind == "position-fixed"
    assert diagnosis.blocks[10].attention_on_outliers > 0.2
    assert diagnosis.blocks[10].max > 300
    text = " ".join(diagnosis.verdict)
    for part in ("2.0 %", "block 7", "position-fixed", "attention"):
        assert part in text
    fixed = vitreg.diagnose(tiny_vit, paths[:20], threshold=150)
    assert fixed.threshold == pytest.approx(150)
    assert fixed.outlier_fraction == pytest.approx(0.020, abs=0.002)


@pytest.mark.parametrize(
    ("outliers", "others", "num_patches", "said"),
    [
        (0.66, 0.31, 10000, "they are redundant patches"),
        (0.66, 0.31, 1000, "too few patches to tell by"),
        (0.58, 0.53, 10000, "too little to call them redundant"),
        (0.02, -0.07, 10000, "too little to call them redundant"),
        (0.31, 0.66, 10000, "no more redundant than the rest"),
    ],
)
def test_a_difference_within_noise_was_called_redundancy(tiny_vit, photographs, outliers, others, num_patches, said):
    found = vitreg.diagnose(tiny_vit, photographs[:4])
    similarity = NeighbourSimilarity(outliers, others)
    changed = dataclasses.replace(
        found, neighbour_similarity=similarity, num_patches=num_patches, outlier_fraction=0.02
    )
    assert said in " ".join(write_verdict(changed))
