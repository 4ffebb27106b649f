"""The commands of the evidence: `vitreg evaluate knn`, `linear`, `segmentation` and the others, and `evaluate all`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from vitreg.disk import replace_text
from vitreg.images import (
    MILLIMETRES,
    DenseSet,
    SegmentationSet,
    image_size,
    open_box_set,
    open_depth,
    open_segmentation,
    open_split,
)
from vitreg.probes.catalogue import PROBES
from vitreg.probes.depth import DepthConfig
from vitreg.probes.evaluation import Data, PassConfig, choose, evaluate, hold_out, safe_name
from vitreg.probes.knn import KNNConfig
from vitreg.probes.linear import LinearConfig
from vitreg.probes.position_fit import PositionConfig
from vitreg.probes.reconstruction import ReconstructionConfig
from vitreg.probes.score import ProbeResult, Score
from vitreg.probes.segmentation import SegmentationConfig
from vitreg.probes.single_token import SingleTokenConfig
from vitreg.probes.summary import Evaluated, summarize
from vitreg.probes.tables import LEGEND, headline_table, markdown, tables, write_csv
from vitreg.probes.text_encoders import has_text_tower
from vitreg.probes.zero_shot import ZeroShotConfig
from vitreg.terminal import INTERRUPTED, Checkpoint, positive, print_json, progress, writable_folder

_SEGMENTATION = {"linear": "segmentation", "+ms": "segmentation-ms"}
_DEPTH = {"lin.1": "depth", "lin.4": "depth-lin4"}
_SHORT_SIDE = {"segmentation": 512, "depth": 480}
"""Of pictures, in pixels, where no size is given: that of the usual crops of ADE20k, and NYUv2's own."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Which models, on how many pictures, and where results go."""

    models: tuple[str, ...]
    """names or files, as for --model; one with registers is compared with the nearest one before it that has fewer"""
    out: Path = Path("vitreg-out/evaluation")
    """folder for results and features; the same command goes on with what is in it"""
    train_images: int | None = None
    """so many training pictures, as many of each class; all by default"""
    val_images: int | None = None
    """so many validation pictures"""
    patch_images: int = 10000
    """keep the patch tokens of so many pictures (5 GB for a ViT-L/14); segmentation and depth keep all"""
    device: str = "auto"
    """cpu, cuda, mps; auto takes a GPU where there is one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """precision of weights and activations"""
    feature_batch_size: int = 32
    """pictures at a time when features are computed"""
    json: bool = False
    """print evaluation.json"""


def evaluate_knn(*, data: str, common: EvaluationOptions, protocol: KNNConfig = KNNConfig()) -> int:
    """Classify pictures by their nearest neighbours among labelled ones: the protocol of DINO and DINOv2.

    Example: vitreg evaluate knn --data imagenet/ --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: labelled pictures: a folder with train/ and val/ and folders for the classes, Parquet, tars; where it is
            not divided, every fifth picture is held out.
        common: models and pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_classification(data)], {"knn": protocol})


def evaluate_linear(*, data: str, common: EvaluationOptions, protocol: LinearConfig = LinearConfig()) -> int:
    """Train DINOv2's grid of linear classifiers: 1 or 4 blocks, mean patch or not, 13 learning rates; the best counts.

    Example: vitreg evaluate linear --data imagenet/ --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: labelled pictures, as for `evaluate knn`.
        common: models and pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_classification(data)], {"linear": protocol})


def evaluate_zero_shot(
    *,
    data: str,
    common: EvaluationOptions,
    class_names: Path | None = None,
    protocol: ZeroShotConfig = ZeroShotConfig(),
) -> int:
    """Classify pictures by sentences about the classes, with the text tower of a CLIP or SigLIP.

    Example: vitreg evaluate zero-shot --data imagenet/ --models open_clip:ViT-B-16/laion2b_s34b_b88k

    Args:
        data: labelled pictures, as for `evaluate knn`.
        common: models and pictures.
        class_names: a file with a name a line, in the order of the classes, where folders are not named by words.
        protocol: the sentences.
    """
    return _run(common, [_classification(data, class_names)], {"zero-shot": protocol})


def evaluate_tokens(*, data: str, common: EvaluationOptions, protocol: SingleTokenConfig = SingleTokenConfig()) -> int:
    """Classify pictures from one token: class token, a normal patch, an outlier, a register (Table 1 of the paper).

    Example: vitreg evaluate tokens --data imagenet/ --models dinov2_vitg14 dinov2_vitg14_reg --train-images 50000

    Args:
        data: labelled pictures, as for `evaluate knn`.
        common: models and pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_classification(data)], {"tokens": protocol})


