"""What `observe` finds out by itself, and what it says where it cannot."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vitreg
from peers import error, perturb, random_images
from vitreg.checkpoints import CheckpointError, convert_or_observe


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class HandWritten(nn.Module):
    """As someone writes one: registers last, patches column by column, attention without the fused kernel."""

    def __init__(self, dim: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, 2, dim))
        self.layers = nn.ModuleList(Block(dim, 4) for _ in range(depth))
        self.head = nn.Linear(dim, 5)

    def forward(self, images):
        x = self.embed(images).transpose(-1, -2).flatten(2).transpose(1, 2)
        tokens = [part.expand(len(x), -1, -1) for part in (self.cls, self.register_tokens)]
        x = torch.cat([tokens[0], x, tokens[1]], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


@pytest.fixture
def hand_written():
    return perturb(HandWritten())


@pytest.fixture
def small():
    """A preprocessing that makes images of 64 x 48 pixels."""
    return vitreg.Preprocess(size=(64, 48))


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_a_hand_written_vit_is_understood(hand_written, small):
    observed = vitreg.observe(hand_written, preprocess=small)
    config, images = observed.config, random_images(64, 48)
    assert (config.depth, config.embed_dim, config.num_heads, config.patch_size) == (3, 32, 4, 8)
    assert config.class_token
    assert config.num_registers == 2
    assert config.no_attention == ""
    assert (
        "3 blocks, the first is layers.0; 8 x 6 patches of 8 pixels; the order of the patches was m" in config.assumed
    )
    with torch.no_grad():
        trace = observed.trace(images, attention_from=["cls", (1, 2)], embeddings=True, hidden=True)
        embedded = hand_written.embed(images)
        stream = torch.cat([hand_written.cls.expand(2, -1, -1), embedded.transpose(-1, -2).flatten(2).mT], 1)
        stream = torch.cat([stream, hand_written.register_tokens.expand(2, -1, -1)], 1)
        weights = []
        for layer in hand_written.layers:
            q, k, _ = layer.qkv(layer.norm(stream)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            weights.append((q @ k.mT * 8**-0.5).softmax(-1))
            stream = layer(stream)
    torch.testing.assert_close(trace.embeddings, embedded.flatten(2).mT)
    patches = stream[:, 1:-2].unflatten(1, (6, 8)).transpose(1, 2)  # column by column
    torch.testing.assert_close(trace.tokens.patch_map(), patches.permute(0, 3, 1, 2))
    torch.testing.assert_close(trace.patch_norms[-1], patches.norm(dim=-1))
    torch.testing.assert_close(trace.cls_norms[-1], stream[:, 0].norm(dim=-1))
    torch.testing.assert_close(trace.register_norms[-1], stream[:, -2:].norm(dim=-1))
    attention = torch.stack(weights)
    for row, query in enumerate((0, 1 + 2 * 8 + 1)):
        to_patches = attention[..., query, 1:-2].unflatten(-1, (6, 8)).transpose(-1, -2)
        torch.testing.assert_close(trace.attention.to_patches[:, :, :, row], to_patches)
        torch.testing.assert_close(trace.attention.to_registers[:, :, :, row], attention[..., query, -2:])


def test_blocks_grid_and_prefix_may_be_given(hand_written, small):
    observed = vitreg.observe(hand_written, blocks=hand_written.layers[:2], grid=(8, 6), preprocess=small)
    assert observed.config.depth == 2
    assert vitreg.observe(hand_written, blocks="layers", preprocess=small).config.depth == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "layer"}, "HandWritten has no module 'layer' to take blocks from"),
        ({"blocks": "layers.0.mlp"}, r"blocks='layers.0.mlp' has no blocks that hand on patch tokens"),
        ({"grid": (5, 5)}, r"48 patch tokens besides 3 .* grid=\(5, 5\) is not of these; give grid=\(rows, columns\)"),
        ({"prefix": 99}, "prefix is 99; HandWritten has 51 tokens, give fewer"),
        ({"preprocess": vitreg.Preprocess(size=(4, 4))}, "does not run on images of 4 x 4 pixels"),
    ],
)
def test_what_does_not_fit_is_said(hand_written, small, options, message):
    with pytest.raises(CheckpointError, match=message):
        vitreg.observe(hand_written, **{"preprocess": small, **options})
    assert num_hooks(hand_written) == 0


class Shuffled(HandWritten):
    """Its tokens are mixed by a matrix before the first block, so that none is a patch."""

    def forward(self, images):
        x = self.embed(images).flatten(2)
        x = (x @ torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(0))).mT
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_grid_that_cannot_be_measured_is_asked_for(small):
    module = Shuffled()
    with pytest.raises(
        CheckpointError, match=r"has 48 patch tokens besides 0 .* their places cannot be measured; give g"
    ):
        vitreg.observe(module, preprocess=small)
    observed = vitreg.observe(module, preprocess=small, grid=(8, 6))
    assert "the order of the patches is assumed to be row by row" in observed.config.assumed
    assert "no class token" in observed.config.assumed
    observed = vitreg.observe(module, preprocess=small, grid=(5, 9), prefix=3)
    assert (observed.config.class_token, observed.config.num_registers) == (True, 2)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_module_without_patch_tokens_is_refused(name):
    with pytest.raises(CheckpointError, match="cannot be observed: it has no blocks that hand on patch tokens"):
        vitreg.diagnose(timm.create_model(name), random_images(224, batch=1))


def test_a_text_model_is_refused():
    hf = pytest.importorskip("transformers")
    model = hf.BertModel(hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64))
    with pytest.raises(CheckpointError, match="BertModel does not run on images of 224 x 224 pixels"):
        vitreg.diagnose(model, random_images(224, batch=1))


def test_nothing_but_a_module_is_observed():
    with pytest.raises(CheckpointError, match="a str is no model that vitreg reads"):
        convert_or_observe("resnet18")
    with torch.device("meta"), pytest.raises(CheckpointError, match="holds no weights"):
        vitreg.observe(HandWritten(), preprocess=vitreg.Preprocess(size=(64, 48)))


def test_the_module_is_left_as_it_was(hand_written, small):
    hand_written.train()
    hand_written.layers[1].eval()
    modes = [part.training for part in hand_written.modules()]
    observed = vitreg.observe(hand_written, preprocess=small)
    vitreg.diagnose(observed, random_images(64, 48, batch=4))
    with pytest.raises(CheckpointError, match="does not run on images of 4 x 4 pixels"):
        observed.trace(random_images(4))
    assert [part.training for part in hand_written.modules()] == modes
    assert num_hooks(hand_written) == 0
    hand_written(random_images(64, 48)).sum().backward()  # nothing was kept in inference mode


class Int8(nn.Module):
    """A linear layer as quantizing libraries keep it: integers and scales in buffers, no parameter."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_eight_bits(hand_written, small, dtype):
    images = random_images(64, 48)
    expected = vitreg.observe(hand_written, preprocess=small).trace(images).patch_norms
    for block in hand_written.layers:
        block.qkv, block.proj = Int8(block.qkv), Int8(block.proj)
        block.mlp[0], block.mlp[2] = Int8(block.mlp[0]), Int8(block.mlp[2])
    for name, parameter in [*hand_written.named_parameters()]:  # nothing says the precision but scales and buffers
        owner = hand_written.get_submodule(name.rpartition(".")[0])
        delattr(owner, name.rpartition(".")[2])
        owner.register_buffer(name.rpartition(".")[2], parameter.detach())
    observed = vitreg.observe(hand_written.to(dtype), preprocess=small)
    assert error(expected, observed.trace(images).patch_norms) < 0.05


