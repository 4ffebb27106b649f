"""What a trace records, against timm's modules with hooks and timm's own unfused attention."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peers import TOLERANCE, at_size, attention_inputs, error, random_images, split, timm_model, unfused_attention
from vitreg import from_timm
from vitreg.model import attention

FAMILIES = {
    "plain": ("vit_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=70)),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "qk_norm": ("vit_small_patch16_224", dict(qk_norm=True, reg_tokens=2)),
    "rope": ("vit_small_patch16_dinov3_qkvb", {}),
    "rope_interleaved": ("eva02_small_patch14_224", {}),
    "biased": ("beit_base_patch16_224", {}),
    "biased_by_mlp": ("vit_relpos_small_patch16_224", {}),
    "parallel": ("vit_pwee_patch16_reg1_gap_256", {}),
    "differential": ("vit_dwee_patch16_reg1_gap_256", dict(class_token=True)),
    "differential_parallel": ("vit_dpwee_patch16_reg1_gap_256", dict(qk_norm=True)),
}
GRID = (4, 6)


def pair(family: str):
    """A timm model of four blocks, its conversion, and images of `GRID` patches."""
    architecture, options = FAMILIES[family]
    model = timm_model(architecture, depth=4, **options)
    vit = from_timm(model)
    images = random_images(*(side * vit.config.patch_size for side in GRID))
    return at_size(model, images), vit, images


@pytest.fixture(params=FAMILIES)
def traced(request):
    return pair(request.param)


@torch.no_grad()
def outputs_of_blocks(model, images):
    """`[L, B, T, D]`: the residual stream after each of timm's blocks."""
    seen = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: seen.append(output)) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def close(tokens, sequence, model) -> None:
    """Named tokens `[L, B, ., D]` against timm's sequence `[L, B, T, D]`."""
    for layer, expected in enumerate(sequence):
        cls, registers, patches = split(expected, model)
        assert error(tokens.patches[layer], patches) <= TOLERANCE
        if cls is not None:
            assert error(tokens.cls[layer], cls) <= TOLERANCE
        if registers.shape[1]:
            assert error(tokens.registers[layer], registers) <= TOLERANCE


@torch.no_grad()
def test_dinov2_issue_373_norms_are_prenorm(traced):
    """D6: `get_intermediate_layers` normalizes by default, and the outliers are gone."""
    model, vit, images = traced
    trace, stream = vit.trace(images), outputs_of_blocks(model, images)
    norms = stream.norm(dim=-1)
    prefix, first = model.num_prefix_tokens, int(vit.config.class_token)
    assert trace.patch_norms.shape == (4, 2, *GRID)
    assert error(trace.patch_norms.flatten(2), norms[:, :, prefix:]) <= TOLERANCE
    assert error(trace.register_norms, norms[:, :, first:prefix]) <= TOLERANCE or first == prefix
    if first:
        assert error(trace.cls_norms, norms[:, :, 0]) <= TOLERANCE
    else:
        assert trace.cls_norms is None
    if vit.config.final_norm:
        assert error(trace.patch_norms[-1].flatten(1), trace.tokens.patches.norm(dim=-1)) > 0.01


@torch.no_grad()
def test_timm_d1_fused_model_gives_maps_equal_to_the_unfused_softmax(traced):
    """D1: timm's extractor finds nothing in a model with fused attention."""
    model, vit, images = traced
    prefix, first = model.num_prefix_tokens, int(vit.config.class_token)
    expected = unfused_attention(model, images)
    asked = [*["cls"] * first, *["registers"] * bool(vit.num_registers), 7, (3, 5)]
    rows = vit.trace(images, attention_from=asked).attention
    queries = [*range(prefix), prefix + 7, prefix + 23]
    chosen = expected[:, :, :, queries]
    named = "summary token" if vit.config.num_summary_tokens else "register"
    assert rows.queries == (
        *["class token"] * first,
        *[f"{named} {r + 1}" for r in range(vit.num_registers)],
        "patch (1, 1)",
        "patch (3, 5)",
    )
    assert error(rows.to_patches.flatten(-2), chosen[..., prefix:]) <= TOLERANCE
    assert rows.to_patches.shape == (4, 2, 3, len(queries), *GRID)
    total = rows.to_patches.sum((-2, -1)) + rows.to_registers.sum(-1)
    if first:
        assert error(rows.to_cls, chosen[..., 0]) <= TOLERANCE
        total = total + rows.to_cls
    else:
        assert rows.to_cls is None
    if vit.num_registers:
        assert error(rows.to_registers, chosen[..., first:prefix]) <= TOLERANCE
    share = torch.ones(4)
    if vit.config.differential:
        share = 1 - torch.stack([block.attn.lambda_full() for block in vit.blocks])
        assert rows.to_patches.min() < 0
    assert torch.allclose(total, share[:, None, None, None], atol=1e-5)


