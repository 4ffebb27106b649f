"""How small a ViT, and how short a training, shows artifacts? The runs of docs/emergence.md.

    python benchmarks/emergence.py train RUN --data tiny-imagenet-100 [--width 64] [--depth 12] ... [--registers 0]
    python benchmarks/emergence.py table RUN ...
    python benchmarks/emergence.py evaluate RUN ... --data tiny-imagenet-100 [--plant] [--fix] [--json FILE]
    python benchmarks/emergence.py plot FILE --out IMAGE

`train` is the supervised recipe (deit3: cross-entropy, crops and flips) with the levers as options, on one thread, so
that several runs share a machine; a run that was interrupted goes on with the same command. `table` prints a line of
Markdown for every run, from its folder. `evaluate` diagnoses the trained model on all held-out images; with --plant,
a copy with planted artifacts too; with --fix, the model, or that copy, with a test-time register. `plot` draws what it
wrote of models with several numbers of registers.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Literal

import torch

import vitreg
from vitreg.artifacts import plant_artifacts
from vitreg.images import ImageStream, open_split
from vitreg.model import Preprocess, ViTConfig
from vitreg.training import resume, train
from vitreg.training.engine.config import OptimizerConfig, TrainingConfig
from vitreg.training.recipes.deit3 import DeiT3Config

SIDE = 64
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Levers:
    """What a run may differ in; the defaults are the setting of the small pair."""

    width: int = 64
    depth: int = 8
    heads: int = 4
    patch: int = 8
    class_token: bool = False
    pool: Literal["token", "mean", "attention"] = "mean"
    norm_pre: bool = False
    layer_scale: float = 1e-4  # 0: none
    pixel_std: float = 1.0
    crop: float = 0.5
    lr: float = 1e-3
    weight_decay: float = 0.02
    beta2: float = 0.99
    batch_size: int = 16
    steps: int = 8000
    registers: int = 0
    seed: int = 0

    def config(self) -> TrainingConfig:
        """The training run."""
        side = (SIDE, SIDE)
        model = ViTConfig(
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_dim=4 * self.width,
            patch_size=self.patch,
            image_size=side,
            num_registers=self.registers,
            class_token=self.class_token,
            pool=self.pool,
            pool_heads=self.heads if self.pool == "attention" else 0,
            norm_pre=self.norm_pre,
            layer_scale=self.layer_scale > 0,
            num_classes=100,
            preprocess=Preprocess(
                mean=(0.5,) * 3, std=(self.pixel_std,) * 3, size=side, crop_pct=1.0, multiple_of=self.patch
            ),
        )
        return TrainingConfig(
            recipe="deit3",
            model=model,
            method=DeiT3Config(
                loss="ce",
                smoothing=0.1,
                mixup=0.0,
                cutmix=0.0,
                three_augment=False,
                color_jitter=0.0,
                min_crop=self.crop,
            ),
            optimizer=OptimizerConfig(
                lr=self.lr, warmup_steps=500, weight_decay=self.weight_decay, beta2=self.beta2, clip_norm=1.0
            ),
            num_steps=self.steps,
            batch_size=self.batch_size,
            layer_scale=self.layer_scale or 1.0,
            seed=self.seed,
            log_every=100,
            checkpoint_every=1000,
            diagnose_every=2000,
        )


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    out = Path(args.run)

    def tell(line: dict) -> None:
        if "blocks" in line:
            last = line["blocks"][-1]
            top1 = line["metrics"]["top1"]
            print(f"step {line['step']}: top-1 {top1:.1f}, largest norm {last['max'] / last['median']:.1f} medians")

    if any(out.glob("checkpoints/step-*")):
        resume(out, device="cpu", num_workers=0, on_log=tell)
        return
    levers = Levers(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Levers)})
    train(levers.config(), args.data, out, device="cpu", num_workers=0, on_log=tell)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(args: argparse.Namespace) -> None:
    head = "run|pixels/patch|width x depth|head reads|LayerScale|lr|weight decay|registers|seed|steps x batch|minutes"
    head += "|top-1 %|largest/median norm by block|outliers %"
    print(f"| {head.replace('|', ' | ')} |\n|{'---|' * (head.count('|') + 1)}")
    for folder in map(Path, args.runs):
        config, seen = (
            json.loads((folder / "config.json").read_text(encoding="utf-8")),
            lines(folder / "diagnosis.jsonl")[-1],
        )
        model, optimizer = config["model"], config["optimizer"]
        speeds = [line["images_per_second"] for line in lines(folder / "log.jsonl") if "images_per_second" in line]
        minutes = seen["images"] / statistics.median(speeds) / 60
        reads = model["pool"] if model["pool"] != "token" else "class token"
        ratios = " ".join(f"{block['max'] / block['median']:.1f}" for block in seen["blocks"])
        cells = [
            folder.name,
            f"{model['image_size'][0]}/{model['patch_size']}",
            f"{model['embed_dim']} x {model['depth']}",
            reads + (", first norm" if model["norm_pre"] else ""),
            f"{config['layer_scale']:g}" if model["layer_scale"] else "-",
            f"{optimizer['lr']:g}",
            f"{optimizer['weight_decay']:g}",
            model["num_registers"],
            config["seed"],
            f"{seen['step']} x {config['batch_size']}",
            f"{minutes:.0f}",
            f"{seen['metrics']['top1']:.1f}",
            ratios,
            f"{100 * seen['outlier_fraction']:.2f}",
        ]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


@torch.inference_mode()
def top1(vit: vitreg.VisionTransformer, held_out) -> float:
    right = 0
    for batch in ImageStream(held_out, vit.preprocess, batch_size=100):
        labels = torch.tensor([held_out.labels[i] for i in batch.numbers])
        right += int((vit.classify(batch.images).argmax(-1) == labels).sum())
    return 100 * right / len(held_out)


@torch.inference_mode()
def attention(vit: vitreg.VisionTransformer, images: torch.Tensor) -> dict[str, float]:
    """Shares of the attention of all blocks, heads and queries: of the patch that gets most, and of all registers."""
    patches = images.shape[-1] // vit.config.patch_size
    most, registers = [], []
    for batch in images.split(50):
        rows = vit.trace(batch, attention_from=list(range(patches**2))).attention
        assert rows is not None
        most.append(rows.to_patches.mean((2, 3)).flatten(-2).amax(-1).mean())
        if vit.num_registers:
            registers.append(rows.to_registers.sum(-1).mean())
    return {
        "most_attended_patch": float(torch.stack(most).mean()),
        "registers": float(torch.stack(registers).mean()) if registers else 0.0,
    }


def evaluate(args: argparse.Namespace) -> None:
    held_out = open_split(args.data)[1]
    assert held_out is not None, f"{args.data} has no val part"
    found = []
    for source in args.models:
        vit = vitreg.load(source)
        images = torch.cat([batch.images for batch in ImageStream(held_out, vit.preprocess, batch_size=100)])
        models = {source: vit}
        if args.plant:
            vit = plant_artifacts(vit, images[:: len(images) // 100])
            models[vit.config.name] = vit
        if args.fix:
            fixed = vitreg.add_test_time_registers(vit, images[:: len(images) // 500])
            models[fixed.config.name] = fixed
        for name, model in models.items():
            seen = vitreg.diagnose(model, images, max_examples=0)
            onward = [block.outlier_fraction for block in seen.blocks[seen.onset_block or 0 :]]
            found.append(
                {
                    "model": name,
                    "registers": model.num_registers,
                    "images": seen.num_images,
                    "top1": top1(model, held_out),
                    "has_artifacts": seen.has_artifacts,
                    "onset_block": seen.onset_block,
                    "outlier_fraction": {"least": min(onward), "largest": max(onward)},
                    "norms": [[block.median, block.p99, block.max] for block in seen.blocks],
                    "register_norms": None if seen.register_norms is None else seen.register_norms[-1].tolist(),
                    "attention_on_outliers": seen.blocks[-1].attention_on_outliers,
                    "attention": attention(model, images[::10]),
                }
            )
            print(f"{name}: top-1 {found[-1]['top1']:.2f}; {seen.verdict[0]}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def plot(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    found = sorted(json.loads(Path(args.found).read_text(encoding="utf-8")), key=lambda row: row["registers"])
    panels = {
        "outliers after the last block (% of patches)": lambda row: 100 * row["outlier_fraction"]["largest"],
        "largest norm after the last block (medians)": lambda row: row["norms"][-1][2] / row["norms"][-1][0],
        "top-1 (%)": lambda row: row["top1"],
        "attention (%)": lambda row: 100 * row["attention"]["most_attended_patch"],
    }
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        at = range(len(found))
        values = [value(row) for row in found]
        axes.plot(at, values, "o-", label="most attended patch")
        if title.startswith("attention"):
            axes.plot(at, [100 * row["attention"]["registers"] for row in found], "s-", label="all registers")
            axes.legend(fontsize=8)
        axes.set_xticks(at, [row["registers"] for row in found])
        axes.set_xlabel("registers")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 1.1 * max(values) or 1.0)
        axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train")
    command.add_argument("run")
    command.add_argument("--data", required=True)
    for field in dataclasses.fields(Levers):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            command.add_argument(flag, action="store_true")
        else:
            command.add_argument(flag, type=type(field.default), default=field.default)
    command.set_defaults(do=run)
    command = commands.add_parser("table")
    command.add_argument("runs", nargs="+")
    command.set_defaults(do=table)
    command = commands.add_parser("evaluate")
    command.add_argument("models", nargs="+")
    command.add_argument("--data", required=True)
    command.add_argument("--plant", action="store_true")
    command.add_argument("--fix", action="store_true")
    command.add_argument("--json")
    command.set_defaults(do=evaluate)
    command = commands.add_parser("plot")
    command.add_argument("found")
    command.add_argument("--out", required=True)
    command.set_defaults(do=plot)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