def evaluate_position(*, data: str, common: EvaluationOptions, protocol: PositionConfig = PositionConfig()) -> int:
    """Ask patches where they are: what normal patches and outliers know of their place (Figure 5b, Table 5).

    Example: vitreg evaluate position --data imagenet/ --models dinov2_vitg14 --train-images 5000 --val-images 1000

    Args:
        data: pictures, as for `evaluate knn`; labels are not needed.
        common: models and pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_classification(data)], {"position": protocol})


def evaluate_reconstruction(
    *,
    data: str,
    common: EvaluationOptions,
    protocol: ReconstructionConfig = ReconstructionConfig(),
) -> int:
    """Ask patches for their pixels: what normal patches and outliers hold of the picture (Figure 5b, Table 5).

    Example: vitreg evaluate reconstruction --data imagenet/ --models dinov2_vitg14 --train-images 5000

    Args:
        data: pictures, as for `evaluate knn`; labels are not needed.
        common: models and pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_classification(data)], {"reconstruction": protocol})


def evaluate_segmentation(
    *,
    data: str,
    common: EvaluationOptions,
    size: tuple[int, int] | None = None,
    ignore: int | None = None,
    variant: Literal["linear", "+ms"] = "linear",
    protocol: SegmentationConfig = SegmentationConfig(),
) -> int:
    """Name the class of every pixel with a linear head on patch features; mIoU.

    Example: vitreg evaluate segmentation --data ade20k:ADEChallengeData2016 --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: ade20k:PATH, voc2012:PATH, or a folder with train/ and val/, in each images/ and masks/.
        common: models and pictures.
        size: height and width that pictures are brought to, rounded to whole patches; by default the short side is 512.
        ignore: number in the masks of a folder that does not count, besides 255.
        variant: linear reads the last block (or --blocks); +ms four, and averages over three sizes of the pictures.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_segmentation(data, size, ignore)], {_SEGMENTATION[variant]: protocol})


def evaluate_depth(
    *,
    data: str,
    common: EvaluationOptions,
    size: tuple[int, int] | None = None,
    scale: float = MILLIMETRES,
    variant: Literal["lin.1", "lin.4"] = "lin.1",
    protocol: DepthConfig = DepthConfig(),
) -> int:
    """Tell the depth of every pixel with a linear head on patch features; RMSE.

    Example: vitreg evaluate depth --data nyu:NYU --models dinov2_vitb14 dinov2_vitb14_reg

    Args:
        data: nyu:PATH, or a folder with train/ and val/, in each images/ and depth/ (16-bit PNG, 0 where unknown).
        common: models and pictures.
        size: height and width that pictures are brought to, rounded to whole patches; by default the short side is 480.
        scale: metres in one step of the files' numbers; 0.001 for millimetres.
        variant: the head reads the last block (or --blocks), or four (lin.4), as DINOv2's.
        protocol: its settings; by default those of the paper, or as close as can be.
    """
    return _run(common, [_depth(data, size, scale)], {_DEPTH[variant]: protocol})


def evaluate_all(
    *,
    common: EvaluationOptions,
    data: str | None = None,
    class_names: Path | None = None,
    segmentation: str | None = None,
    segmentation_size: tuple[int, int] | None = None,
    segmentation_ignore: int | None = None,
    segmentation_variants: tuple[Literal["linear", "+ms"], ...] = ("linear",),
    depth: str | None = None,
    depth_size: tuple[int, int] | None = None,
    depth_scale: float = MILLIMETRES,
    depth_variants: tuple[Literal["lin.1", "lin.4"], ...] = ("lin.1",),
    discovery: str | None = None,
) -> int:
    """Ask every probe with its default protocol, and object discovery: one table, as in the paper.

    Writes report.html, evaluation.json, evaluation.csv and evaluation.md. Every model sees every picture once, whatever
    the number of probes; zero-shot classification is asked of models with a text tower.

    Example: vitreg evaluate all --data imagenet/ --segmentation ade20k:ADE --depth nyu:NYU --models dinov2_vitb14
    dinov2_vitb14_reg

    Args:
        common: models and pictures.
        data: pictures, as for `evaluate knn`; without labels only position and reconstruction are asked.
        class_names: as for `evaluate zero-shot`.
        segmentation: as --data of `evaluate segmentation`.
        segmentation_size: as its --size.
        segmentation_ignore: as its --ignore.
        segmentation_variants: as its --variant; several make a column each.
        depth: as --data of `evaluate depth`.
        depth_size: as its --size.
        depth_scale: as its --scale.
        depth_variants: as its --variant.
        discovery: as --data of `evaluate discovery`.
    """
    found = [
        *([_classification(data, class_names)] if data else []),
        *([_segmentation(segmentation, segmentation_size, segmentation_ignore)] if segmentation else []),
        *([_depth(depth, depth_size, depth_scale)] if depth else []),
    ]
    if not found and not discovery:
        raise ValueError("there is nothing to evaluate on; give --data, --segmentation, --depth or --discovery")
    tasks = {one.task for one in found}
    wanted = {_SEGMENTATION[variant] for variant in segmentation_variants} | {_DEPTH[v] for v in depth_variants}
    unwanted = {*_SEGMENTATION.values(), *_DEPTH.values()} - wanted
    if any(one.task == "classification" and one.train.labels is None for one in found):
        # Where a patch is, and what it looks like, can be asked of any picture.
        unwanted |= {name for name, probe in PROBES.items() if probe.labels}
    probes = {name: probe.config for name, probe in PROBES.items() if probe.task in tasks and name not in unwanted}
    return _run(common, found, probes, discovery)


def _run(
    options: EvaluationOptions, found: Sequence[Data], probes: Mapping[str, Any], discovery: str | None = None
) -> int:
    """Ask the probes of every model, and write and print what they say."""
    if not options.models or len(set(options.models)) < len(options.models):
        raise ValueError(f"--models {' '.join(options.models) or 'is empty'}: name at least one model, and each once")
    for flag in ("train_images", "val_images", "patch_images", "feature_batch_size"):
        if (value := getattr(options, flag)) is not None:
            positive(f"--{flag.replace('_', '-')}", value)
    start = time.monotonic()
    out = writable_folder(options.out)
    config = PassConfig(options.patch_images, options.feature_batch_size)
    found = [
        dataclasses.replace(
            data, train=choose(data.train, options.train_images), val=choose(data.val, options.val_images)
        )
        for data in found
    ]
    models: list[Evaluated] = []
    names = _short_names(options.models)
    try:
        for source in options.models:
            vit = Checkpoint(source, device=options.device, dtype=options.dtype).load()
            results: dict[str, ProbeResult] = {}
            for data in found:
                asked = {name: settings for name, settings in probes.items() if PROBES[name].task == data.task}
                if len(probes) > 1 and not has_text_tower(source):
                    asked.pop("zero-shot", None)
                results |= evaluate(vit, source, data, asked, out, config, stage=progress)
            if discovery is not None:
                results["discovery"] = _discover(vit, source, discovery, out, options.feature_batch_size)
            models.append(Evaluated(names[source], vit.num_registers, results))
    except KeyboardInterrupt:
        print(f"vitreg: interrupted; the same command continues, {out} keeps what is done", file=sys.stderr)
        return INTERRUPTED
    summary = summarize(models, _described(found, discovery))
    summary |= {"seconds": time.monotonic() - start, "command": f"vitreg {shlex.join(sys.argv[1:])}"}
    _write(summary, models, found, out)
    if options.json:
        print_json(summary)
    else:
        _print_summary(summary, out)
    return 0


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Files and runs without their folders, where they still differ."""
    short = {s: Path(s).name.removesuffix(".safetensors") if Path(s).exists() else s for s in sources}
    return short if len(set(short.values())) == len(short) else {source: source for source in sources}


