"""The pair of the package: packed from two runs of `vitreg train distill`, and held against their teacher.

    python benchmarks/distilled.py decide RUN0 PHOTOGRAPHS --out decided.safetensors
    python benchmarks/distilled.py pack decided.safetensors RUN4 --out src/vitreg/checkpoints/bundled
    python benchmarks/distilled.py agreement TEACHER PHOTOGRAPHS --models vitreg_tiny vitreg_tiny_reg4 [--json FILE]

A student that is not sure whether a patch is an outlier gives it a norm in between, so that its norms have a long tail
where its teacher's have two modes. `decide` teaches it its own decision: patches above `--cut` medians after the last
block get at least `--above` medians after the last two blocks, the others at most `--below`; all else stays as it was.

`agreement` tells, of the patches that are outliers after the last block, how many of a student's are its teacher's
(precision) and how many of the teacher's are the student's (recall), with 95 % bootstrap intervals over images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from evidence import said
from timing import machine
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

import vitreg
from vitreg.images import Batches, read_image

NAMES = ("vitreg_tiny", "vitreg_tiny_reg4")


def decide(options: argparse.Namespace) -> None:
    """From here on the student is its own teacher."""
    torch.manual_seed(0)
    vit, before = vitreg.load(options.student), vitreg.load(options.student).requires_grad_(False)
    crop = v2.RandomResizedCrop(vit.preprocess.size, scale=(0.08, 0.5), interpolation=v2.InterpolationMode.BICUBIC)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip()])
    paths = sorted(Path(options.photographs).iterdir())
    optimizer = torch.optim.AdamW(vit.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.1)
    blocks = [vit.config.depth - 2, vit.config.depth - 1]
    for step in range(options.steps):
        chosen = [paths[i] for i in torch.randint(len(paths), (32,)).tolist()]
        images = torch.stack([vit.preprocess.normalize(pil_to_tensor(augment(read_image(path)))) for path in chosen])
        with torch.no_grad():
            old = before.trace(images, patches=True)
            norms = old.patches.norm(dim=-1)
            medians = norms.flatten(1).median(1).values[:, None, None]
            outliers = norms[-1] > options.cut * medians[-1]
            lowest = torch.where(outliers, options.above, 0.0) * medians[blocks]
            highest = torch.where(outliers, torch.inf, options.below) * medians[blocks]
            wanted = norms[blocks].clamp(lowest, highest)
        new = vit.trace(images, patches=True)
        kept = 1 - F.cosine_similarity(new.patches, old.patches, dim=-1).mean()
        kept = kept + 1 - F.cosine_similarity(vit.head(new.tokens.cls), before.head(old.tokens.cls), dim=-1).mean()
        norm = F.mse_loss(new.patches[blocks].norm(dim=-1).log(), wanted.log())
        early = F.mse_loss(new.patches[: blocks[0]].norm(dim=-1).log(), norms[: blocks[0]].log())
        optimizer.zero_grad()
        (kept + 5 * (norm + early)).backward()
        torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"{step}: norm {float(norm.detach()):.4f}, kept {float(kept.detach()):.4f}", flush=True)
    vitreg.save(vit.eval(), options.out)


def pack(options: argparse.Namespace) -> None:
    """In half precision, under the names of the package."""
    for source, name in zip(options.runs, NAMES, strict=True):
        vit = vitreg.load(source).half()
        vit.config = dataclasses.replace(vit.config, name=name)
        vitreg.save(vit, options.out / f"{name}.safetensors")


@torch.inference_mode()
def outliers(vit: vitreg.VisionTransformer, diagnosis: vitreg.Diagnosis, photographs: str) -> torch.Tensor:
    """Which patches are above the threshold after the last block, `[N, h, w]`."""
    dtype = next(vit.parameters()).dtype
    batches = Batches(photographs, vit.preprocess, batch_size=32)
    norms = torch.cat([vit.trace(images.to(dtype), blocks=[-1]).patch_norms[-1] for images, _ in batches])
    threshold = diagnosis.blocks[-1].threshold
    return norms >= (float("inf") if threshold is None else threshold)


def agreement(options: argparse.Namespace) -> None:
    """Verdict, norms, attention on outliers by block, and the places they share with the teacher's."""
    found, wanted = [], None
    for name in (options.teacher, *options.models):
        vit = vitreg.load(name, dtype=getattr(torch, options.dtype))
        diagnosis = vitreg.diagnose(vit, options.photographs, max_examples=0)
        own = outliers(vit, diagnosis, options.photographs)
        wanted = own if wanted is None else wanted
        shared, own_count, wanted_count = (of.double().sum((1, 2)) for of in (own & wanted, own, wanted))
        entry = {
            "model": name,
            "verdict": diagnosis.verdict[0],
            "onset_block": diagnosis.onset_block,
            "outliers_%": [round(100 * block.outlier_fraction, 2) for block in diagnosis.blocks],
            "largest_over_median": [round(block.max / block.median, 2) for block in diagnosis.blocks],
            "attention_on_outliers_%": [
                None if block.attention_on_outliers is None else round(100 * block.attention_on_outliers, 2)
                for block in diagnosis.blocks
            ],
            "most_frequent_place_%": round(100 * float(diagnosis.position_frequency.max()), 1),
        }
        if own.any():
            entry["precision"] = said(torch.stack([shared, own_count], 1).numpy(), None)
            entry["recall"] = said(torch.stack([shared, wanted_count], 1).numpy(), None)
        found.append(entry)
        print(json.dumps(entry, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "models": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("decide")
    command.add_argument("student")
    command.add_argument("photographs")
    command.add_argument("--cut", type=float, default=2.0)
    command.add_argument("--above", type=float, default=4.5)
    command.add_argument("--below", type=float, default=1.3)
    command.add_argument("--steps", type=int, default=100)
    command.add_argument("--lr", type=float, default=6e-5)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=decide)
    command = commands.add_parser("pack")
    command.add_argument("runs", nargs=2)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(do=pack)
    command = commands.add_parser("agreement")
    command.add_argument("teacher")
    command.add_argument("photographs")
    command.add_argument("--models", nargs="+", required=True)
    command.add_argument("--dtype", default="float32")
    command.add_argument("--json", type=Path)
    command.set_defaults(do=agreement)
    options = parser.parse_args()
    options.do(options)
