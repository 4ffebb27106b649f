"""What a command takes, from its signature and its docstrings, and what `--help` says of it, in 80 columns."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from tyro.conf import Positional, arg

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


def flags(takes: Any, default: Any = MISSING, group: str = "") -> Iterator[Flag]:
    """What a function, or a dataclass or `TypedDict` of options, takes; an instance gives other defaults."""
    hints, explained = get_type_hints(takes, include_extras=True), explanations(takes)
    for name, value in _defaults(takes, default).items():
        kind, *extras = get_args(hints[name]) if get_origin(hints[name]) is Annotated else [hints[name]]
        own: Any = next((extra for extra in extras if hasattr(extra, "metavar")), arg())
        text = own.help or explained.get(name, "")
        if dataclasses.is_dataclass(kind) or is_typeddict(kind):
            yield from flags(kind, value, text or (kind.__doc__ or "").splitlines()[0].replace("`", ""))
        elif Positional in extras:
            yield Flag(own.metavar or name, "", text, value, group)
        else:
            flag = f"--{'no-' if value is True else ''}{(own.name or name).replace('_', '-')}"
            yield Flag(flag, "" if kind is bool else _words(kind), text, value, group)


def _defaults(takes: Any, default: Any) -> dict[str, Any]:
    if is_typeddict(takes):  # what is not given is left out
        return dict.fromkeys(takes.__annotations__)
    if not dataclasses.is_dataclass(takes):
        parameters = inspect.signature(takes).parameters
        return {name: MISSING if p.default is p.empty else p.default for name, p in parameters.items()}
    if default is not MISSING:
        return {field.name: getattr(default, field.name) for field in dataclasses.fields(takes)}
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in dataclasses.fields(takes)
    }


def explanations(takes: Any) -> dict[str, str]:
    """From `Args:` or `Attributes:` of the docstring, and of what a dataclass extends."""
    explained: dict[str, str] = {}
    for source in reversed(inspect.getmro(takes)) if inspect.isclass(takes) else (takes,):
        _, *sections = re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(source.__doc__ or ""), flags=re.M)
        for entry in re.split(r"\n(?=    \w)", sections[0].split("\n\n")[0] if sections else ""):
            names, _, text = entry.partition(":")
            explained |= {name.strip(): " ".join(text.replace("`", "").split()) for name in names.split(",")}
    return explained


def first_sentence(command: Callable[..., Any]) -> str:
    """What a command does, in a line."""
    return (command.__doc__ or "").splitlines()[0]


def command_help(name: str, command: Callable[..., Any]) -> str:
    """What `--help` of a command prints; what must be given comes first."""
    found = sorted(flags(command), key=lambda flag: flag.default is not MISSING)
    positional = [flag.name for flag in found if flag.positional]
    about = inspect.cleandoc(command.__doc__ or "").split("\nArgs:")[0].strip()
    told = [" ".join(["usage: vitreg", name, *positional, "[OPTIONS]"]), ""]
    for paragraph in about.split("\n\n"):
        told += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH, break_on_hyphens=False), ""]
    for group in dict.fromkeys(["", *(flag.group for flag in flags(command))]):
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
    if flag.default is MISSING:
        says += " (required)"
    elif words and not isinstance(flag.default, bool | None):
        says += f" (default: {words})"
    either = flag.default is None and not flag.values and not flag.positional  # a switch that a recipe decides
    name = flag.name.replace("--", "--[no-]") if either else flag.name
    head, indent = f"  {name} {flag.values}".rstrip(), " " * _TEXT
    first = textwrap.wrap(head, _WIDTH, subsequent_indent="    ") if len(head) > _TEXT - 2 else []
    start = indent if first else f"{head:{_TEXT}}"
    return first + textwrap.wrap(says, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def _words(kind: Any) -> str:
    """What a value of a type is called."""
    origin, args = get_origin(kind), [arg for arg in get_args(kind) if arg is not type(None)]
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (Union, types.UnionType):
        return " | ".join(map(_words, args))
    if origin in (tuple, list):
        return f"{_words(args[0])} ..." if origin is list or args[-1] is ... else " ".join(map(_words, args))
    return {int: "INT", float: "FLOAT", Path: "PATH", bool: "{True,False}"}.get(kind, "TEXT")
