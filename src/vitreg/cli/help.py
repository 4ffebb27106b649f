"""What help says: a command's flags, from its signature and its docstrings, in 80 columns."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

_WIDTH = 80
_TEXT = 18
"""Column that explanations begin at."""


@dataclass(frozen=True)
class Flag:
    """An argument of a command.

    Attributes:
        name: `--batch-size`, or `IMAGES` where the value stands alone.
        values: what follows the name.
        explained: what it does.
        default: `dataclasses.MISSING` where it must be given.
        group: of which options it is one; empty for the command's own.
    """

    name: str
    values: str
    explained: str
    default: Any
    group: str

    @property
    def positional(self) -> bool:
        """Whether the value stands alone."""
        return not self.name.startswith("--")

    @property
    def required(self) -> bool:
        """Whether a command without it is incomplete."""
        return self.default is MISSING


def flags(takes: Callable[..., Any], default: Any = MISSING, group: str = "") -> Iterator[Flag]:
    """What a command takes, and the dataclasses that are its options, whose defaults may be an instance's."""
    hints, explained = get_type_hints(takes, include_extras=True), _explanations(takes)
    if dataclasses.is_dataclass(takes):
        made = {
            field.name: field.default_factory() if field.default_factory is not MISSING else field.default
            for field in dataclasses.fields(takes)
        }
        values = made if default is MISSING else {name: getattr(default, name) for name in made}
    else:
        parameters = inspect.signature(takes).parameters.values()
        values = {p.name: MISSING if p.default is inspect.Parameter.empty else p.default for p in parameters}
    for name, value in values.items():
        kind, text = hints[name], explained.get(name, "")
        if dataclasses.is_dataclass(kind):
            yield from flags(kind, value, text)  # pyright: ignore[reportArgumentType]
            continue
        shown = f"--{name.replace('_', '-')}" if value is not True else f"--no-{name.replace('_', '-')}"
        words = _words(kind)
        if Positional in getattr(kind, "__metadata__", ()):
            shown, words = words, ""
        yield Flag(shown, "" if kind is bool else words, text, value, group)


def command_help(name: str, command: Callable[..., Any]) -> str:
    """What `--help` of a command prints."""
    found = list(flags(command))
    positional = [flag.name for flag in found if flag.positional]
    about = inspect.cleandoc(command.__doc__ or "").split("\nArgs:")[0].strip()
    told = [" ".join(["usage: vitreg", name, *positional, "[OPTIONS]"]), ""]
    for paragraph in about.split("\n\n"):
        told += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH, break_on_hyphens=False), ""]
    for group in dict.fromkeys(["", *(flag.group for flag in found)]):
        told += [f"{group.rstrip('.') or 'options'}:"]
        told += [line for flag in found if flag.group == group for line in _lines(flag)] + [""]
    return "\n".join(told[:-1])


def commands_help(prog: str, about: str, commands: dict[str, str]) -> str:
    """What `vitreg --help` and the help of a group print: a line for each command."""
    told = [f"usage: {prog} COMMAND ...", "", about, ""]
    for name, says in commands.items():
        told += textwrap.wrap(says, _WIDTH, initial_indent=f"  {name:15} ", subsequent_indent=" " * _TEXT)
    return "\n".join([*told, "", f"{prog} COMMAND --help explains a command; --debug shows tracebacks."])


def _lines(flag: Flag) -> list[str]:
    values = flag.default if isinstance(flag.default, tuple) else (flag.default,)
    shown = [format(value, "g") if isinstance(value, float) else str(value) for value in values]
    words = " ".join(shown if len(shown) <= 13 else [shown[0], "...", shown[-1]])
    says = f"{'do not ' if flag.default is True else ''}{flag.explained}"
    if flag.required:
        says += " (required)"
    elif words and not isinstance(flag.default, bool | None):
        says += f" (default: {words})"
    head, indent = f"  {flag.name} {flag.values}".rstrip(), " " * _TEXT
    first = textwrap.wrap(head, _WIDTH, subsequent_indent="    ") if len(head) > _TEXT - 2 else []
    start = indent if first else f"{head:{_TEXT}}"
    return first + textwrap.wrap(says, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def _words(kind: Any) -> str:
    """What a value of a type is called; what a type says for itself comes first."""
    origin, args = get_origin(kind), [arg for arg in get_args(kind) if arg is not type(None)]
    if origin is Annotated:
        named = [extra.metavar for extra in get_args(kind)[1:] if getattr(extra, "metavar", None)]
        return named[0] if named else _words(args[0])
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (Union, types.UnionType):
        return " | ".join(map(_words, args))
    if origin in (tuple, list):
        return f"{_words(args[0])} ..." if origin is list or args[-1] is ... else " ".join(map(_words, args))
    return {int: "INT", float: "FLOAT", Path: "PATH", bool: "{True,False}"}.get(kind, "TEXT")


def _explanations(takes: Callable[..., Any]) -> dict[str, str]:
    """From `Args:` or `Attributes:` of the docstring, and of what a dataclass extends."""
    explained: dict[str, str] = {}
    for source in reversed(inspect.getmro(takes)) if inspect.isclass(takes) else (takes,):
        _, *sections = re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(source.__doc__ or ""), flags=re.M)
        for entry in re.split(r"\n(?=    \w)", sections[0].split("\n\n")[0] if sections else ""):
            names, _, text = entry.partition(":")
            explained |= {name.strip(): " ".join(text.replace("`", "").split()) for name in names.split(",")}
    return explained
