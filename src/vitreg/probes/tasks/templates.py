"""Sentences about classes, for zero-shot classification: names of the classes, put into templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NAMED_TEMPLATES = ("openai", "simple")
_NO_WORD = re.compile(r"(n\d{8}|\d+)")


def sentences(templates: str | tuple[str, ...], name: str) -> list[str]:
    """A class name in every template.

    `"openai"` are the 80 that CLIP's figures on ImageNet are of, `"simple"` the 7 that do nearly as well; in one's own
    `{}` stands for the class.

    Raises:
        ValueError: there are no such templates, or open_clip is not installed.
    """
    if isinstance(templates, str):
        if templates not in NAMED_TEMPLATES:
            raise ValueError(
                f"templates is {templates!r}; choose {' or '.join(NAMED_TEMPLATES)}, or give a tuple of sentences"
            )
        open_clip = import_open_clip()
        functions = getattr(open_clip, f"{templates.upper()}_IMAGENET_TEMPLATES")
        return [function(name) for function in functions]
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates is {templates!r}; every one must have {{}} in the place of the class")
    return [template.replace("{}", name) for template in templates]


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """What to call a data set's classes in a sentence: spaces for underscores, the first of WordNet's synonyms.

    Where a thousand classes have numbers or WordNet ids for names, they are ImageNet's in their customary order, and
    the names are open_clip's.

    Raises:
        ValueError: the classes are numbers or WordNet ids of some other set.
    """
    if not classes:
        raise ValueError("the images have no classes; zero-shot classification needs labels")
    if wordless := [name for name in classes if _NO_WORD.fullmatch(name)]:
        if len(classes) == 1000 and len(wordless) == 1000:
            return tuple(import_open_clip().IMAGENET_CLASSNAMES)
        raise ValueError(
            f"the class {wordless[0]!r} is no word that a text tower knows; give the {len(classes)} class names, "
            f"in the order of the labels"
        )
    return tuple(name.split(",")[0].replace("_", " ").strip() for name in classes)


def import_open_clip() -> Any:
    """The package; a `ValueError` where it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError('zero-shot classification needs open_clip: pip install "vitreg[clip]"') from error
    return open_clip