def _classification(data: str, class_names: Path | None = None) -> Data:
    train, val = open_split(data)
    if val is None:
        train, val = hold_out(train)
    names = None
    if class_names is not None:
        try:
            names = tuple(line.strip() for line in class_names.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {class_names}: {error}; give a text file with a name a line") from error
    return Data("classification", train, val, class_names=names)


def _segmentation(source: str, size: tuple[int, int] | None, ignore: int | None) -> Data:
    train, val = open_segmentation(source, ignore=ignore)
    return Data("segmentation", train, val, size or _size(train.name(0), _SHORT_SIDE["segmentation"]))


def _depth(source: str, size: tuple[int, int] | None, scale: float) -> Data:
    train, val = open_depth(source, scale=scale)
    return Data("depth", train, val, size or _size(train.name(0), _SHORT_SIDE["depth"]))


def _size(picture: str, short_side: int) -> tuple[int, int]:
    height, width = image_size(picture)
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def _discover(vit: Any, source: str, data: str, out: Path, batch_size: int) -> ProbeResult:
    """CorLoc by the documented protocol, from a file that an interrupted run continues."""
    from vitreg.discovery.protocol import DEFAULT
    from vitreg.discovery.summary import hits
    from vitreg.discovery.sweep import find_boxes

    labelled = [image for image in open_box_set(data).images if len(image.boxes)]
    if not labelled:
        raise ValueError(f"{data} has not one box; CorLoc needs boxes")
    record = out / f"boxes-{safe_name(source)}.jsonl"
    with progress(f"{source}: object discovery") as on_progress:
        boxes = find_boxes(vit, source, labelled, [DEFAULT], record, batch_size=batch_size, on_progress=on_progress)
    score = Score.mean("CorLoc", hits(boxes, labelled)[0], unit="%")
    return ProbeResult("discovery", (score,), {"protocol": dataclasses.asdict(DEFAULT), "pictures": len(labelled)})


def _described(found: Sequence[Data], discovery: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        data.task: {
            "source": data.train.source,
            "num_train": len(data.train),
            "num_val": len(data.val),
            "size": data.size,
        }
        for data in found
    }
    return described | ({"discovery": {"source": discovery}} if discovery else {})


def _write(summary: dict[str, Any], models: Sequence[Evaluated], found: Sequence[Data], out: Path) -> None:
    from vitreg.report import DensePicture, write_evaluation
    from vitreg.report import Table as Grid

    replace_text(out / "evaluation.json", jsonlib.dumps(summary, indent=1))
    replace_text(out / "evaluation.csv", write_csv(summary))
    replace_text(out / "evaluation.md", markdown(summary))
    pictures: dict[str, list[DensePicture]] = {"segmentation": [], "depth": []}
    class_names: Sequence[str] = ()
    for data in found:
        val = data.val
        if not isinstance(val, DenseSet):
            continue
        # Of several variants the first is shown.
        probe = next(name for name in models[0].results if PROBES[name].task == data.task)
        answers = [model.results[probe] for model in models]
        if isinstance(val, SegmentationSet):
            class_names = val.class_names
        for number in sorted(answers[0].predictions):
            pictures[data.task].append(
                DensePicture(
                    Path(val.name(number)).name,
                    np.asarray(val.picture(number)),
                    val.target(number),
                    tuple(answer.predictions[number] for answer in answers),
                )
            )
    header, rows = headline_table(summary)
    write_evaluation(
        summary,
        out / "report.html",
        tables=[Grid("All probes", header, rows), *(Grid(*table) for table in tables(summary))],
        legend=LEGEND,
        masks=pictures["segmentation"],
        depths=pictures["depth"],
        class_names=class_names,
    )


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    parts = [("", *headline_table(summary), []), *tables(summary)]
    for title, header, rows, notes in parts:
        table = Table(*header, title=title or None, title_justify="left", box=None, pad_edge=False)
        table.columns[0].overflow = "fold"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            print(f"– {note}")
        print()
    for sentence in summary["verdict"]:
        print(sentence)
    print(LEGEND)
    print(f"{summary['seconds']:.0f} s; see {out / 'report.html'}")
