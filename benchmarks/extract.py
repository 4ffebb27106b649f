"""Does the feature pass keep the model busy? `extract` against the bare forward on preloaded batches.

    python benchmarks/extract.py IMAGES --model NAME [--dtype bfloat16] [--num-images 1000] [--tars] [--repeats 5]
    python benchmarks/extract.py --schedule 10000
    python benchmarks/extract.py --sizes

IMAGES: what `open_image_set` opens. Throughput is the pass's, with decoding and writing, as a share of the forward's,
the median of interleaved runs; every pass writes a new store, with all tokens of the last block. `--tars` packs the
files into tars first. `--schedule` is what so many shards of next to no work cost; `--sizes` prints the table of sizes
in docs/scale.md.
"""

import argparse
import io
import resource
import statistics
import tarfile
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import interleaved, machine

import vitreg
from vitreg.common.memory import keep_freed_memory
from vitreg.common.words import size_in_words
from vitreg.images import Subset, open_image_set
from vitreg.probes import FeaturesConfig, extract

TOKENS = ("cls", "registers", "patches", "mean")
IMAGES_A_TAR = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--core-time", action="store_true", help="instead of the wall clock (set OMP_NUM_THREADS=1)")
    parser.add_argument("--tars", action="store_true")
    parser.add_argument("--schedule", type=int)
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args()
    print(machine())
    if args.sizes:
        sizes()
    elif args.schedule:
        schedule(args.schedule)
    else:
        throughput(args)


def throughput(args: argparse.Namespace) -> None:
    keep_freed_memory()  # as the commands do
    vit = vitreg.load(
        args.model, device="cuda" if torch.cuda.is_available() else "cpu", dtype=getattr(torch, args.dtype)
    )
    device, images = next(vit.parameters()).device, open_image_set(args.folder)
    images = Subset(images, np.arange(min(args.num_images, len(images))))
    config = FeaturesConfig(tokens=TOKENS, norm_blocks=(-1,))
    pixels = torch.stack([vit.preprocess.pixels(images.image(i)) for i in range(len(images))])
    preloaded = [
        vit.preprocess.normalize(batch.to(device)).to(vit.patch_embed.weight.dtype)
        for batch in pixels.split(args.batch_size)
    ]
    del pixels

    def forward() -> None:
        with torch.inference_mode():
            for batch in preloaded:
                vit(batch)

    def trace() -> None:
        with torch.inference_mode():
            for batch in preloaded:
                vit.trace(batch, blocks=(-1,), hidden=True)

    with tempfile.TemporaryDirectory() as folder:
        number, source = count(), images
        if args.tars:
            source = Path(folder) / "tars"
            pack(images, source)

        def features() -> None:
            extract(vit, source, Path(folder) / str(next(number)), config, batch_size=args.batch_size)

        clock = time.process_time if args.core_time else time.perf_counter
        times = interleaved({"forward": forward, "trace": trace, "features": features}, args.repeats, clock)
        size = sum(file.stat().st_size for file in (Path(folder) / "0").rglob("*"))
    for name, seconds in times.items():
        print(f"{name}: {len(images) / statistics.median(seconds):.1f} images/s")
    for name in ("trace", "features"):
        shares = [f / s for f, s in zip(times["forward"], times[name], strict=True)]
        print(
            f"throughput of {name} / forward: {statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
        )
    print(f"size of the store: {size / 1e6:.0f} MB; {high_water()}")


def pack(images: Subset, folder: Path) -> None:
    folder.mkdir()
    for first in range(0, len(images), IMAGES_A_TAR):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as archive:
            for i in range(first, min(first + IMAGES_A_TAR, len(images))):
                archive.add(images.name(i), f"{i:06d}{Path(images.name(i)).suffix}")


def schedule(num_shards: int) -> None:
    """A tar of one image of a patch a shard, and a model of a block of eight channels."""
    config = vitreg.ViTConfig(
        embed_dim=8, depth=1, num_heads=1, mlp_dim=8, patch_size=16, image_size=(16, 16),
        preprocess=vitreg.Preprocess(size=(16, 16), crop_pct=1.0), name="next to nothing",
    )  # fmt: skip
    vit, buffer = vitreg.VisionTransformer(config), io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tars").mkdir()
        for i in range(num_shards):
            with tarfile.open(Path(folder) / "tars" / f"{i:06d}.tar", "w") as archive:
                info = tarfile.TarInfo("a.png")
                info.size = buffer.getbuffer().nbytes
                archive.addfile(info, io.BytesIO(buffer.getvalue()))
        told: dict[int, str] = {}

        def on_progress(done: int, _: int | None) -> None:
            if done in (num_shards // 10, num_shards):
                told[done] = f"{high_water()} after {done}"

        start, core = time.perf_counter(), time.process_time()
        extract(vit, Path(folder) / "tars", Path(folder) / "store", tokens=("cls",), on_progress=on_progress)
        core, seconds, start = time.process_time() - core, time.perf_counter() - start, time.perf_counter()
        store = vitreg.open_store(Path(folder) / "store")
        opened, start = time.perf_counter() - start, time.perf_counter()
        vitreg.probes.diagnose_store(Path(folder) / "store")
        diagnosed = time.perf_counter() - start
    rate, of_core = 60 * num_shards / seconds, 60 * num_shards / core
    print(f"{len(store)} shards: {rate:.0f} a minute, {of_core:.0f} in a minute of core time")
    print("; ".join(told.values()))
    print(f"opened in {opened:.1f} s, diagnosed in {diagnosed:.1f} s")


def sizes() -> None:
    """Of stores of ViT-S, B and L with patches of 14 pixels at 224."""
    kept = {"`cls`": ("cls",), "`cls mean`": ("cls", "mean"), "all tokens": TOKENS}
    print("| model | kept | 1 image | 1 M | 100 M | 5 B |\n|---|---|---|---|---|---|")
    for name, dim, depth in (("S/14", 384, 12), ("B/14", 768, 12), ("L/14", 1024, 24)):
        config = vitreg.ViTConfig(
            embed_dim=dim, depth=depth, num_heads=dim // 64, mlp_dim=4 * dim, patch_size=14, image_size=(224, 224),
        )  # fmt: skip
        for words, tokens in kept.items():
            of = [
                FeaturesConfig(tokens=tokens, norm_blocks=(-1,)).num_bytes(config, vitreg.Preprocess(), number)
                for number in (1, 10**6, 10**8, 5 * 10**9)
            ]
            print(f"| {name} | {words} | {' | '.join(map(size_in_words, of))} |")


def high_water() -> str:
    return f"high water {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


if __name__ == "__main__":
    main()