def test_weights_that_are_on_no_device_are_named(hand_written, small):
    """As where a library keeps a part of a model elsewhere, and does not bring it."""
    hand_written.layers[2].to("meta")
    with pytest.raises(CheckpointError, match=r"device meta|meta device|device 'meta'") as caught:
        vitreg.observe(hand_written, preprocess=small)
    assert "\n" not in str(caught.value)


def test_hooks_go_when_the_module_fails_within(hand_written, small):
    observed = vitreg.observe(hand_written, preprocess=small)
    layer, hand_written.layers[2].norm = hand_written.layers[2].norm, nn.Identity()
    hand_written.layers[2].qkv = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="does not run on images of 64 x 48 pixels"):
        observed.trace(random_images(64, 48), attention_from="cls")
    assert num_hooks(hand_written) == 0
    assert torch.overrides._get_current_function_mode_stack() == []
    hand_written.layers[2].norm = layer


def test_other_sizes_are_measured_when_they_come(hand_written, small):
    observed = vitreg.observe(hand_written, preprocess=small)
    trace = observed.trace(random_images(32, 80))
    assert trace.tokens.grid == (4, 10)
    assert set(observed.layouts) == {(64, 48), (32, 80)}


def test_sequence_first_and_multi_head_attention(small):
    """PyTorch's own layers, with the batch second as CLIP's first code had it."""

    class SequenceFirst(HandWritten):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, norm_first=True) for _ in range(3))

        def forward(self, images):
            x = torch.cat([self.cls.expand(len(images), -1, -1), self.embed(images).flatten(2).mT], 1).transpose(0, 1)
            for layer in self.layers:
                x = layer(x)
            return x

    module = perturb(SequenceFirst())
    observed = vitreg.observe(module, preprocess=small)
    trace = observed.trace(random_images(64, 48), attention_from="cls")
    with torch.no_grad():
        last = module(random_images(64, 48)).transpose(0, 1)
    torch.testing.assert_close(trace.cls_norms[-1], last[:, 0].norm(dim=-1))
    torch.testing.assert_close(trace.patch_norms[-1].flatten(1), last[:, 1:].norm(dim=-1))
    total = trace.attention.to_patches.sum((-1, -2)) + trace.attention.to_cls
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_grid_with_outliers_is_diagnosed(hand_written, small):
    """Planted by a hook of the user's own, which stays."""

    def plant(module, args, output):
        output = output.clone()
        output[:, 1 + 8 * 2 + 5] *= 30  # column 2, row 5
        return output

    handle = hand_written.layers[1].register_forward_hook(plant)
    observed = vitreg.observe(hand_written, preprocess=small)
    diagnosis = vitreg.diagnose(observed, random_images(64, 48, batch=8))
    assert diagnosis.has_artifacts
    assert diagnosis.onset_block == 1
    assert diagnosis.position_frequency[5, 2] == 1
    assert diagnosis.position_frequency.sum() == 1
    assert diagnosis.blocks[2].attention_on_outliers is not None
    assert diagnosis.verdict[-1] == observed.config.assumed
    assert "`vitreg fix` moves the artifacts of models that are converted" in diagnosis.verdict[-2]
    assert num_hooks(hand_written) == 1
    handle.remove()
