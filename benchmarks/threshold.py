"""How often is the automatic threshold wrong? Planted outliers, and clean models on several kinds of images.

    python benchmarks/threshold.py PHOTOGRAPHS [--num-images 24]
    python benchmarks/threshold.py PHOTOGRAPHS --models MODEL ... --num-images 100

Planted: in randomly initialized models of several families, tokens of random patches are scaled after a block to a
multiple of the median norm. Recall and precision are of the planted patches, over all runs of a row. Clean: the same
families untouched, as initialized and with every parameter perturbed; an alarm is a diagnosis that does not deny them.

With `--models`: what is said of these when they are shown a few photographs: 100 draws of 1, 2, 4, ... out of so many.
"""

import argparse
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch

import vitreg
from vitreg.artifacts import two_modes
from vitreg.artifacts.decision import EVIDENT, decide
from vitreg.artifacts.histogram import NUM_BINS, LogAxis
from vitreg.images import Batches, find_images, read_image

FAMILIES = (
    "vit_small_patch16_224",
    "vit_base_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3_qkvb",
    "deit3_small_patch16_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "eva02_tiny_patch14_224",
)
RATIOS, FRACTIONS = (3, 5, 10, 30), (0.001, 0.005, 0.02, 0.05)
NUM_SHOWN, NUM_DRAWS = (1, 2, 4, 8, 16, 32, 64, 100), 100


def random_model(family: str, seed: int, perturb: bool) -> vitreg.VisionTransformer:
    torch.manual_seed(seed)
    model = timm.create_model(family, img_size=224, depth=4)
    if perturb:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) + (0.3 if "gamma" in name else 0.0))
    return vitreg.from_timm(model)


def plant(vit, block: int, ratio: float, planted: torch.Tensor) -> None:
    """Scale the tokens of `planted [B, N]` after a block to `ratio` times the median norm, give or take 10 %."""
    jitter = 1 + 0.1 * (2 * torch.rand(planted.shape) - 1)

    def hook(module, args, output):
        num_prefix = output.shape[1] - planted.shape[1]
        norms = output[:, num_prefix:].norm(dim=-1)
        factor = torch.where(planted, ratio * norms.median() * jitter / norms, 1.0)
        return torch.cat([output[:, :num_prefix], output[:, num_prefix:] * factor.unsqueeze(-1)], dim=1)

    vit.blocks[block].register_forward_hook(hook)


def photographs(folder: Path, num_images: int) -> torch.Tensor:
    preprocess = vitreg.Preprocess(size=(224, 224))
    paths = find_images(folder)
    return torch.stack([preprocess(read_image(path)) for path in spread(paths, num_images)])


def spread(paths: list[Path], num: int) -> list[Path]:
    return paths[:: max(1, len(paths) // num)][:num]


def image_kinds(photos: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawings = torch.full((12, 3, 224, 224), 2.4)
    for image, line in itertools.product(drawings, range(6)):
        row, column = torch.randint(0, 223, (2,), generator=generator).tolist()
        image[:, row] = image[:, :, column] = -2.0 + 0.1 * line
    return {
        "photographs": photos,
        "one photograph": photos[:1],
        "line drawings": drawings,
        "noise": torch.randn((8, 3, 224, 224), generator=generator),
        "uniform colors": torch.randn((8, 3, 1, 1), generator=generator).expand(-1, -1, 224, 224),
    }


def count(axis: LogAxis, norms: torch.Tensor) -> np.ndarray:
    return np.bincount(axis.bins(norms).flatten(), minlength=NUM_BINS)


def said(norms: torch.Tensor) -> str:
    """The status of `diagnose`, from norms `[L, B, h, w]`."""
    axis, flat = LogAxis(), norms.flatten(1)
    decision = decide(axis, np.stack([count(axis, block) for block in flat]), norms.shape[1])
    if decision.undecided is not None:
        return "cannot tell"
    if any(step is not None for step in decision.steps):
        return "artifacts"
    return "clean" if (flat.amax(1) <= EVIDENT * flat.median(1).values).all() else "long tail"


def show_few(models: list[str], paths: list[Path]) -> None:
    print(f"model, photographs: of {NUM_DRAWS} draws out of {len(paths)}")
    for name in models:
        vit = vitreg.load(name).eval()
        with torch.inference_mode():
            norms = torch.cat([vit.trace(batch).patch_norms for batch, _ in Batches(paths, vit.preprocess)], dim=1)
        for num in (num for num in NUM_SHOWN if num < len(paths)):
            rng = np.random.default_rng(num)
            draws = [[i] if num == 1 else rng.choice(len(paths), num, replace=False) for i in range(NUM_DRAWS)]
            counted = Counter(said(norms[:, draw]) for draw in draws)
            print(f"{vit.config.name}, {num}: {dict(counted)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--num-images", type=int, default=24)
    parser.add_argument("--models", nargs="+", default=[], help="as vitreg.load takes them")
    args = parser.parse_args()
    if args.models:
        show_few(args.models, spread(find_images(args.photographs), args.num_images))
        return
    photos = photographs(args.photographs, args.num_images)

    print("planted\nratio  share    found   recall  precision")
    for ratio, fraction in itertools.product(RATIOS, FRACTIONS):
        found = hits = marked = total = 0
        for seed, family in enumerate(FAMILIES):
            vit = random_model(family, seed, perturb=False)
            grid = 224 // vit.config.patch_size
            planted = torch.rand(len(photos), grid * grid, generator=torch.Generator().manual_seed(seed)) < fraction
            plant(vit, 2, ratio, planted)
            with torch.inference_mode():
                norms = vit.trace(photos).patch_norms[2].flatten(1)
            axis = LogAxis()
            step = two_modes(axis, count(axis, norms))
            found += step is not None
            total += int(planted.sum())
            if step is not None:
                marks = norms >= axis.step_edge(step)
                hits += int((marks & planted).sum())
                marked += int(marks.sum())
        precision = hits / marked if marked else float("nan")
        print(
            f"{ratio:>4} x {fraction:7.1%} {found:>3}/{len(FAMILIES)}   {hits / total:6.4f}  {precision:6.4f}",
            flush=True,
        )

    print("\nclean\nimages          alarms")
    for kind, images in image_kinds(photos).items():
        alarms = runs = 0
        for (seed, family), perturb in itertools.product(enumerate(FAMILIES), (False, True)):
            diagnosis = vitreg.diagnose(random_model(family, seed, perturb), images, max_examples=0)
            alarms += diagnosis.has_artifacts is not False
            runs += 1
        print(f"{kind:<16} {alarms:>3} of {runs}", flush=True)


if __name__ == "__main__":
    main()
