"""Is our logistic regression as good as scikit-learn's, and how much faster? Both on the same rows, in one process.

    python benchmarks/logistic.py IMAGES --model NAME [--store FOLDER] [--rows 100000] [--C 0.001 0.1] [--repeats 3]
    python benchmarks/logistic.py --synthetic

IMAGES: what `open_image_set` opens, with labels. A row is a random patch token of the last two blocks, concatenated,
with the label of its image; patches of every sixth image are the test set. `--synthetic` has rows of as many
columns whose scales differ as much. Times are of interleaved fits, without warm start.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from timing import machine, median_ratio, seconds
from torch import Tensor

import vitreg
from vitreg.images import Subset, open_image_set, spaced_indices
from vitreg.probes import FeaturesConfig, extract
from vitreg.probes.heads.logistic import fit_logistic

Rows = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--store", type=Path, help="keep the features here, and use them again")
    parser.add_argument("--num-images", type=int, default=12000)
    parser.add_argument("--rows", type=int, default=100000)
    parser.add_argument("--C", type=float, nargs="+", default=[1e-3, 1e-1])
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--synthetic", action="store_true")
    args = parser.parse_args()
    if args.synthetic:
        (x, y), (test_x, test_y) = synthetic(args.rows, 384, 100)
    elif args.folder is None or args.model is None:
        parser.error("give IMAGES and --model, or --synthetic")
    else:
        with tempfile.TemporaryDirectory() as folder:
            (x, y), (test_x, test_y) = patch_rows(args, args.store or Path(folder) / "store")
    num_classes = int(y.max()) + 1
    print(f"{machine()}; {len(x)} rows of {x.shape[1]}, {num_classes} classes, {len(test_x)} test rows")
    # The fits that run into rounding before the tolerance say so.
    warnings.filterwarnings("ignore", module="sklearn")
    for C in args.C:
        compare(C, args.tolerance, args.repeats, (x, y), (test_x, test_y))


def compare(C: float, tolerance: float, repeats: int, train: Rows, test: Rows) -> None:
    x, y = train
    fitted = {}

    def ours() -> None:
        fitted["vitreg"] = fit_logistic(x, y, int(y.max()) + 1, C=C, tolerance=tolerance)

    def theirs() -> None:
        fitted["scikit-learn"] = LogisticRegression(C=C, tol=tolerance, max_iter=1000).fit(x.numpy(), y.numpy())

    runs = {"vitreg": ours, "scikit-learn": theirs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 else -1]:
            times[name].append(seconds(runs[name]))
    predicted = {
        "vitreg": fitted["vitreg"].predict(test[0]),
        "scikit-learn": torch.from_numpy(fitted["scikit-learn"].predict(test[0].numpy())),
    }
    accuracies = {name: 100 * (found == test[1]).double().mean().item() for name, found in predicted.items()}
    iterations = {"vitreg": fitted["vitreg"].num_iterations, "scikit-learn": int(fitted["scikit-learn"].n_iter_[0])}
    print(f"C = {C:g}, tolerance {tolerance:g}")
    for name, found in times.items():
        print(
            f"  {name}: {statistics.median(found):.1f} s ({min(found):.1f} to {max(found):.1f}), "
            f"{iterations[name]} iterations, accuracy {accuracies[name]:.2f} %"
        )
    print(f"  times as fast: {median_ratio(times['scikit-learn'], times['vitreg']):.2f}")
    print(f"  accuracy, ours - theirs: {accuracies['vitreg'] - accuracies['scikit-learn']:+.2f} points", flush=True)


def patch_rows(args: argparse.Namespace, store: Path) -> tuple[Rows, Rows]:
    """Random patches of training images, and of the others."""
    vit = vitreg.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    images = open_image_set(args.folder)
    images = Subset(images, np.asarray(spaced_indices(len(images), min(args.num_images, len(images)))))
    features = extract(vit, images, store, FeaturesConfig(blocks=(-2, -1)))
    test = torch.arange(features.num_images) % 6 == 0
    each = -(-args.rows // int((~test).sum()))
    torch.manual_seed(0)
    lots = torch.rand(features.num_images, features.grid[0] * features.grid[1])
    chosen = lots.argsort(1)[:, :each]
    columns: list[Tensor] = []
    for block in features.blocks:
        parts = [patches[torch.arange(len(rows))[:, None], chosen[rows]] for rows, patches in features.patches(block)]
        columns.append(torch.cat(parts))
    x, labels = torch.cat(columns, 2), features.labels
    assert labels is not None
    y = labels[:, None].expand(-1, each)
    return (
        (x[~test].flatten(0, 1)[: args.rows].contiguous(), y[~test].flatten()[: args.rows].contiguous()),
        (x[test].flatten(0, 1), y[test].flatten()),
    )


def synthetic(rows: int, width: int, num_classes: int) -> tuple[Rows, Rows]:
    """Overlapping classes whose columns are mixed, of scales from 3 to 0.03, and off the origin."""
    torch.manual_seed(0)
    mix = torch.linalg.qr(torch.randn(width, width)).Q * torch.logspace(0.5, -1.5, width)[:, None]
    mix = mix @ torch.linalg.qr(torch.randn(width, width)).Q
    means, offset = 0.15 * torch.randn(num_classes, width), torch.randn(width)
    y = torch.randint(num_classes, (rows + rows // 5,))
    x = (means[y] + torch.randn(len(y), width)) @ mix + offset
    return (x[:rows], y[:rows]), (x[rows:], y[rows:])


if __name__ == "__main__":
    main()
