"""The photographs that come with the package."""

import re
from pathlib import Path

import vitreg
from vitreg.images import bundled_photographs, read_image


def test_photographs_come_with_the_package_not_with_scikit_image():
    """They were scikit-image's, which was installed for nothing else."""
    paths = bundled_photographs()
    folder = Path(vitreg.__file__).parent / "images" / "photographs"
    assert {path.name for path in folder.iterdir()} == {"README.md", *(path.name for path in paths)}
    assert len(paths) == 9
    assert all(path.parent == folder for path in paths)
    assert all(300 <= min(read_image(path).size) <= 400 for path in paths)
    assert sum(path.stat().st_size for path in paths) < 500_000


def test_the_card_says_of_every_photograph_why_it_is_free():
    card = (bundled_photographs()[0].parent / "README.md").read_text(encoding="utf-8")
    free = dict(re.findall(r"^\| `(\S+)` \|.*\| (.+) \|$", card, re.MULTILINE))
    assert list(free) == [path.name for path in bundled_photographs()]
    assert all(re.search("CC0|public domain|no known copyright", why) for why in free.values())
