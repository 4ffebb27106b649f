"""A student's first weights, cut from its teacher's: where `vitreg train distill --start` begins.

    python benchmarks/cut_student.py clip_vit_b16 PHOTOGRAPHS --fixed clip-fixed.safetensors --out start/

The student's residual stream is the teacher's along the principal directions of its tokens, and those that its register
neurons read and write. A student's block is cut from one block of the teacher, the last from all the rest:

- a head keeps its products of queries and keys, and its values, at the rank that its width has room for, weighed by the
  tokens that it meets (the best approximation of the products themselves: Eckart and Young);
- of the hidden units of the teacher's block those stay that add most, and the register neurons;
- both output layers are fitted anew (ridge regression), block by block, to what is missing of the teacher's tokens, so
  that later blocks mend what earlier ones lost.

For teachers without gates, LayerScale and RoPE. Writes start.safetensors and projection.safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import vitreg
from vitreg.images import Batches
from vitreg.model import VisionTransformer, ViTConfig


def tokens_of(vit: VisionTransformer, photographs: str, num_images: int) -> tuple[Tensor, list[Tensor]]:
    """Pixels of the patches `[B, N, 3 P P]`; the residual stream before the first and after each block `[B, T, D]`."""
    pixels, streams = [], []
    half, size = vit.bfloat16(), vit.config.patch_size
    for images, _ in Batches(photographs, vit.preprocess, batch_size=32, limit=num_images):
        pixels.append(F.unfold(images, size, stride=size).transpose(1, 2))
        seen = []
        hooks = [half.blocks[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))]
        hooks += [block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out)) for block in half.blocks]
        half(images.bfloat16())
        for hook in hooks:
            hook.remove()
        streams.append(seen)
    vit.float()
    return torch.cat(pixels), [torch.cat(parts).float() for parts in zip(*streams, strict=True)]


def projection_of(vit: VisionTransformer, fixed: VisionTransformer, streams: list[Tensor], width: int) -> Tensor:
    """Orthonormal rows `[width, D]` onto the channels of the student.

    No row has a mean, and neither has what they give: so a LayerNorm of the student does what the teacher's does, up to
    a factor and to what is lost.
    """
    dim = vit.config.embed_dim
    second = torch.zeros(dim, dim, dtype=torch.float64)
    for stream in streams:
        tokens = F.normalize(stream - stream.mean(-1, keepdim=True), dim=-1).flatten(0, 1)[::3].double()
        second += tokens.T @ tokens
    rows = []
    for block, unit in fixed.config.register_neurons:
        layer = vit.blocks[block]
        rows += [layer.mlp.fc1.weight[unit] * layer.norm2.weight, layer.mlp.fc2.weight[:, unit]]
    neurons = torch.stack(rows).double()
    found = torch.linalg.svd(neurons - neurons.mean(-1, keepdim=True), full_matrices=False)
    neurons = found.Vh[found.S / found.S[0] > 0.05]
    rest = torch.eye(dim, dtype=torch.float64) - neurons.T @ neurons
    principal = torch.linalg.eigh(rest @ second @ rest).eigenvectors[:, -(width - 1 - len(neurons)) :].T
    free = torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1).double()
    without_mean = torch.linalg.qr(free).Q[:, 1:]
    return (without_mean @ torch.cat([neurons, principal])).float()


def roots(second: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The square root of a matrix of second moments, and its inverse."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp_min(values.max() * least).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def fit_(layer: torch.nn.Linear, given: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Ridge regression into a linear layer, of which no output has a mean; returns what it gives."""
    given_flat, wanted = given.flatten(0, 1).float(), wanted.flatten(0, 1)
    given_flat = torch.cat([given_flat, torch.ones(len(given_flat), 1)], 1)
    weighed = (given_flat * weights).T.double()
    gram = weighed @ given_flat.double()
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, weighed @ wanted.double()).float()
    solution -= solution.mean(1, keepdim=True)
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])
    return layer(given.float())


