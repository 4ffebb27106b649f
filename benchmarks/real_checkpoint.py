"""Are we the same model as timm's, on real weights and real photographs?

    python benchmarks/real_checkpoint.py WEIGHTS.safetensors PHOTOGRAPHS

Sorted file names are taken as ImageNet-1k classes (one photograph per class) where there are 1000 of them.
"""

import argparse
from pathlib import Path

import timm
import torch

import vitreg
from vitreg.images import find_images, read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("photographs", type=Path)
    args = parser.parse_args()
    ours = vitreg.load(args.weights)
    peer = timm.create_model(ours.config.architecture, checkpoint_path=str(args.weights)).eval()
    preprocess = ours.preprocess
    transform = timm.data.create_transform(
        input_size=(3, *preprocess.size),
        mean=preprocess.mean,
        std=preprocess.std,
        interpolation=preprocess.interpolation,
        crop_pct=preprocess.crop_pct,
    )
    paths = find_images(args.photographs)
    worst, right_ours, right_peer = 0.0, 0, 0
    for start in range(0, len(paths), 32):
        images = [read_image(path) for path in paths[start : start + 32]]
        theirs = torch.stack([transform(image) for image in images])
        labels = torch.arange(start, start + len(images))
        with torch.inference_mode():
            expected = peer(theirs)
            worst = max(worst, float((ours.classify(theirs) - expected).abs().max()))
            logits = ours.classify(torch.stack([preprocess(image) for image in images]))
        right_ours += int((logits.argmax(1) == labels).sum())
        right_peer += int((expected.argmax(1) == labels).sum())
    print(f"{len(paths)} photographs; largest difference of a logit on the same input: {worst:.1e}")
    print(f"top-1 with our preprocessing: {right_ours / len(paths):.4f}, timm: {right_peer / len(paths):.4f}")


if __name__ == "__main__":
    main()
