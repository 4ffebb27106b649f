"""Starting and resuming runs: what they write, what they refuse, what survives."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch

import vitreg
from training.commands import Run, log
from training.small import small_config
from vitreg import cli
from vitreg.images import open_split
from vitreg.training import open_data, resume, train
from vitreg.training.engine.run_folder import RunFolder
from vitreg.training.engine.train_state import TrainState
from vitreg.training.recipes.catalogue import config_from_dict
from vitreg.training.recipes.deit3 import DeiT3

pytestmark = pytest.mark.usefixtures("_quick")


def go(config, data, out, **options) -> bool:
    return train(config, data, out, device="cpu", num_workers=0, **options)


def go_on(run, **options) -> bool:
    return resume(run, device="cpu", num_workers=0, **options)


def edit(run: Path, **changes) -> None:
    """Change settings of a run; `model` and `optimizer` hold some of their own."""
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (run / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def trained(class_folders, tmp_path_factory) -> Path:
    """A run of 6 steps with checkpoints at 4 and 6, of which the last is kept. Do not change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitreg.training.engine.run_logger.matrix_rate", lambda device, dtype: 1e9)
        assert go(small_config(6, checkpoint_every=4, diagnose_every=3), class_folders, out)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, with more steps to do."""
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    edit(copy, num_steps=9)
    return copy


def test_a_run_writes_what_it_says(trained):
    assert {path.name for path in trained.iterdir() if not path.name.startswith(".")} == {
        "config.json", "log.jsonl", "diagnosis.jsonl", "tensorboard", "checkpoints", "model.safetensors",
    }  # fmt: skip
    lines = log(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert all(line.keys() >= {"loss", "lr", "gradient_norm"} for line in lines)
    assert lines[-1].keys() >= {"images_per_second", "mfu", "skipped"}
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000006"]
    diagnoses = [json.loads(line) for line in (trained / "diagnosis.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in diagnoses] == [3, 6]
    for entry in diagnoses:
        assert entry["metrics"].keys() == {"top1"}
        assert entry.keys() >= {"has_artifacts", "outlier_fraction", "threshold", "onset_block", "num_images", "grid"}
        assert entry["num_images"] == 12
        assert [block["block"] for block in entry["blocks"]] == [0, 1]
        assert entry["blocks"][0].keys() >= {"median", "p99", "max", "outlier_fraction", "histogram"}
        assert len(entry["register_norms"][0]) == 4


def test_tensorboard_shows_the_same_curves(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in log(trained)])
    assert [event.step for event in events.Scalars("held_out/top1")] == [3, 6]
    assert events.Scalars("norms/block01/p99")


def test_the_model_of_a_run_is_one_everywhere(trained, tmp_path):
    """It loads, and saves for timm and transformers, whose classes give the same output, registers included."""
    import timm
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoModel

    vit = vitreg.load(trained)
    assert (vit.num_registers, vit.config.name, vit.config.num_classes) == (4, "small", 4)
    images = torch.randn(2, 3, 32, 32)
    expected = vit.classify(images)
    path = tmp_path / "timm.safetensors"
    vitreg.save(vit, path, format="timm")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    peer = timm.create_model(metadata["architecture"], **json.loads(metadata["kwargs"])).eval()
    peer.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(peer(images), expected, rtol=1e-4, atol=1e-5)
    # Without the head: transformers' class for classification averages registers into its feature.
    backbone = vitreg.VisionTransformer(dataclasses.replace(vit.config, num_classes=0)).eval()
    backbone.load_state_dict({name: tensor for name, tensor in vit.state_dict().items() if "head" not in name})
    vitreg.save(backbone, tmp_path / "transformers", format="transformers")
    sequence = AutoModel.from_pretrained(tmp_path / "transformers").eval()(images).last_hidden_state
    tokens = vit(images)
    ours = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    torch.testing.assert_close(sequence, ours, rtol=1e-4, atol=1e-5)


def test_the_average_is_what_is_saved(class_folders, tmp_path):
    go(small_config(4, checkpoint_every=2), class_folders, tmp_path / "plain")
    go(small_config(4, checkpoint_every=2, ema_decay=0.5), class_folders, tmp_path / "average")
    assert [line["loss"] for line in log(tmp_path / "average")] == [line["loss"] for line in log(tmp_path / "plain")]
    plain, average = (vitreg.load(tmp_path / name).state_dict() for name in ("plain", "average"))
    assert not torch.equal(plain["head.weight"], average["head.weight"])
    edit(tmp_path / "average", num_steps=6)
    go_on(tmp_path / "average")
    edit(tmp_path / "plain", num_steps=6)
    go_on(tmp_path / "plain")
    assert [line["loss"] for line in log(tmp_path / "average")] == [line["loss"] for line in log(tmp_path / "plain")]


def test_a_finished_run_is_left_alone(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    assert go_on(copy)
    assert log(copy) == log(trained)
    assert (copy / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_run_goes_on_where_the_images_and_it_are_now(trained, folders, tmp_path, monkeypatch):
    """Data given as a relative path, run resumed in another folder; then images and run are moved."""
    monkeypatch.chdir(folders.parent)
    go(small_config(3), "data", tmp_path / "run")
    monkeypatch.chdir("/")
    edit(tmp_path / "run", num_steps=4)
    assert go_on(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "there")
    folders.rename(tmp_path / "others")
    edit(tmp_path / "there", num_steps=5)
    with pytest.raises(ValueError, match="data does not exist"):
        go_on(tmp_path / "there")
    assert go_on(tmp_path / "there", data=tmp_path / "others")
    assert [line["step"] for line in log(tmp_path / "there")] == [1, 2, 3, 4, 5]


def test_other_images_are_refused(run, folders):
    shutil.rmtree(folders / "train" / "class3")
    shutil.rmtree(folders / "val" / "class3")
    with pytest.raises(ValueError, match=r"45 images of 3 classes; the run began with 60 of 4; give the same"):
        go_on(run, data=folders)
    assert len(log(run)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"embed_dim": 64}}, r"does not fit this run's model.*Size mismatch"),
        ({"model": {"depth": 3}}, r"does not fit this run's model.*blocks\.2"),
        ({"model": {"depth": 1}}, r"has no model\.vit\.blocks\.1"),
        ({"model": {"num_registers": 0}}, r"has no model\.vit\.registers"),
        ({"model": {"num_registers": 5}}, r"does not fit this run's model.*Size mismatch"),
        ({"model": {"num_classes": 5}}, "4 classes, the model 5"),
        ({"ema_decay": 0.9}, r"does not fit this run's model.*average"),
        ({"optimizer": {"name": "adamw"}}, "does not fit this run's model"),
        ({"optimizer": {"magic": 1}}, "magic"),
        ({"recipe": "moco"}, "'moco' is unknown"),
        ({"format": "vitreg-run/9"}, "is not of a run of vitreg"),
        ({"batch_size": 7}, "cannot be shared out"),
        ({"batch_size": 62}, "60 images, fewer than a batch of 62"),
    ],
)
def test_a_config_that_was_edited_is_refused_and_nothing_lost(changes, message, run):
    before = (run / "log.jsonl").read_text()
    kept = (run / "config.json").read_text()
    edit(run, **changes)
    with pytest.raises(ValueError, match=message):
        go_on(run)
    assert (run / "log.jsonl").read_text() == before
    (run / "config.json").write_text(kept)
    assert go_on(run)
    assert len(log(run)) == 9


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", truncate, "is damaged"),
        ("__0_0.distcp", os.remove, "is damaged .No such file"),
        (".metadata", truncate, "is damaged: its list of tensors"),
        (".metadata", os.remove, "is damaged: its list of tensors"),
    ],
)
def test_a_damaged_checkpoint_is_a_sentence(name, damage, message, run):
    damage(run / "checkpoints" / "step-00000006" / name)
    with pytest.raises(ValueError, match=message) as error:
        go_on(run)
    assert "step-00000006" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_half_written_checkpoints_are_not_used(run):
    whole = run / "checkpoints" / "step-00000006"
    for step in (6, 7):
        partial = run / "checkpoints" / f".step-0000000{step}.partial"
        shutil.copytree(whole, partial)
        truncate(partial / "__0_0.distcp")
    assert go_on(run)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000009"]


def test_a_run_killed_between_checkpoint_and_model_still_brings_its_model(class_folders, tmp_path, monkeypatch):
    """The last checkpoint must not be there without the model: after it nothing would write it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("vitreg.training.engine.run_logger.save", killed)
        with pytest.raises(KeyboardInterrupt):
            go(small_config(2), class_folders, out)
    assert not (out / "model.safetensors").exists()
    assert go_on(out)
    assert vitreg.load(out).num_registers == 4


