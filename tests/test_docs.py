"""The code that the documentation shows runs, and its links and commands exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_code_runs(page, test_data, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in photographs[:8]:
        shutil.copy(path, tmp_path / "photos")
    from vitreg.images import bundled_photographs

    shutil.copy(next(p for p in bundled_photographs() if "chelsea" in p.name), tmp_path / "photos" / "cat.png")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
    if page.name == "README.md":
        assert len(blocks) >= 2
        assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_shown_commands_parse():
    """Every `vitreg ...` line of the documentation is a command with flags that exist."""
    from vitreg import cli
    from vitreg.cli.options import ModelOptions

    lines = [
        line.split("#")[0].strip()
        for page in PAGES
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if line.startswith("    vitreg ")
    ]
    assert len(lines) >= 3
    for line in lines:
        _, *rest = shlex.split(line)
        command = " ".join(rest[:2]) if " ".join(rest[:2]) in cli.COMMANDS else rest[0]
        flags = {part.removeprefix("--").replace("-", "_") for part in rest if part.startswith("--")}
        hints = get_type_hints(cli.command(command))
        options = [set(getattr(hint, "__dataclass_fields__", ())) for hint in hints.values()]
        known = set(hints).union(ModelOptions.__dataclass_fields__, *options)
        assert flags <= known, line
