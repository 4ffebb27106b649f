"""What differs between Linux, macOS and Windows, held by the sources."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [file for folder in ("src", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


def calls(file: Path):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_text_is_read_and_written_in_utf_8_whatever_the_locale():
    """Windows and some containers have another default, in which names of classes and captions are lost."""
    without = []
    for file in FILES:
        for call in calls(file):
            name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
            if any(keyword.arg == "encoding" for keyword in call.keywords):
                continue
            mode = next((k.value for k in call.keywords if k.arg == "mode"), None)
            first = call.args[0] if call.args and isinstance(call.func, ast.Attribute) else mode
            if isinstance(call.func, ast.Name) and name == "open":
                first = call.args[1] if len(call.args) > 1 else mode
            owner = ast.unparse(call.func)
            text = (name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)) or (
                name == "open"
                and isinstance(first, ast.Constant | None)
                and (first is None or (isinstance(first.value, str) and "b" not in first.value))
                and not owner.startswith(("Image.", "os.", "FeatureStore.", "cls."))
            )
            if text:
                without.append(f"{file.name}:{call.lineno}: {ast.unparse(call)[:60]}")
    assert not without, without


@pytest.mark.parametrize("module", ["fcntl", "resource", "pwd", "grp", "termios"])
def test_modules_that_only_unix_has_are_not_imported_with_vitreg(module):
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert module not in names, file


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    """macOS has none."""
    from vitreg.common.devices import available_cores

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()
