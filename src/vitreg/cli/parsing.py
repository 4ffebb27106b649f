"""From words to a call: tyro reads a command's signature; what it refuses is told in one sentence."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING
from itertools import pairwise
from typing import Any

import tyro

from vitreg.cli.help import Flag, command_help, flags

# Flags that had another name in 0.1, by the first word of the command; they are accepted for one version.
_RENAMED = {
    "train": {"--precision": "--dtype", "--image-size": "--size"},
    "evaluate": {"--feature-batch-size": "--batch-size"},
}


def parse(name: str, command: Callable[..., int], args: list[str]) -> Callable[[], int]:
    """The call that the arguments ask for.

    Raises:
        ValueError: they make no sense; in one sentence.
    """
    found = list(flags(command))
    if not args and (missing := [flag.name for flag in found if flag.positional or flag.default is MISSING]):
        print(command_help(name, command), file=sys.stderr)
        raise ValueError(_missing(name, missing))

    @functools.wraps(command)
    def bound(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(command, *values, **named)

    told = io.StringIO()
    args = _renamed(name, args)
    paths = [flag.name for flag in found if flag.values == "PATH"]
    for flag, word in pairwise([*args, "-"]):
        if flag.removesuffix("=") in paths and (not word or flag.endswith("=")):  # the current folder, to `Path`
            raise ValueError(f"{flag.removesuffix('=')} is empty; give a path")
    try:
        # Where neither is a terminal, nothing is drawn or colored.
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(bound, prog=f"vitreg {name}", args=args, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit:
        raise ValueError(_refusal(name, told.getvalue(), found, args)) from None


def _renamed(name: str, args: list[str]) -> list[str]:
    """Old names of flags, replaced."""
    known, replaced = _RENAMED.get(name.split()[0], {}), []
    for number, word in enumerate(args):
        flag, equals, value = word.partition("=")
        new = known.get(flag.replace("_", "-"))
        # A size was a word in 0.1, and is pixels.
        following = value if equals else "".join(args[number + 1 : number + 2])
        if name == "train" and flag == "--size" and following.isalpha():
            new = "--arch"
        if new:
            print(f"vitreg: {flag} is now {new}; the old name goes in the next version", file=sys.stderr)
        replaced.append(f"{new or flag}{equals}{value}")
    return replaced


def _missing(name: str, flags: list[str]) -> str:
    return f"{name} needs {' and '.join(filter(None, [', '.join(flags[:-1]), flags[-1]]))}; see vitreg {name} --help"


def _refusal(name: str, box: str, found: list[Flag], args: list[str]) -> str:
    """The first part of tyro's box in a sentence, without what the help says better."""
    _, _, *lines = (line.removeprefix("  ") for line in box.splitlines())
    first, *others = re.split("-{20,}", "\n".join(lines))
    said = " ".join(first.split())
    if said.startswith("Missing from"):
        return _missing(name, re.findall(r"^ {4}(\S+)", first, flags=re.M))
    if said.startswith("Unrecognized options"):
        near = re.search(r"^ {4}(--\S+)", others[0], flags=re.M)
        hint = f"did you mean {near[1]}?" if near else f"see vitreg {name} --help"
        return f"{said.replace('Unrecognized options:', 'there is no option')}; {hint}"
    if wrong := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", said):
        choices = [choice for choice in re.findall(r"'(.*?)'", wrong[3]) if choice != "None"]
        return f"{wrong[2]} {wrong[1]} is unknown; choose from {', '.join(choices)}"
    if wrong := re.match(r"Missing value for argument '(.*)'", said):
        return f"{wrong[1]} needs a value; see vitreg {name} --help"
    if wrong := re.match(r"Error parsing (\S+): (.*)", said):
        for flag in found:
            if flag.name == wrong[1] and flag.name in args:
                return f"{flag.name} {args[args.index(flag.name) + 1]} is no value of it; give {flag.values}"
        return wrong[2]
    return said
