"""Test-time registers against the published algorithm, on planted units, on clean models, and on the real ViT-Ti."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import vitreg
from peers import error, random_images
from registers.planting import GREEN, MAGENTA, photos, plant, random_vit, with_patches
from vitreg.common.words import percent


def in_a_process(code: str, *arguments) -> str:
    """What a script prints, run without the tests' shape checks."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


UNITS = [(7, 417), (6, 189), (5, 485)]


@pytest.fixture(scope="module")
def fixed(_tiny_vit):
    return vitreg.add_test_time_registers(_tiny_vit, neurons=UNITS)


@torch.no_grad()
def algorithm_2(vit, image, neurons, count: int = 1, start: int = 0):
    """Jiang et al., Algorithm 2, literally: one image, one unit at a time, with the tokens in a plain list order."""
    config = vit.config
    patches = vit.patch_embed(image[None]).flatten(2).transpose(1, 2) + vit.pos_embed
    x = torch.cat([vit.cls_token, patches], 1)
    for b, block in enumerate(vit.blocks):
        if b == start:
            x = torch.cat([x, torch.zeros(1, count, config.embed_dim)], 1)  # appended, as published
        q, k, v = (
            block.attn.qkv(block.norm1(x)).reshape(1, -1, 3, config.num_heads, config.head_dim).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) / config.head_dim**0.5).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
        for neuron_block, unit in neurons:
            if neuron_block == b:
                strongest = max(float(hidden[0, t, unit]) for t in range(hidden.shape[1]))
                for t in range(hidden.shape[1]):
                    hidden[0, t, unit] = strongest if t >= hidden.shape[1] - count else 0.0
        x = x + block.mlp.fc2(hidden)
    x = vit.norm(x)
    return x[:, 0], x[:, 1:-count], x[:, -count:]


@pytest.mark.parametrize("count", [1, 3])
def test_equals_the_published_algorithm_on_20_photographs(tiny_vit, photograph_batch, count):
    fixed = vitreg.add_test_time_registers(tiny_vit, neurons=UNITS, count=count)
    with torch.no_grad():
        tokens = fixed(photograph_batch[:20])
    for i in range(20):
        cls, patches, registers = algorithm_2(tiny_vit, photograph_batch[i], UNITS, count)
        assert error(tokens.patches[i : i + 1], patches) < 1e-5
        assert error(tokens.cls[i : i + 1], cls) < 1e-5
        assert error(tokens.registers[i : i + 1], registers) < 1e-5


def entering(vit, neurons, start: int, **changes):
    """Test-time registers that enter before a block."""
    fixed = vitreg.add_test_time_registers(vit, neurons=neurons)
    config = fixed.config.to_dict() | {"register_start": start} | changes
    late = vitreg.VisionTransformer(vitreg.ViTConfig.from_dict(config)).eval()
    late.load_state_dict(fixed.state_dict())
    return late


@torch.no_grad()
def test_a_register_that_enters_later_equals_the_algorithm_from_there_on(tiny_vit, photograph_batch):
    tokens = entering(tiny_vit, UNITS, 5)(photograph_batch[:2])
    for i in range(2):
        cls, patches, registers = algorithm_2(tiny_vit, photograph_batch[i], UNITS, start=5)
        assert error(tokens.patches[i : i + 1], patches) < 1e-5
        assert error(tokens.cls[i : i + 1], cls) < 1e-5
        assert error(tokens.registers[i : i + 1], registers) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [
        "vit_base_patch16_224",
        "vit_small_patch16_dinov3_qkvb",
        "beit_base_patch16_224",
        "vit_small_patch16_rope_mixed_224",
    ],
)
def test_before_its_registers_enter_a_model_is_the_original(family):
    vit = random_vit(family, embed_dim=96, num_heads=3)
    late = entering(vit, [(1, 3)], 1, register_weight=3)
    images = random_images(vit.config.image_size[0])
    wanted = dict(attention_from=["cls", "registers", (0, 0)], facets=["keys"], hidden=True, activations=True)
    trace = late.trace(images, **wanted)
    before = vit.trace(images, **(wanted | {"attention_from": ["cls", (0, 0)]}))
    own = vit.num_registers
    assert torch.equal(trace.hidden.patches[0], before.hidden.patches[0])
    assert torch.equal(trace.keys.patches[0], before.keys.patches[0])
    assert torch.equal(trace.activations.cls[0], before.activations.cls[0])
    assert torch.equal(trace.attention.to_patches[0][:, :, [0, -1]], before.attention.to_patches[0][:, :, [0, -1]])
    assert (trace.attention.to_registers[0, :, :, [0, -1], own] == 0).all()
    assert (trace.attention.to_patches[0, :, :, own + 1] == 0).all()  # a register that is not there asks nothing
    sums = (
        trace.attention.to_patches[1].flatten(-2).sum(-1)
        + trace.attention.to_registers[1].sum(-1)
        + trace.attention.to_cls[1]
    )
    assert error(sums, torch.ones_like(sums)) < 1e-5
    assert trace.activations.registers[1, :, own, 3].abs().min() > 0
    assert torch.equal(trace.tokens.patches, late(images).patches)