def cut_attention_(student, teacher, norm, projection: Tensor, scale: float, tokens: Tensor) -> Tensor:
    """Queries, keys and values of a block's heads; returns the mixed values `[B, T, D]` of normalized tokens."""
    heads, width = student.num_heads, student.qkv.weight.shape[1]
    dim, rank = projection.shape[1], width // heads
    flat = torch.cat([tokens.flatten(0, 1), torch.ones(tokens[..., 0].numel(), 1)], 1).double()
    second, mean = flat.T @ flat / len(flat), flat.mean(0)
    centered = second - torch.outer(mean, mean)  # what all keys have in common does not change a softmax
    centered[-1, -1] = 1e-9
    (root, inverse), (key_root, key_inverse) = roots(second, 1e-6), roots(centered, 1e-5)
    bias = teacher.qkv.weight @ norm.bias + teacher.qkv.bias
    weight = torch.cat([teacher.qkv.weight * norm.weight @ projection.T / scale, bias[:, None]], 1).double()
    queries, keys, values = weight.view(3, heads, dim // heads, width + 1)
    into = projection @ teacher.proj.weight.view(dim, heads, -1).permute(1, 0, 2)
    new = torch.zeros(3, heads, rank, width + 1)
    for head in range(heads):
        left, at, right = torch.linalg.svd(root @ (queries[head].T @ keys[head]) * (dim // heads) ** -0.5 @ key_root)
        size = at[:rank].sqrt() * rank**0.25
        new[0, head] = (inverse @ left[:, :rank] * size).T
        new[1, head] = (key_inverse @ right[:rank].T * size).T
        new[1, head, :, -1] = 0
        _, at, right = torch.linalg.svd(into[head].double() @ values[head] @ root, full_matrices=False)
        new[2, head] = (inverse @ right[:rank].T * at[:rank]).T
    student.qkv.weight.copy_(new.flatten(0, 2)[:, :-1])
    student.qkv.bias.copy_(new.flatten(0, 2)[:, -1])
    q, k, v = student.qkv(tokens).unflatten(-1, (3, heads, rank)).permute(2, 0, 3, 1, 4).unbind(0)
    return student.mix(q, k, v).transpose(1, 2).flatten(2)


def cut_hidden_(student, blocks, neurons, projection: Tensor, scale: float, tokens: Tensor, weights: Tensor) -> Tensor:
    """The hidden units that add most; returns their activations `[B, T, M]` of normalized tokens."""
    rows, biases, added = [], [], []
    for block, kept in zip(blocks, neurons, strict=True):
        weight = block.mlp.fc1.weight * block.norm2.weight @ projection.T / scale
        bias = block.mlp.fc1.weight @ block.norm2.bias + block.mlp.fc1.bias
        hidden = block.mlp.act(tokens.flatten(0, 1)[::2] @ weight.T + bias)
        adds = ((hidden - hidden.mean(0)).square() * weights[::2]).mean(0)
        adds *= (projection @ block.mlp.fc2.weight).square().sum(0)
        adds[kept] = torch.inf
        rows.append(weight), biases.append(bias), added.append(adds)
    most = torch.cat(added).topk(len(student.fc1.bias)).indices
    student.fc1.weight.copy_(torch.cat(rows)[most])
    student.fc1.bias.copy_(torch.cat(biases)[most])
    return student.act(student.fc1(tokens)).half()


def embed_(student: VisionTransformer, teacher: VisionTransformer, projection, pixels, wanted: Tensor) -> Tensor:
    """Patch embedding, positions and the norm before the blocks; returns the stream that they give."""
    into = projection * teacher.norm_pre.weight
    into = into - into.mean(1, keepdim=True)
    student.patch_embed.weight.copy_((into @ teacher.patch_embed.weight.flatten(1)).view_as(student.patch_embed.weight))
    bias = teacher.patch_embed.bias
    student.patch_embed.bias.copy_(torch.zeros(len(into)) if bias is None else into @ bias)
    student.pos_embed.copy_(teacher.pos_embed @ into.T)
    student.cls_token.copy_(teacher.cls_token @ into.T)
    patches = pixels @ student.patch_embed.weight.flatten(1).T + student.patch_embed.bias + student.pos_embed
    tokens = torch.cat([student.cls_token.expand(len(patches), -1, -1), patches], 1)
    given, wanted = F.layer_norm(tokens, tokens.shape[-1:]).flatten(0, 1), wanted.flatten(0, 1)
    given_mean, wanted_mean = given.mean(0), wanted.mean(0)
    gain = ((given - given_mean) * (wanted - wanted_mean)).mean(0) / given.var(0).clamp_min(1e-6)
    student.norm_pre.weight.copy_(gain)
    student.norm_pre.bias.copy_(wanted_mean - gain * given_mean)
    return student.norm_pre(tokens)


@torch.no_grad()
def cut(options: argparse.Namespace) -> None:
    teacher, fixed = vitreg.load(options.teacher), vitreg.load(options.fixed)
    source, width, depth = teacher.config, options.width, options.depth
    pixels, streams = tokens_of(teacher, options.photographs, options.num_images)
    projection = projection_of(teacher, fixed, [*streams[:depth], streams[-1]], width)
    config = ViTConfig(
        embed_dim=width, depth=depth, num_heads=source.num_heads, mlp_dim=options.hidden, patch_size=source.patch_size,
        image_size=source.image_size, num_registers=0, class_token=True, num_classes=source.num_classes,
        head_bias=False, layer_scale=False, norm_pre=True, activation=source.activation, norm_eps=source.norm_eps,
        preprocess=source.preprocess,
    )  # fmt: skip
    student = VisionTransformer(config)
    scale = (width / source.embed_dim) ** 0.5  # of a token that the student's LayerNorm gives to the teacher's
    tokens = embed_(student, teacher, projection, pixels, streams[0] @ projection.T)
    for number, block in enumerate(student.blocks):
        group = range(number, number + 1 if number + 1 < depth else source.depth)
        blocks = [teacher.blocks[i] for i in group]
        middle = teacher.blocks[group[len(group) // 2]]
        wanted = streams[group[-1] + 1] @ projection.T
        weights = wanted.square().sum(-1).reciprocal().view(-1, 1)
        weights /= weights.mean()
        mixed = cut_attention_(block.attn, middle.attn, middle.norm1, projection, scale, F.layer_norm(tokens, (width,)))
        after = wanted
        if len(group) == 1:
            stream = streams[number]
            after = torch.cat([part + middle.attn(middle.norm1(part)) for part in stream.split(32)]) @ projection.T
        tokens = tokens + fit_(block.attn.proj, mixed, after - tokens, weights)
        neurons = [[unit for at, unit in fixed.config.register_neurons if at == i] for i in group]
        hidden = cut_hidden_(block.mlp, blocks, neurons, projection, scale, F.layer_norm(tokens, (width,)), weights)
        tokens = tokens + fit_(block.mlp.fc2, hidden, wanted - tokens, weights)
        cosine = F.cosine_similarity(tokens, wanted, dim=-1).mean()
        print(f"block {number}, of the teacher's {group[0]} to {group[-1]}: cosine of tokens {cosine:.3f}", flush=True)
    output = F.normalize(teacher.head(teacher.norm(streams[-1][:, 0])), dim=-1)
    pooled = F.layer_norm(tokens[:, 0], (width,))
    gram = pooled.T @ pooled + 0.1 * torch.eye(width)
    student.head.weight.copy_(torch.linalg.solve(gram, pooled.T @ output).T)
    options.out.mkdir(parents=True, exist_ok=True)
    vitreg.save(student.eval(), options.out / "start.safetensors")
    save_file({"projection": projection}, options.out / "projection.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("photographs")
    parser.add_argument(
        "--fixed", required=True, help="the teacher after `vitreg fix`, which names its register neurons"
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    torch.manual_seed(0)
    cut(parser.parse_args())
