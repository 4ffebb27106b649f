"""The code that the documentation shows runs, and its links and commands exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
CODE = re.compile(r"```(?:\{code-cell\} )?python\n(.*?)```", re.DOTALL)
BLOCKS = {page: blocks for page in PAGES if (blocks := CODE.findall(page.read_text()))}
OFFLINE = {DOCS / "tutorials", DOCS / "how-to"}
"""What is here runs on what comes with the package, as the site is built."""


@pytest.mark.parametrize("page", [page for page in BLOCKS if page.parent in OFFLINE], ids=lambda p: p.name)
def test_tutorials_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def run(page: Path) -> None:
    scope: dict[str, object] = {}
    for block in BLOCKS[page]:
        exec(compile(block, str(page), "exec"), scope)


@pytest.mark.parametrize("page", [page for page in BLOCKS if page.parent not in OFFLINE], ids=lambda p: p.name)
def test_python_code_runs(page, test_data, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("VITREG_CHECKPOINTS", str(test_data / "weights"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for path in photographs[:8]:
        shutil.copy(path, tmp_path / "photos")
    from vitreg.images import bundled_photographs, read_image

    cat = next(path for path in bundled_photographs() if path.stem == "chelsea")
    read_image(cat).save(tmp_path / "photos" / "cat.png")
    if page.name == "pipelines.md":
        for library in ("open_clip", "transformers", "onnxruntime", "onnxscript"):
            pytest.importorskip(library)
        from pretrained import write_models

        write_models(tmp_path, monkeypatch)
    run(page)
    if page.name == "README.md":
        assert len(BLOCKS[page]) >= 2
        assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_all_pages_and_names_are_on_the_site():
    import vitreg

    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"index"})
    reference = (DOCS / "api" / "index.md").read_text()
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", reference, re.MULTILINE)) == sorted(vitreg.__all__)
    rooms = {path.parent.name for path in (ROOT / "src" / "vitreg").glob("*/__init__.py")} - {"cli", "common"}
    assert {path.stem for path in (DOCS / "api").glob("*.md")} == rooms | {"index"}


def test_shown_commands_parse():
    """Every `vitreg ...` line of the documentation is a command with flags that exist."""
    from vitreg import cli
    from vitreg.cli.help import flags

    lines = [
        line.split("#")[0].strip()
        for page in PAGES
        for line in page.read_text().replace("\\\n", " ").splitlines()
        if line.startswith("    vitreg ")
    ]
    assert len(lines) >= 3
    table = [line for line in (ROOT / "docs" / "evidence.md").read_text().splitlines() if line.startswith("|")]
    in_table = re.findall(r"`(vitreg [^`]+)`", "\n".join(table))
    assert len(in_table) >= 3
    lines += in_table
    for line in lines:
        _, *rest = shlex.split(line)
        name = " ".join(rest[:2]) if " ".join(rest[:2]) in cli.COMMANDS else rest[0]
        known = {flag.name for flag in flags(cli.command(name, rest))}
        assert {part for part in rest if part.startswith("--")} <= known, line


def test_the_table_of_flags_is_that_of_the_parsers():
    from vitreg import cli
    from vitreg.cli.help import flags

    have = {name: {flag.name for flag in flags(cli.command(name))} for name in cli.COMMANDS}
    probes = [names for name, names in have.items() if name.startswith("evaluate ") and name != "evaluate discovery"]
    table = [line for line in (ROOT / "docs" / "commands.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert {*header[2:]} - {"evaluate PROBE"} == {name for name in have if have[name] not in probes}
    for row in rows:
        flag = row[0].strip("`")
        for command, said in zip(header[2:], row[2:], strict=True):
            found = [flag in names for names in (probes if command == "evaluate PROBE" else [have[command]])]
            assert said == ("yes" if all(found) else "some" if any(found) else ""), (flag, command)
