"""What does a test-time register cost, and how long does it take to find its units?

    python benchmarks/test_time_registers.py [--repeats 9] [--size base] [--pixels 518] [--batch 1] [--images FOLDER]

Cost: the forward pass with one register that 20 units of two blocks are moved to, counted once and four times in
attention, against the model without; (N+1)/N is what one more token predicts. Medians of ratios of runs side by side.

Finding (with --images, a folder of photographs, 200 are used): `find_register_neurons` against two plain passes over
the same files, decoding included. Artifacts are written by a planted unit that fires at the corners, so that there is
something to find.
"""

import argparse

import timm
import torch
from timing import interleaved, machine, median_ratio

import vitreg
from vitreg.artifacts import plant_artifacts
from vitreg.images import ImageStream, find_images


def model(name: str, pixels: int, device: str):
    torch.manual_seed(0)
    return vitreg.from_timm(timm.create_model(name, img_size=pixels)).eval().to(device)


def cost(size: str, pixels: int, batch: int, repeats: int, device: str) -> None:
    vit = model(f"vit_{size}_patch14_dinov2", pixels, device)
    middle = vit.config.depth // 2
    units = [(middle + unit % 2, 5 * unit) for unit in range(20)]
    fixed = vitreg.add_test_time_registers(vit, neurons=units)
    weighted = vitreg.VisionTransformer(vitreg.ViTConfig.from_dict(fixed.config.to_dict() | {"register_weight": 4})).to(
        device
    )
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    models = {"without": vit, "one register": fixed, "counted 4 times": weighted.eval()}
    times = interleaved({name: (lambda m=m: m(images)) for name, m in models.items()}, repeats)
    tokens = vit.config.num_prefix_tokens + (pixels // vit.config.patch_size) ** 2
    for name in ("one register", "counted 4 times"):
        print(f"{name} / without: {median_ratio(times[name], times['without']):.3f}")
    print(f"(N+1)/N: {(tokens + 1) / tokens:.4f}")


def finding(name: str, folder: str, repeats: int, device: str) -> None:
    vit = model(name, 224, device)
    paths = find_images([folder])[:200]
    vit = plant_artifacts(vit, next(iter(ImageStream(paths, vit.preprocess, batch_size=32, device=device))).images)

    def two_passes() -> None:
        with torch.inference_mode():
            for _ in range(2):
                for batch in ImageStream(paths, vit.preprocess, batch_size=32, device=device):
                    vit(batch.images)

    found = vitreg.find_register_neurons(vit, paths)
    assert found, "the planted unit wrote no artifacts: nothing was looked for"
    print(f"{name}: finds {len(found)} units, first block {found[0].block} unit {found[0].unit}")
    runs = {"find": lambda: vitreg.find_register_neurons(vit, paths), "two passes": two_passes}
    times = interleaved(runs, repeats)
    ratio = median_ratio(times["find"], times["two passes"])
    print(f"{name}: find / two plain passes over {len(paths)} images: {ratio:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="base")
    parser.add_argument("--pixels", type=int, default=518)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    with torch.inference_mode():
        cost(options.size, options.pixels, options.batch, options.repeats, device)
    if options.images:
        for name in ("vit_tiny_patch16_224", "vit_base_patch16_224"):
            finding(name, options.images, max(1, options.repeats // 3), device)
