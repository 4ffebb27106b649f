"""Files that a kill leaves whole: the one way to write them, and that there is no other."""

from __future__ import annotations

import ast
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vitreg
from vitreg.common.disk import _PARTIAL, lock, replace_text, replacing, replacing_files, unlock


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    replace_text(path, "old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt"
        assert _PARTIAL.fullmatch(temporary.name), "which `lock` removes after a kill"
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    replace_text(tmp_path / "file", "old")

    def fail() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_everyone_may_read_what_safetensors_writes(tmp_path):
    with replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.ones(1)}, temporary)
    replace_text(tmp_path / "a.txt", "")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_files_of_a_folder_take_their_places_beside_others(tmp_path):
    with replacing_files(tmp_path / "folder") as folder:
        assert not (tmp_path / "folder").exists()
        (folder / "a").write_text("old")
    (tmp_path / "folder" / "kept").write_text("kept")
    with replacing_files(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.glob("*/*")} == {"kept": "kept", "a": "new", "b": "new"}


@pytest.mark.parametrize("kind", ["text", "safetensors"])
def test_a_full_disk_is_one_sentence(tmp_path, kind):
    def write() -> None:
        if kind == "text":
            replace_text(tmp_path / "file", "x" * 100_000)
        else:
            with replacing(tmp_path / "file") as temporary:
                save_file({"x": torch.ones(100_000)}, temporary)

    replace_text(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: File too large; make room, or choose"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_lock_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / ".shard-0.vitreg-4711.partial.safetensors").write_bytes(b"half")
    (tmp_path / ".record.vitreg-4711.partial").write_bytes(b"half")
    for kept in ("whole", ".film.720.partial.mp4", ".film.partial"):
        (tmp_path / kept).write_text("of others")
    held = lock(tmp_path, "works in")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".film.720.partial.mp4",
        ".film.partial",
        ".lock",
        "whole",
    ]
    assert held is not None
    unlock(held)
    assert not (tmp_path / ".lock").exists()


def _writes(call: ast.Call) -> bool:
    """Whether a call writes a file anew; appending to a log is no such thing."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        modes = [argument.value for argument in ast.walk(call) if isinstance(argument, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wx+") and len(mode) <= 3 for mode in modes)
    return name in {"write_text", "write_bytes", "savefig", "save", "save_file", "dump", "rename", "move", "copyfile"}


def test_nothing_but_disk_writes_a_file_in_place():
    source = Path(vitreg.__file__).parent
    found = []
    for file in source.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            text = ast.unparse(call)
            names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            # A name of `replacing`, memory, or a function of ours that does either.
            safe = names & {"temporary", "buffer"} or text.startswith(
                ("vitreg.save(", "save(vit,", "self.logger.save(")
            )
            ours = text in (
                "diagnosis.save(out, command=command_line())",
                "comparison.save(out, command=command_line())",
                "comparison.save(folder, command=command_line())",
                "findings.save(folder)",
                "save(tensors, {'vitreg': json.dumps(note)})",
            )
            if (_writes(call) or text.startswith("os.replace(")) and not safe and not ours:
                found.append(f"{file.relative_to(source)}:{call.lineno}: {text}")
    assert [line for line in found if not line.startswith("common/disk.py")] == []