@torch.no_grad()
def test_facets_are_what_enters_timms_softmax(traced):
    model, vit, images = traced
    trace = vit.trace(images, facets=("queries", "keys", "values"))
    with attention_inputs() as seen:
        model(images)
    for i, facet in enumerate(("queries", "keys", "values")):
        parts = [qkv[i] for qkv in seen]
        if vit.config.differential:  # one call for each softmax, both with the same values
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [first if facet == "values" else torch.cat((first, second), -1) for first, second in pairs]
        close(getattr(trace, facet), torch.stack([part.transpose(1, 2).flatten(2) for part in parts]), model)


@torch.no_grad()
def test_activations_are_what_enters_the_last_layer_of_the_mlp(traced):
    model, vit, images = traced
    seen = []
    for block in model.blocks:
        layer = block.mlp_drop if vit.config.parallel else block.mlp.fc2
        layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(images)
    trace = vit.trace(images, activations=True)
    close(trace.activations, torch.stack(seen), model)
    # what a neuron writes is its value times a column
    assert trace.activations.patches.shape[-1] == vit.blocks[0].mlp.fc2.in_features


@torch.no_grad()
def test_patches_are_hidden_states_and_embeddings_come_before_positions(traced):
    model, vit, images = traced
    trace = vit.trace(images, patches=True, hidden=True, embeddings=True)
    assert error(trace.patches, outputs_of_blocks(model, images)[:, :, model.num_prefix_tokens :]) <= TOLERANCE
    close(trace.hidden, outputs_of_blocks(model, images), model)
    assert error(trace.embeddings, model.patch_embed(images).flatten(1, -2)) <= TOLERANCE


@torch.no_grad()
def test_looking_changes_nothing(traced):
    """Tokens bit for bit, and nothing is left on the model (D4: LOST adds a hook for every image)."""
    _, vit, images = traced

    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(module, kind)) for module in vit.modules() for kind in kinds)

    before = vit(images)
    state = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    everything = dict(
        attention_from=0, facets=("queries", "keys", "values"), patches=True, hidden=True, activations=True
    )
    for _ in range(2):
        tokens = vit.trace(images, embeddings=True, **everything).tokens
        assert torch.equal(tokens.sequence(), before.sequence())
        assert (tokens.grid, tokens.normed) == (before.grid, before.normed)
    assert hooks() == 0
    assert torch.equal(vit(images).sequence(), before.sequence())
    assert all(torch.equal(tensor, state[key]) for key, tensor in vit.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("asked", [(0,), (2, 0), (-1,), (3, 3, 1), (-4, -1, 0), range(4)], ids=str)
def test_blocks_in_any_order(asked):
    _, vit, images = pair("registers")
    options = dict(attention_from=["cls", 3], facets=("keys",), patches=True, hidden=True, activations=True)
    every, some = vit.trace(images, **options), vit.trace(images, blocks=asked, **options)
    chosen = [block % 4 for block in asked]
    assert some.blocks == tuple(chosen)
    assert torch.equal(some.patch_norms, every.patch_norms)  # norms are of all blocks, whatever is asked for
    assert torch.equal(some.patches, every.patches[chosen])
    assert torch.equal(some.keys.patches, every.keys.patches[chosen])
    assert torch.equal(some.keys.registers, every.keys.registers[chosen])
    assert torch.equal(some.activations.cls, every.activations.cls[chosen])
    assert torch.equal(some.hidden.registers, every.hidden.registers[chosen])
    assert torch.equal(some.attention.to_patches, every.attention.to_patches[chosen])
    assert torch.equal(some.attention.to_registers, every.attention.to_registers[chosen])


@torch.no_grad()
def test_nothing_is_kept_unless_asked_for():
    _, vit, images = pair("plain")
    trace = vit.trace(images)
    kept = (
        trace.attention,
        trace.queries,
        trace.keys,
        trace.values,
        trace.patches,
        trace.activations,
        trace.hidden,
        trace.embeddings,
    )
    assert kept == (None,) * 8
    assert trace.register_norms.shape == (4, 2, 0)
    assert vit.trace(images, facets=("keys",)).queries is None


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 1000, 5000])
def test_rows_in_chunks_are_the_same_rows(monkeypatch, budget):
    _, vit, images = pair("registers")
    asked = ["cls", "registers", *range(24)]
    whole = vit.trace(images, attention_from=asked).attention
    monkeypatch.setattr(attention, "ROW_BUDGET", budget)
    parts = vit.trace(images, attention_from=asked).attention
    assert error(parts.to_patches, whole.to_patches) <= 1e-6
    assert error(parts.to_registers, whole.to_registers) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_half_precision_model_sum_to_one(dtype):
    _, vit, images = pair("rope")
    rows = vit.to(dtype).trace(images, attention_from=["cls", "registers"]).attention
    assert rows.to_patches.dtype == torch.float32
    total = rows.to_cls + rows.to_registers.sum(-1) + rows.to_patches.sum((-2, -1))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert vit.trace(images).patch_norms.dtype == torch.float32


