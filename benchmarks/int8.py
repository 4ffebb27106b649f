"""W8A8: what 8-bit weights and activations leave of a model and of its fixes, by k-NN.

    python benchmarks/int8.py --data tiny-imagenet-100 --models augreg_vit_ti16 fixed.safetensors ...

Each model is exported to ONNX, and quantized by onnxruntime's `quantize_dynamic`: weights to 8 bits for each channel,
what enters a matrix product to 8 bits by its range in the one image. An artifact widens that range for all tokens. The
class token (or the mean of the patches) of the training images votes on that of the others: 20 neighbors, by cosine,
weighed by `exp(cosine / 0.07)`. Differences are paired, in percentage points, with 95 % bootstrap intervals.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic

import vitreg
from vitreg.images import ImageStream, Subset, open_split, spaced_indices

DRAWS = 10_000


def features(path: Path, images: list[torch.Tensor]) -> torch.Tensor:
    """Of every image alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = "cls" if "cls" in [output.name for output in session.get_outputs()] else "patches"
    found = [torch.from_numpy(session.run([name], {"images": image[None].numpy()})[0]) for image in images]
    return torch.cat([one if one.ndim == 2 else one.mean(1) for one in found])


def right(train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which of the validation images k-NN gets right."""
    nearest = (F.normalize(val, dim=-1) @ F.normalize(train, dim=-1).T).topk(20)
    votes = torch.zeros(len(val), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[nearest.indices], (nearest.values / 0.07).exp())
    return (votes.argmax(1) == labels).float()


def told(values: torch.Tensor, *, sign: bool = False) -> str:
    draws = values[torch.randint(len(values), (DRAWS, len(values)))].mean(1).quantile(torch.tensor([0.025, 0.975]))
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if sign else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * float(value) for value in (values.mean(), *draws)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--num-images", type=int, default=1000, help="to learn from, and as many to judge by")
    given = parser.parse_args()
    torch.manual_seed(0)
    sets = [Subset(part, spaced_indices(len(part), given.num_images)) for part in open_split(given.data) if part]
    before: torch.Tensor | None = None
    columns = ("model", "fp32, %", "int8, %", "int8 - fp32", "int8 - int8 of the first", "MB, fp32 and int8")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model in given.models:
        vit = vitreg.load(model).float()
        read = [list(ImageStream(part, vit.preprocess, batch_size=64)) for part in sets]
        images = [[image for batch in part for image in batch.images] for part in read]
        labels = [torch.tensor([part.labels[i] for i in range(len(part))]) for part in sets]
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"]
            vitreg.export(vit, paths[0])
            quantize_dynamic(paths[0], paths[1], weight_type=QuantType.QInt8, per_channel=True)
            megabytes = " ".join(f"{path.stat().st_size / 1e6:.1f}" for path in paths)
            full, eight = (
                right(features(path, images[0]), labels[0], features(path, images[1]), labels[1]) for path in paths
            )
        before = eight if before is None else before
        differences = (told(eight - other, sign=True) for other in (full, before))
        row = (Path(model).stem, told(full), told(eight), *differences, megabytes)
        print(f"| {' | '.join(row)} |", flush=True)