def test_a_run_without_a_model_is_named_as_one(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(vitreg.CheckpointError, match="a training run without a model yet"):
        vitreg.load(run)


def test_logs_are_cut_to_the_checkpoint_and_a_torn_last_line_is_dropped(run):
    lines = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(lines + json.dumps({"step": 7, "loss": 1.0}) + '\n{"step": 8, "lo')
    assert go_on(run)
    assert [line["step"] for line in log(run)] == list(range(1, 10))
    assert log(run)[6]["loss"] != 1.0


def test_steps_that_are_done_again_are_in_the_curves_once(class_folders, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    advance, out = TrainState.advance, tmp_path / "run"

    def killed(self, batches):
        if self.step == 6:
            raise KeyboardInterrupt
        return advance(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            go(small_config(8, checkpoint_every=4), class_folders, out)
    assert len(log(out)) == 6
    assert go_on(out)
    assert [line["step"] for line in log(out)] == list(range(1, 9))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_a_folder_that_holds_a_run_is_refused(run, class_folders):
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a run of deit3 already; go on with --resume"):
        go(small_config(), class_folders, run)
    assert (run / "config.json").read_text() == before


def test_a_run_that_did_nothing_can_be_started_again(class_folders, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="cannot be shared out evenly"):
        go(small_config(2, batch_size=7), class_folders, out)
    assert go(small_config(2), class_folders, out)


def test_two_processes_do_not_train_in_one_folder(run):
    folder = RunFolder(run)
    folder.claim()
    assert claimed_by_another(run) == "another process trains in RUN; wait for it, or stop it"
    folder.release()
    assert claimed_by_another(run) == ""


def claimed_by_another(run: Path) -> str:
    """What a forked process is told that claims the folder."""

    def claim(pipe) -> None:
        try:
            RunFolder(run).claim()
            pipe.send("")
        except ValueError as error:
            pipe.send(str(error).replace(str(run), "RUN"))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=claim, args=(theirs,))
    child.start()
    child.join()
    return ours.recv()


def test_held_out_images_are_not_trained_on(class_folders):
    opened = open_data(class_folders / "train")
    images, held_out = opened.images, opened.held_out
    ours, theirs = ({part.name(i) for i in range(len(part))} for part in (images, held_out))
    assert (len(ours), len(theirs)) == (57, 3)
    assert not ours & theirs
    assert images.labels is not None
    assert all(images.name(i).split("/")[-2] == images.classes[images.labels[i]] for i in range(57))
    again = open_data(class_folders / "train").images
    assert [again.name(i) for i in range(57)] == [images.name(i) for i in range(57)]
    other = open_data(class_folders / "train", seed=1).held_out
    assert {other.name(i) for i in range(3)} != theirs


def test_the_val_part_is_held_out_and_others_may_be_given(class_folders, folders):
    opened = open_data(class_folders)
    assert (len(opened.images), len(opened.held_out)) == (60, 12)
    for data in (class_folders / "train", class_folders):
        given = open_data(data, folders / "val")
        assert (len(given.images), len(given.held_out)) == (60, 12)
        assert given.held_out.source == str(folders / "val")
    shutil.rmtree(folders / "val" / "class0")
    with pytest.raises(ValueError, match="must have the same classes"):
        open_data(class_folders / "train", folders / "val")
    with pytest.raises(ValueError, match="must have the same classes"):
        open_split(folders)


def test_a_broken_image_is_counted_and_listed(folders, tmp_path):
    broken = folders / "train" / "class2" / "3.jpg"
    broken.unlink()
    broken.write_bytes(b"\xff\xd8\xff no image")
    assert go(small_config(8), folders, tmp_path / "run")
    assert log(tmp_path / "run")[-1]["skipped"] == 1
    assert str(broken) in (tmp_path / "run" / "skipped.txt").read_text()


def test_a_class_folder_that_vanishes_during_a_run_costs_its_images_only(folders, tmp_path, monkeypatch):
    advance = TrainState.advance

    def vanishing(self, batches):
        if self.step == 2:
            shutil.rmtree(folders / "train" / "class1")
        return advance(self, batches)

    monkeypatch.setattr(TrainState, "advance", vanishing)
    assert go(small_config(12), folders, tmp_path / "run")
    assert len(log(tmp_path / "run")) == 12
    missing = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert log(tmp_path / "run")[-1]["skipped"] == len(missing) > 5
    assert all(str(folders / "train" / "class1") in sentence for sentence in missing)


def test_held_out_images_that_cannot_be_read_are_told_before_any_step(folders, tmp_path):
    for path in (folders / "val").rglob("*.jpg"):
        path.unlink()
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"can be read; give others by --val"):
        go(small_config(), folders, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(class_folders, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match="cannot write to"):
        go(small_config(), class_folders, tmp_path / "run")


@pytest.mark.parametrize("watched", [0, 1])
def test_weights_that_explode_stop_the_run_and_keep_the_last_good_ones(watched, class_folders, tmp_path):
    out = tmp_path / "run"
    assert go(small_config(2, log_every=2, diagnose_every=watched), class_folders, out)
    edit(out, num_steps=9, optimizer={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(ValueError, match=r"step [345].*the last good checkpoint is kept in .*step-00000002"):
        go_on(out)
    assert [line["step"] for line in log(out)][:2] == [1, 2]
    assert all(torch.isfinite(tensor).all() for tensor in vitreg.load(out).state_dict().values())
    edit(out, num_steps=4, optimizer={"lr": 1e-3})
    assert go_on(out)
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4]


def infinite(method: DeiT3, loss: torch.Tensor) -> torch.Tensor:
    return loss / 0


def steep(method: DeiT3, loss: torch.Tensor) -> torch.Tensor:
    """A finite loss whose gradient is not a number."""
    return loss + (0 * method.vit.registers).sum().sqrt()


@pytest.mark.parametrize(("harm", "what"), [(infinite, "the loss is inf"), (steep, "the gradient norm is nan")])
def test_what_is_not_a_number_is_found_at_its_step(harm, what, class_folders, tmp_path, monkeypatch):
    forward, calls = DeiT3.forward, []

    def infected(self, batch, progress):
        calls.append(progress)
        loss = forward(self, batch, progress)["loss"]
        return {"loss": harm(self, loss) if progress == 0.5 else loss}

    monkeypatch.setattr(DeiT3, "forward", infected)
    config = small_config(12, log_every=4, checkpoint_every=4)
    with pytest.raises(ValueError, match=rf"{what} at step 7; the last good .*step-00000004. Start again"):
        go(config, class_folders, tmp_path / "run")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert len(calls) >= 8


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(run, tmp_path):
    """Files may not grow beyond what the model has: the checkpoint, with its moments, is larger."""
    before = (run / "checkpoints" / "step-00000006" / "__0_0.distcp").read_bytes()
    limits = {resource.RLIMIT_FSIZE: (run / "model.safetensors").stat().st_size + 20000}
    full = Run("train", "--resume", run, "--workers", "0", "--device", "cpu", told=tmp_path / "full.txt", limits=limits)
    assert full.wait() == 2
    assert full.told.count("vitreg: ") == 1
    assert re.search(
        r"cannot write a checkpoint into .*: File too large; the last good .*step-00000006$", full.told.strip()
    )
    (kept,) = (run / "checkpoints").iterdir()
    assert (kept / "__0_0.distcp").read_bytes() == before
    again = Run("train", "--resume", run, "--workers", "0", "--device", "cpu", told=tmp_path / "again.txt")
    assert again.wait() == 0, again.told
    assert [line["step"] for line in log(run)] == list(range(1, 10))


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start(class_folders, tmp_path):
    args = ("deit3", "--data", class_folders, "--smoke", "--size", "32", "--batch-size", "8", "--steps", "2")
    limits = {resource.RLIMIT_FSIZE: 400}
    run = Run("train", *args, "--out", tmp_path / "run", told=tmp_path / "told.txt", limits=limits)
    assert run.wait() == 2
    assert run.told.startswith(f"vitreg: cannot write to {tmp_path / 'run'}: File too large; make room")


def test_two_runs_in_one_process_are_the_same(class_folders, tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        assert go(small_config(3), class_folders, tmp_path / name)
        torch.rand(7)
    assert [line["loss"] for line in log(tmp_path / "one")] == [line["loss"] for line in log(tmp_path / "two")]
    assert go(small_config(3, seed=1), class_folders, tmp_path / "other")
    assert [line["loss"] for line in log(tmp_path / "other")] != [line["loss"] for line in log(tmp_path / "one")]


def test_entries_are_told(class_folders, tmp_path):
    told: list = []
    assert go(small_config(4, log_every=2, diagnose_every=4), class_folders, tmp_path / "run", on_log=told.append)
    assert [(entry["step"], "blocks" in entry) for entry in told] == [(2, False), (4, False), (4, True)]


def test_runs_of_the_first_version_called_the_dtype_precision(run):
    config = json.loads((run / "config.json").read_text())
    config["precision"] = "bfloat16"
    del config["dtype"]
    assert config_from_dict(config).dtype == "bfloat16"


def test_the_images_are_not_in_memory(test_data, tmp_path, monkeypatch):
    """`vitreg train` opened them to build the config, and `training.train` again."""
    import pyarrow

    file = test_data / "tiny-imagenet-100" / "val.parquet"
    before, held, advance = pyarrow.total_allocated_bytes(), [], TrainState.advance

    def measured(self, batches):
        held.append(pyarrow.total_allocated_bytes() - before)
        return advance(self, batches)

    monkeypatch.setattr(TrainState, "advance", measured)
    args = ("train", "deit3", "--data", file, "--smoke", "--batch-size", 2, "--steps", 1, "--workers", 0)
    with pytest.raises(SystemExit, match="0"):
        cli.main([*map(str, args), "--device", "cpu", "--out", str(tmp_path / "run")])
    assert held[0] < 0.01 * file.stat().st_size