def test_norms_do_not_overflow_in_half_precision():
    """Outliers of norm above 600 have squares beyond float16."""
    _, vit, images = pair("plain")
    with torch.no_grad():
        vit.patch_embed.bias.add_(200.0)
        expected = vit.trace(images).patch_norms
        assert expected.min() > 1000
        norms = vit.half().trace(images).patch_norms
    assert error(norms, expected) < 0.01


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


@torch.no_grad()
@pytest.mark.parametrize("attn_layer", ["", "diff"])
def test_no_matrix_of_all_pairs_of_tokens_exists(attn_layer):
    options = dict(img_size=70, embed_dim=16, num_heads=1, depth=1, attn_layer=attn_layer)
    model = timm_model("vit_small_patch14_reg4_dinov2", **options)
    vit, images, patches = from_timm(model), random_images(64 * 14, batch=1), 64 * 64
    with Largest() as largest:
        trace = vit.trace(images, attention_from=["cls", "registers", 17], facets=("keys",), patches=True)
    assert trace.attention.to_patches.shape == (1, 1, 1, 6, 64, 64)
    assert largest.elements < patches**2 / 4
    with Largest() as largest:
        unfused_attention(model, images)
    assert largest.elements >= patches**2  # the measure sees such a matrix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(blocks=[4]), "block 4 does not exist: the model has blocks 0 to 3"),
        (dict(blocks=[-5]), "block -5 does not exist"),
        (dict(attention_from="registers"), "the model has no registers to ask attention from"),
        (dict(attention_from=24), "patch 24 is outside the grid of 4 rows and 6 columns"),
        (dict(attention_from=-1), "patch -1 is outside the grid"),
        (dict(attention_from=[(4, 0)]), r"patch \(4, 0\) is outside the grid"),
        (dict(attention_from=[(0, 6)]), r"patch \(0, 6\) is outside the grid"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(options, message):
    _, vit, images = pair("plain")
    with pytest.raises(ValueError, match=message):
        vit.trace(images, **options)


def test_a_model_without_class_token_has_no_row_for_it():
    _, vit, images = pair("parallel")
    with pytest.raises(ValueError, match="the model has no class token to ask attention from"):
        vit.trace(images, attention_from=["cls"])


@torch.no_grad()
def test_patches_by_number_and_by_row_and_column_agree():
    _, vit, images = pair("registers")
    pairs = list(itertools.product(range(GRID[0]), range(GRID[1])))
    numbers = vit.trace(images, attention_from=list(range(len(pairs)))).attention
    places = vit.trace(images, attention_from=pairs).attention
    assert numbers.queries == places.queries
    assert torch.equal(numbers.to_patches, places.to_patches)


@torch.no_grad()
@pytest.mark.parametrize(
    "asked", [np.int64(7), np.array([7]), torch.tensor(7), [np.uint8(7)], [torch.tensor(7)], [tuple(np.array([1, 1]))]]
)
def test_any_kind_of_integer_names_a_patch(asked):
    """NumPy's integers, as `argmax` and `unravel_index` return them, are no `int`."""
    _, vit, images = pair("plain")
    expected = vit.trace(images, attention_from=7).attention
    rows = vit.trace(images, attention_from=asked).attention
    assert rows.queries == expected.queries == ("patch (1, 1)",)
    assert torch.equal(rows.to_patches, expected.to_patches)


@torch.no_grad()
def test_the_real_vit_tiny_has_its_outliers(tiny_vit, photograph_batch):
    """Measured before: from block 7 on some patches have norms of 300 to 600, the median stays near 18."""
    norms = tiny_vit.trace(photograph_batch).patch_norms.flatten(1)
    assert norms.median(1).values.max() < 25
    assert norms[:7].max() < 100
    assert (norms[8:].max(1).values > 300).all()
    assert 0.005 < (norms[9] > 150).float().mean() < 0.05