@torch.no_grad()
def test_a_batch_equals_single_images_at_several_sizes(fixed, photograph_batch):
    for size in ((224, 224), (288, 256), (160, 320)):
        images = F.interpolate(photograph_batch, size, mode="bilinear")
        together = fixed(images)
        for i in range(0, 32, 1 if size == (224, 224) else 8):
            alone = fixed(images[i : i + 1])
            for name in ("cls", "registers", "patches"):
                assert error(getattr(together, name)[i], getattr(alone, name)[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit_base_patch16_224", "vit_giant_patch14_dinov2", "beit_base_patch16_224"])
def test_a_weight_equals_so_many_registers(family, photographs):
    vit = random_vit(family, embed_dim=96, num_heads=3)
    images, marks = with_patches(photos(photographs[:8], vit), vit.config.patch_size)
    plant(vit, 1, (3,), images, marks)
    several = vitreg.add_test_time_registers(vit, neurons=[(1, 3)], count=4)
    config = dict(num_registers=1, num_test_time_registers=1, register_weight=4)
    one = vitreg.VisionTransformer(vitreg.ViTConfig.from_dict(several.config.to_dict() | config)).eval()
    one.load_state_dict(several.state_dict() | {"registers": several.registers[:, :1]})
    a = several.trace(images, attention_from=["cls", "registers"], facets=["keys"])
    b = one.trace(images, attention_from=["cls", "registers"], facets=["keys"])
    assert error(b.tokens.patches, a.tokens.patches) < 1e-5
    assert error(b.attention.to_patches[..., 0, :, :], a.attention.to_patches[..., 0, :, :]) < 1e-5
    assert error(b.attention.to_registers[..., 0, 0], a.attention.to_registers[..., 0, :].sum(-1)) < 1e-5
    assert error(b.keys.patches, a.keys.patches) < 1e-5


@torch.no_grad()
def test_the_activations_move(tiny_vit, fixed, photograph_batch):
    before = tiny_vit.trace(photograph_batch, activations=True).activations
    after = fixed.trace(photograph_batch, activations=True).activations
    block, unit = UNITS[0]
    assert before.patches[block, ..., unit].amax(-1).min() > 100  # the corners
    assert (after.patches[block, ..., unit] == 0).all()
    assert (after.cls[block, ..., unit] == 0).all()
    assert after.registers[block, :, 0, unit].min() > 50  # other units have moved too, so it fires less


def test_saves_loads_and_moves(fixed, tmp_path, photograph_batch):
    vitreg.save(fixed, tmp_path / "fixed.safetensors")
    loaded = vitreg.load(str(tmp_path / "fixed.safetensors"))
    assert loaded.config == fixed.config
    with torch.no_grad():
        assert torch.equal(loaded(photograph_batch[:2]).patches, fixed(photograph_batch[:2]).patches)
        half = copy.deepcopy(fixed).to(torch.bfloat16)
        assert error(half(photograph_batch[:2]).patches.float(), fixed(photograph_batch[:2]).patches) < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            assert error(fixed(photograph_batch[:2]).patches.float(), fixed(photograph_batch[:2]).patches) < 0.05
    assert {b.device.type for b in copy.deepcopy(fixed).to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_other_formats_refuse_it_and_leave_the_file(fixed, tmp_path, format):
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(vitreg.CheckpointError, match=r"cannot express test-time registers.*format='vitreg'"):
        vitreg.save(fixed, path, format=format)
    assert path.read_bytes() == b"old"


def test_a_full_disk_keeps_the_old_file(fixed, tmp_path):
    """The limit on the size of files stands for a full disk."""
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    vitreg.save(fixed, tmp_path / "fixed.safetensors")
    code = (
        "import resource, signal, sys, vitreg\n"
        "vit = vitreg.load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try:\n"
        "    vitreg.save(vit, sys.argv[2])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    said = in_a_process(code, tmp_path / "fixed.safetensors", path)
    assert "cannot write" in said
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed.safetensors", "old.safetensors"]


def test_compiles_without_graph_breaks(fixed, tmp_path):
    vitreg.save(fixed, tmp_path / "fixed.safetensors")
    code = (
        "import sys, torch, vitreg\n"
        "vit = vitreg.load(sys.argv[1])\n"
        "compiled = torch.compile(vit, fullgraph=True, backend='aot_eager')\n"
        "with torch.no_grad():\n"
        "    for size in ((224, 224), (256, 192)):\n"
        "        x = torch.randn(2, 3, *size)\n"
        "        print(float((compiled(x).patches - vit(x).patches).abs().max()) < 1e-4)\n"
    )
    assert in_a_process(code, tmp_path / "fixed.safetensors").split() == ["True", "True"]


def test_gradients_flow_through_the_move(fixed):
    vit = copy.deepcopy(fixed).train()
    vit.classify(random_images(224)).square().sum().backward()
    block, unit = UNITS[0]
    assert vit.blocks[block].mlp.fc1.weight.grad[unit].abs().max() > 0
    assert all(torch.isfinite(p.grad).all() for p in vit.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "family", ["vit_base_patch16_224", "vit_giant_patch14_dinov2", "vit_small_patch16_dinov3_qkvb"]
)
def test_units_planted_in_two_blocks_are_found_and_moved(family, photographs):
    """The second block's artifacts show only when the first's are gone, at places that move with the content."""
    options = {} if "base" in family else dict(embed_dim=96, num_heads=3)
    vit = random_vit(family, **options)
    images, green = with_patches(photos(photographs, vit), vit.config.patch_size, GREEN, seed=1)
    images, magenta = with_patches(images, vit.config.patch_size, MAGENTA)
    plant(vit, 1, (7, 30), images, magenta)
    plant(vit, 2, (11, 12, 13), images, green & ~magenta)
    assert vitreg.diagnose(vit, images).onset_block == 1
    fixed = vitreg.add_test_time_registers(vit, images)
    assert {*fixed.config.register_neurons} == {(1, 7), (1, 30), (2, 11), (2, 12), (2, 13)}
    assert fixed.num_registers == vit.num_registers + 1
    after = vitreg.compare(vit, fixed, images)
    assert after.outcome == "removed"
    trace = fixed.trace(images)
    assert trace.register_norms[-1, :, -1].min() > 5 * trace.patch_norms[-1].max()


def unchanged(vit: vitreg.VisionTransformer, images) -> str:
    """What the copy says, after a look that it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was done is returned, not warned of
        same = vitreg.add_test_time_registers(vit, images)
    assert same is not vit
    assert same.config == dataclasses.replace(vit.config, changes=same.config.changes)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(same.parameters(), vit.parameters(), strict=True))
    assert not vit.config.changes
    return same.config.changes[-1]


@pytest.mark.parametrize("family", ["vit_small_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224"])
def test_a_clean_model_is_returned_unchanged_and_says_so(family, photographs):
    vit = random_vit(family, embed_dim=96, num_heads=3)
    assert unchanged(vit, photos(photographs, vit)).startswith("No register was added. No artifacts in")


def test_artifacts_that_no_unit_writes_are_left(photographs):
    """Position embeddings write these."""
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    with torch.no_grad():
        vit.pos_embed[:, [3, 40]] *= 1000
    assert "removes no outliers, so something else writes them" in unchanged(vit, photos(photographs, vit))


def test_a_unit_that_is_given_twice_is_counted_once(tiny_vit):
    assert (
        "1 MLP unit (block 7: 417)"
        in vitreg.add_test_time_registers(tiny_vit, neurons=[(7, 417)] * 2).config.changes[0]
    )


def test_one_unit_is_not_they(photographs):
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    images, marks = with_patches(photos(photographs, vit), 16)
    plant(vit, 1, (7,), images, marks)
    said = vitreg.add_test_time_registers(vit, images).config.changes[-1]
    assert "activations of 1 MLP unit (block 1: 7)" in said
    assert re.search(r"It is the first of \d+, ranked on .*, and leaves 0 %", said)


def test_too_few_patches_to_tell_are_refused_with_how_many_would_do(photographs):
    """Of eight images, one patch of one stands out."""
    vit = random_vit("vit_small_patch16_224", embed_dim=96, num_heads=3)
    images, marks = with_patches(photos(photographs[:8], vit), 16)
    images[1:] = photos(photographs[1:8], vit)
    marks[1:] = False
    plant(vit, 1, (7,), images, marks)
    with pytest.raises(
        ValueError, match=r"cannot be told from 7 images: .* 1 patch has a norm .*; give at least \d+, one"
    ):
        vitreg.add_test_time_registers(vit, images)


def test_held_back_images_that_cannot_be_read_are_said(tiny_vit, photographs, tmp_path):
    """They ended in a division by zero."""
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(ValueError, match="none of the images that are held back"):
        vitreg.add_test_time_registers(tiny_vit, [*photographs[:4], tmp_path / "broken.jpg", *photographs[4:8]])


def test_what_was_there_before_is_of_the_images_that_judge(tiny_vit, photograph_batch):
    """The share was of the other images, by another threshold."""
    images = photograph_batch.clone()
    fixed = vitreg.add_test_time_registers(tiny_vit, images)
    with torch.inference_mode():
        judged = vitreg.diagnose(tiny_vit, images[4::5], max_examples=0)
    share = max(block.outlier_fraction for block in judged.blocks)
    assert f"({percent(share)} before)" in fixed.config.changes[-1]


def test_the_real_vit_is_fixed(tiny_vit, photographs, photograph_batch):
    fixed = vitreg.add_test_time_registers(tiny_vit, photographs)
    assert (7, 417) in fixed.config.register_neurons
    assert len(fixed.config.register_neurons) <= 20
    assert (fixed.num_registers, tiny_vit.num_registers) == (1, 0)
    assert "block 7: 417" in fixed.config.changes[0]
    comparison = vitreg.compare(tiny_vit, fixed, photograph_batch)
    assert comparison.outcome == "removed"
    assert comparison.head_agreement > 0.85
    trace = fixed.trace(photograph_batch)
    assert trace.register_norms[-1].mean() > 200


def test_a_model_with_registers_gets_one_more_and_says_so(tiny_vit):
    vit = vitreg.add_registers(tiny_vit, 2)
    fixed = vitreg.add_test_time_registers(vit, neurons=[(7, 417)])
    assert fixed.num_registers == 3
    assert "1 test-time register added beside the 2 that the model had" in fixed.config.changes[-1]
    again = vitreg.add_test_time_registers(fixed, neurons=[(6, 189)])
    assert again.config.register_neurons == ((7, 417), (6, 189))
    assert again.config.num_test_time_registers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(images=random_images(224, batch=5)), "5 images cannot tell .* give at least 8"),
        (dict(images=random_images(224, batch=1)), "1 image cannot tell"),
        (dict(images=(p for p in random_images(224, batch=8)[:, None])), "only once, but are needed again"),
        ({}, "images are needed to find the units"),
        (dict(count=0, neurons=[(7, 417)]), "count is 0; add at least 1 register"),
        (dict(neurons=[]), "neurons is empty"),
        (dict(neurons=[(12, 0)]), r"register neuron \(block 12, unit 0\) does not exist: .* blocks 0 to 11"),
        (
            dict(neurons=[(0, 768)]),
            r"unit 768\) does not exist: .* units 0 to 767; give neurons that were found in this",
        ),
    ],
)
def test_what_cannot_be_done_is_said(tiny_vit, options, message):
    with pytest.raises(ValueError, match=message):
        vitreg.add_test_time_registers(tiny_vit, **options)
