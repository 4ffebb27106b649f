"""The commands as a user runs them: options, outputs, bad input."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg import cli
from vitreg.cli.help import flags

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def checkpoints(test_data, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0


@pytest.fixture
def folder(photographs, tmp_path) -> Path:
    """Four photographs, and four files that are none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs[:4]:
        shutil.copy(path, folder)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "cut.jpg").write_bytes(photographs[5].read_bytes()[:3000])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def test_diagnose_writes_report_and_skips_broken_files(checkpoints, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("diagnose", folder, "--model", TINY, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["has_artifacts"]
    assert printed["num_images"] == 4
    assert {Path(s["path"]).name for s in printed["skipped"]} == {
        "empty.jpg",
        "text.png",
        "cut.jpg",
        "gone.jpg",
    }
    saved = json.loads((out / "diagnosis.json").read_text())
    assert saved == {key: value for key, value in printed.items() if key != "report"}
    assert Path(printed["report"]).read_text().startswith("<!doctype html>")
    assert run("diagnose", folder, "--model", TINY, "--out", out) == 0
    text = capsys.readouterr().out
    assert "skipped 4 files" in text
    assert "empty.jpg" in text


def test_strict_makes_a_broken_file_an_error(checkpoints, folder, tmp_path, capsys):
    assert run("diagnose", folder, "--model", TINY, "--out", tmp_path / "out", "--strict") == 2
    assert "cut.jpg" in capsys.readouterr().err


def test_attention_arrays_add_up(checkpoints, tiny_vit, photographs, tmp_path, capsys):
    out = tmp_path / "maps"
    args = ("--model", TINY, "--queries", "cls", "5,3", "--block", "-2", "--out", out, "--json")
    assert run("attention", photographs[0], *args) == 0
    maps = json.loads(capsys.readouterr().out)["maps"]
    assert [m["query"] for m in maps] == ["class token", "patch (5, 3)"]
    for entry in maps:
        array = np.load(entry["array"])
        assert array.shape == (3, 14, 14)
        assert array.sum((1, 2)).mean() + entry["to_class_token"] == pytest.approx(1, abs=1e-5)
        assert entry["block"] == 10
        assert Image.open(entry["overlay"]).size == (224, 224)
        assert Image.open(entry["heads"]).width > 500
    trace = tiny_vit.trace(tiny_vit.preprocess(Image.open(photographs[0]))[None], blocks=[10], attention_from="cls")
    expected = trace.attention.to_patches[0, 0, :, 0].detach().numpy()
    np.testing.assert_allclose(np.load(maps[0]["array"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("command", "told"), [("diagnose", "1 image in"), ("attention", "1 map in"), ("discover", "in 1 image;")]
)
def test_1_images(command, told, checkpoints, photographs, tmp_path, capsys):
    assert run(command, photographs[0], "--model", TINY, "--out", tmp_path) == 0
    assert told in capsys.readouterr().out


def test_attention_of_the_whole_image_keeps_its_aspect(checkpoints, photographs, tmp_path, capsys):
    Image.open(photographs[0]).resize((600, 300)).save(tmp_path / "wide.png")
    args = ("--model", TINY, "--crop", "none", "--out", tmp_path / "maps", "--json")
    assert run("attention", tmp_path / "wide.png", *args) == 0
    entry = json.loads(capsys.readouterr().out)["maps"][0]
    assert np.load(entry["array"]).shape == (3, 14, 28)


def test_images_of_one_name_do_not_overwrite_each_other(checkpoints, photographs, tmp_path, capsys):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        shutil.copy(photographs[i], tmp_path / str(i) / "same.jpg")
    assert run("attention", tmp_path, "--model", TINY, "--out", tmp_path / "maps", "--json") == 0
    arrays = [m["array"] for m in json.loads(capsys.readouterr().out)["maps"]]
    assert len(set(arrays)) == 2


def test_images_after_queries_are_not_taken_for_queries(checkpoints, photographs, tmp_path, capsys):
    """A flag with several values swallows what follows it, up to the next flag."""
    shutil.copy(photographs[0], tmp_path / "dog.jpg")
    arguments = ("attention", "--model", TINY, "--out", tmp_path / "maps", "--json", "--queries", "cls", "3,5")
    assert run(*arguments, tmp_path / "dog.jpg") == 0
    assert [m["query"] for m in json.loads(capsys.readouterr().out)["maps"]] == ["class token", "patch (3, 5)"]
    assert run(*arguments, tmp_path / "cat.jpg") == 2
    assert "cat.jpg" in capsys.readouterr().err


def test_a_limit_takes_images_from_all_over_the_files(checkpoints, photographs, tmp_path, capsys):
    """The first files of a folder are often of one class."""
    assert run("attention", *photographs[:9], "--model", TINY, "--out", tmp_path, "--limit", 3, "--json") == 0
    shown = [Path(entry["image"]).name for entry in json.loads(capsys.readouterr().out)["maps"]]
    assert shown == [path.name for path in sorted(photographs[:9])[::4]]


def test_two_processes_do_not_mix_in_one_folder(checkpoints, photographs, tmp_path, capsys):
    code = "import sys; from pathlib import Path; from vitreg.cli.options import writable_folder as w\n"
    code += f"w(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        arguments = ("diagnose", photographs[0], "--model", TINY, "--out", tmp_path)
        assert run(*arguments) == 2
        assert f"another process writes to {tmp_path}; wait for it, or stop it" in capsys.readouterr().err
        other.stdin.close()
    assert run(*arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnosis.json", "report.html"]


@pytest.mark.parametrize(
    "words",
    [
        "diagnose 'my photos' --model vitreg_tiny --out out",
        "compare vitreg_tiny vitreg_tiny_reg4 'my photos' --out out",
        "evaluate position --data 'my photos' --models vitreg_tiny --epochs 1 --out out",
        "demo --out out",
        "demo --model vitreg_tiny --out out",
    ],
)
def test_to_make_it_again_in_the_footer_is_a_command_that_runs(words, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    for path in photographs[:20]:
        Image.open(path).resize((64, 64)).save(tmp_path / "my photos" / f"{path.stem}.png")
    assert run(*shlex.split(words)) == 0
    page = Path("out/report.html")
    shown = re.search(r"To make it again.*?<pre[^>]*>(.*?)</pre>", page.read_text(), re.DOTALL)
    assert shown is not None
    line = html.unescape(re.sub("<.*?>", "", shown[1]))
    assert line == f"vitreg {words}"
    page.unlink()
    assert run(*shlex.split(line)[1:]) == 0
    assert page.is_file()


def test_models(capsys):
    assert run("models", "--filter", "dinov2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8
    assert {row["num_registers"] for row in rows} == {0, 4}
    assert run("models") == 0
    assert "dinov3_vitb16" in capsys.readouterr().out
    assert run("models", "--filter", "resnet") == 2


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_stored_model_that_is_not_converted_is_observed(library, folder, tmp_path, capsys):
    if library == "timm":
        import timm
        from safetensors.torch import save_file

        model = tmp_path / "test_vit3.r160_in1k.safetensors"  # averages its registers with the patches
        save_file(timm.create_model("test_vit3").state_dict(), model)
    else:
        hf, model = pytest.importorskip("transformers"), tmp_path / "videomae"
        sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
        hf.VideoMAEModel(hf.VideoMAEConfig(**sizes, image_size=64, num_frames=4)).save_pretrained(model)
    assert run("diagnose", folder, "--model", model, "--out", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["model"]["name"] == model.name
    assert found["model"]["observed"]["assumed"].startswith("Observed by hooks in V")
    assert found["model"]["depth"] == len(found["blocks"]) > 1
    assert "it is observed as it is" in printed.err
    assert (tmp_path / "out" / "report.html").exists()
    assert run("fix", folder, "--model", model, "--out", tmp_path / "fixed.safetensors") == 2


def test_models_coverage(capsys):
    assert run("models", "--coverage", "--filter", "vit_tiny_patch16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["timm"]
    assert {row["module"]: row["status"] for row in found["models"]}["vision_transformer"] == "converted"
    assert run("models", "--coverage", "--filter", "no such model") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["diagnose", "IMAGES", "--model", "dinov2_vitb15"], "dinov2_vitb14"),
        (["diagnose", "nowhere", "--model", TINY], "nowhere"),
        (["diagnose", "IMAGES", "--model", TINY, "--block", "12"], "blocks? 0 to 11|0 to 11"),
        (["diagnose", "IMAGES", "--model", TINY, "--threshold", "p98"], "mean\\+3sd"),
        (["diagnose", "IMAGES", "--model", TINY, "--size", "100"], "multiple of the patch size 16"),
        (["diagnose", "IMAGES", "--model", TINY, "--batch-size", "0"], "at least 1"),
        (["diagnose", "IMAGES", "--model", TINY, "--device", "tpu9"], "tpu9"),
        (["diagnose", "IMAGES", "--model", TINY, "--out", "/proc/nothing"], "cannot write"),
        (["attention", "IMAGES", "--model", TINY, "--queries", "registers"], "no registers"),
        (["attention", "IMAGES", "--model", TINY, "--queries", "0,14"], "outside the grid"),
        (["attention", "IMAGES", "--model", TINY, "--queries", "dog"], "ROW,COLUMN"),
        (["diagnose", "--model", TINY], "IMAGES|image|path"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(args, message, checkpoints, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*[folder if a == "IMAGES" else a for a in args]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("vitreg: ")
    assert len(error.strip().splitlines()) == 1


def test_debug_shows_the_traceback(checkpoints, folder, capsys):
    assert run("diagnose", folder, "--model", TINY, "--threshold", "p98", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_leaves_a_report(test_data, tmp_path):
    """A real SIGINT to a real process, sent while it looks at images."""
    out = tmp_path / "out"
    code = (
        "import signal, sys, vitreg.artifacts.observer as d, vitreg.cli as c\n"
        # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Loud(d.Examples):\n"
        "    def add(self, *a):\n"
        "        super().add(*a); print('batch', file=sys.stderr, flush=True)\n"
        "d.Examples = Loud\n"
        f"c.main(['diagnose', {str(test_data / 'imagenet-samples')!r}, '--model', {TINY!r}, '--batch-size', '4', "
        f"'--out', {str(out)!r}])\n"
    )
    env = os.environ | {"VITREG_CHECKPOINTS": str(test_data / "weights")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # At the second the first is counted; interrupted in the first, there is nothing to report.
    assert [process.stderr.readline().strip() for _ in range(2)] == ["batch", "batch"]
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 60
    saved = json.loads((out / "diagnosis.json").read_text())
    assert saved["interrupted"]
    assert 4 <= saved["num_images"] < 1000
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("flag", ["--help", "--nonsense"])
def test_help_and_a_wrong_flag_do_not_import_torch(flag):
    """It takes seconds; what is asked of a command before it runs is answered from its signature."""
    code = (
        "import contextlib, io, sys\n"
        "from vitreg import cli\n"
        "names = [*cli.COMMANDS, 'train dinov2']\n"
        f"for line in ['--version', '--help', 'evaluate --help', *(f'{{name}} {flag}' for name in names)]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            cli.main(line.split())\n"
        "    assert not {'torch', 'numpy', 'jaxtyping', 'PIL'} & set(sys.modules), line\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_of_all_commands_says_what_their_own_says_first(capsys):
    assert run("--help") == run("evaluate", "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for name in cli.COMMANDS:
        assert f"{name.split()[-1]} {(cli.command(name).__doc__ or '').splitlines()[0]}" in told


def test_import_needs_no_command_line_plotting_or_training_package():
    code = (
        "import sys, torch, time\n"
        "blocked = ('tyro', 'rich', 'lightly', 'matplotlib', 'jinja2', 'transformers', 'open_clip', 'timm', "
        "'torchvision', 'sklearn', 'pyarrow')\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import vitreg\n"
        "assert len(vitreg.__all__) <= 35  # those of the design\n"
        "assert all(getattr(vitreg, name) for name in vitreg.__all__)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MODEL = "--model --architecture --device --dtype"
READING = "--limit --strict --batch-size"
EVALUATION = (
    "--models --out --limit --strict --train-images --val-images --size --quick --patch-images --device --dtype "
    "--batch-size --json"
)
TRAIN = (
    "RECIPE --data --val --limit --registers --arch --out --resume --smoke --size --patch-size --batch-size --epochs "
    "--steps --lr --weight-decay --warmup-steps --drop-path --ema-decay --seed --accumulation --dtype --sharding "
    "--compile --gradient-checkpointing --log-every --checkpoint-every --diagnose-every --workers --device --json "
    "--optimizer --final-lr --final-weight-decay --layer-decay --clip-norm --beta2 --eps --layer-scale --num-diagnosed"
)
FLAGS = {
    "attention": f"IMAGES {MODEL} --size --block --queries --out --crop --limit --strict --json",
    "compare": f"A B IMAGES --architecture --device --dtype --size --out {READING} --json",
    "demo": f"{MODEL} --size --out --json",
    "diagnose": f"IMAGES --store {MODEL} --size --out --threshold --block {READING} --json",
    "discover": (
        f"IMAGES {MODEL} --out --method --facet --block --no-normalize --no-center --bias --k-patches --max-objects "
        f"{READING} --no-overlays --json"
    ),
    "evaluate all": (
        f"{EVALUATION} --data --class-names --segmentation --segmentation-size --segmentation-ignore "
        "--segmentation-variants --depth --depth-size --depth-scale --depth-variants --discovery"
    ),
    "evaluate depth": (
        f"{EVALUATION} --data --scale --variant --blocks --batch-norm --bins --min-depth --max-depth "
        "--eigen-crop --lr --weight-decay --head-batch-size --steps --seed"
    ),
    "evaluate discovery": "--data --models --sweep --out --device --dtype --batch-size --limit --json",
    "evaluate knn": f"{EVALUATION} --data --k --temperature",
    "evaluate linear": (
        f"{EVALUATION} --data --blocks --mean-patch --learning-rates --head-batch-size --epochs --epoch-length "
        "--momentum --seed"
    ),
    "evaluate position": (
        f"{EVALUATION} --data --block --learning-rate --epochs --patience --held-out --head-batch-size --seed"
    ),
    "evaluate reconstruction": f"{EVALUATION} --data --block",
    "evaluate segmentation": (
        f"{EVALUATION} --data --ignore --variant --blocks --lr --weight-decay --betas --warmup "
        "--head-batch-size --steps --seed"
    ),
    "evaluate tokens": (
        f"{EVALUATION} --data --block --draws --min-images --C --max-iter --tolerance --held-back --patience "
        "--held-back-seed --seed"
    ),
    "evaluate zero-shot": f"{EVALUATION} --data --class-names --templates",
    "export": "MODEL --out --architecture --dtype --size --no-dynamic-batch --no-check --json",
    "extract": (
        f"SOURCE {MODEL} --size --out --tokens --blocks --store-dtype --shard-size --batch-size --strict --shard "
        "--update --engine --num-workers --address --dry-run --json"
    ),
    "fix": f"IMAGES {MODEL} --size --out --method --registers --report {READING} --json",
    "models": "--filter --coverage --json",
    "timeline": "RUN --out --json",
    "train": TRAIN,
}
SETTINGS = {
    "deit3": "--loss --smoothing --mixup --cutmix --three-augment --color-jitter --min-crop",
    "dinov2": (
        "--num-local --local-size --global-scale --local-scale --mask-probability --mask-ratio --num-prototypes "
        "--hidden-dim --bottleneck-dim --separate-heads --centering --student-temperature --teacher-temperature "
        "--temperature-warmup --teacher-momentum --frozen-prototypes --ibot-weight --koleo-weight"
    ),
    "clip": "--text-width --text-layers --text-heads --context-length --min-scale --flip",
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_command_line_is_frozen(name):
    """A flag is a promise: a change here is a change for users, and belongs into the changelog."""
    assert sorted(flag.name for flag in flags(cli.command(name))) == sorted(FLAGS[name].split())


@pytest.mark.parametrize("recipe", SETTINGS)
def test_the_settings_of_recipes_are_frozen(recipe):
    for words in ([recipe], ["--smoke", "--out", "clip", recipe]):
        found = [flag.name for flag in flags(cli.command("train", words))]
        assert sorted(found) == sorted(f"{TRAIN} {SETTINGS[recipe]}".split())


@pytest.mark.parametrize("name", [*cli.COMMANDS, *(f"train {recipe}" for recipe in SETTINGS)])
def test_help_explains_every_flag_in_80_columns(name, capsys):
    first, *rest = name.split()
    command = cli.command(name) if name in cli.COMMANDS else cli.command(first, rest)
    assert all(flag.explained for flag in flags(command))
    assert run(*name.split(), "--help") == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert not re.search(r"None|\(default: \)|<factory>|`|\[/", said)


def test_a_command_with_nothing_prints_its_own_help_and_what_is_missing(capsys):
    for words, missing in (("fix", "IMAGES, --model and --out"), ("train", "RECIPE"), ("evaluate knn", "--models")):
        assert run(*words.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"usage: vitreg {words}")
        assert f"{words} needs" in said.splitlines()[-1]
        assert missing in said.splitlines()[-1]
    assert run("evaluate") == 2
    assert "zero-shot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("diagnose x --model a --sizes 3", "there is no option --sizes, 3; did you mean --size?"),
        ("diagnose x --model a --size b", "--size b is no value of it; give INT | INT INT"),
        ("diagnose x --model a --dtype int", "--dtype int is unknown; choose from float32, bfloat16, float16"),
        ("diagnose x --model", "--model needs a value; see vitreg diagnose --help"),
        ("fix x", "fix needs --out and --model; see vitreg fix --help"),
        ("evaluate knn --data x --models a --k 0", "k is (0,); give at least one number of neighbors, all above 0"),
        ("evaluate knn --data x --models a --limit 0", "--limit 0 must be at least 1"),
        ("diagnose x --model a --out=", "--out is empty; give a path"),
        ("train deit3 --data x --mixup half", "--mixup half is no value of it; give FLOAT"),
        ("diagnos x", "there is no command diagnos; did you mean diagnose?"),
        ("evaluate kn --data x", "there is no command evaluate kn; did you mean evaluate knn?"),
    ],
)
def test_what_the_parser_refuses_is_one_sentence(words, said, capsys):
    assert run(*words.split()) == 2
    assert capsys.readouterr().err == f"vitreg: {said}\n"


def test_an_empty_path_is_not_the_current_folder(capsys):
    """`--out "$REPORT"`, where the variable is not set."""
    for words in (["--out", ""], ["--out", "", "--json"]):
        assert run("diagnose", "x", "--model", "a", *words) == 2
        assert capsys.readouterr().err == "vitreg: --out is empty; give a path\n"


def test_a_folder_of_checkpoints_that_is_none_is_not_passed_over(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(tmp_path / "gone"))
    assert run("diagnose", photographs[0], "--model", TINY, "--out", tmp_path / "out") == 2
    assert f"VITREG_CHECKPOINTS names {tmp_path / 'gone'}, which is no folder; correct it" in capsys.readouterr().err


def test_old_names_of_flags_are_accepted_with_a_note(capsys, tmp_path):
    words = "train --precision=bfloat16 deit3 --size small --image_size 32 --data"
    assert run(*words.split(), tmp_path / "nowhere") == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert [note.split(";")[0].removeprefix("vitreg: ") for note in notes] == [
        "--precision is now --dtype", "--size is now --arch", "--image_size is now --size",
    ]  # fmt: skip
    assert "nowhere does not exist" in error


def test_every_command_has_a_default_folder_of_its_own():
    """Two commands without --out do not overwrite each other's report; probes add up in one folder."""
    outs = {name: flag.default for name in cli.COMMANDS for flag in flags(cli.command(name)) if flag.name == "--out"}
    probes = {name for name in outs if name.startswith("evaluate ") and name != "evaluate discovery"}
    assert {outs[name] for name in probes} == {Path("vitreg-out/evaluate")}
    alone = {name: out for name, out in outs.items() if name not in probes and name not in ("fix", "export")}
    assert alone == {name: Path("vitreg-out") / name.replace(" ", "-") for name in alone}


def test_the_public_names_are_frozen():
    import vitreg

    assert dir(vitreg) == sorted(vitreg.__all__)
    assert sorted(vitreg.__all__) == [
        "AttentionRows", "CheckpointError", "Comparison", "Detection", "Diagnosis", "ImageError", "Preprocess",
        "RegisterNeuron", "Tokens", "Trace", "ViTConfig", "VisionTransformer", "add_prefix", "add_registers",
        "add_test_time_registers", "bake_registers", "compare", "diagnose", "discover_objects", "distill_registers",
        "export", "extract", "find_register_neurons", "from_open_clip", "from_state_dict", "from_timm",
        "from_transformers", "install_registers", "list_models",
        "load", "observe", "open_store", "push_to_hub", "repair_singular_defects", "save",
    ]  # fmt: skip


def test_a_full_disk_is_one_sentence_that_says_what_to_do(monkeypatch, tmp_path, capsys):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "models.json"))

    monkeypatch.setattr("vitreg.checkpoints.list_models", full)
    assert run("models") == 2
    told = f"vitreg: the disk has no room left for {tmp_path / 'models.json'}; make room, or choose another --out\n"
    assert capsys.readouterr().err == told


def test_a_file_whose_name_is_no_text_does_not_cost_the_result(photographs, tmp_path, capsys):
    """The page and the terminal are UTF-8; a name in Latin-1 is not."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(photographs[:2]):
        shutil.copy(path, os.fsencode(folder) + b"/caf\xe9%d.jpg" % number)
    (folder / os.fsdecode(b"text\xe9.jpg")).write_text("no image")
    assert run("diagnose", folder, "--model", "vitreg_tiny", "--out", tmp_path / "out") == 0
    assert "text\\udce9.jpg is not an image" in capsys.readouterr().out
    assert "caf\\udce90.jpg" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["num_images"] == 2
    assert run("attention", folder, "--model", "vitreg_tiny", "--queries", "0,0", "--out", tmp_path / "maps") == 0
