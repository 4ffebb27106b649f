"""The command line. Each command is a module of this package, which is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import vitreg
from vitreg.cli.output import INTERRUPTED, first_line, remember

PROBES = ("knn", "linear", "zero-shot", "tokens", "position", "reconstruction", "segmentation", "depth")
COMMANDS = (
    *("diagnose", "attention", "fix", "compare", "export", "extract", "discover"),
    *("evaluate all", *(f"evaluate {probe}" for probe in PROBES), "evaluate discovery"),
    *("train", "timeline", "models", "demo"),
)
"""The words of a command are its module and its function; help shows what its docstring says first."""

GROUPS = {"evaluate": "Ask what the features of models are worth, and what their tokens know."}
"""Commands of two words, by the first."""


def command(name: str, args: Sequence[str] = ()) -> Callable[..., int]:
    """The function of a command, from its module: `evaluate zero-shot` is `zero_shot` of `evaluate/zero_shot.py`.

    What `train` takes depends on the recipe among its arguments.
    """
    path = name.replace("-", "_").replace(" ", ".")
    module = importlib.import_module(f"{__name__}.{path}")
    return module.with_settings_of(args) if name == "train" else getattr(module, path.rpartition(".")[2])


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors are one line on stderr and exit status 2 (`--debug` shows where they arose)."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args
    remember(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: names of files need not be text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run([arg for arg in args if arg != "--debug"])
    except KeyboardInterrupt:
        print("vitreg: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"vitreg: {first_line(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _run(args: list[str]) -> int:
    """Answer without a command, or call the one that the arguments begin with."""
    if args == ["--version"]:
        print(vitreg.__version__)
        return 0
    group = args[0] if args and args[0] in GROUPS else ""
    named, rest = args[: 1 + bool(group)], args[1 + bool(group) :]
    name = " ".join(named)
    if name in COMMANDS:
        return _call(name, rest)
    asked = named[bool(group) :]
    if asked in ([], ["--help"], ["-h"]):
        print(_help(group), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"see {' '.join(['vitreg', group]).strip()} --help"
    raise ValueError(f"there is no command {name}; {hint}")


def _call(name: str, args: list[str]) -> int:
    import warnings

    from vitreg.cli.help import command_help
    from vitreg.cli.options import release_folders
    from vitreg.cli.parsing import parse

    if {"--help", "-h"} & set(args):
        print(command_help(name, command(name, args)))
        return 0
    # Pillow's, about images that are read all the same.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    call = parse(name, command(name, args), args)
    try:
        return call()
    finally:
        release_folders()


def _help(group: str) -> str:
    """The commands, or those of a group."""
    from vitreg.cli.help import commands_help, first_sentence

    names = {name: name.rpartition(" ")[::2] for name in COMMANDS}
    lines = {word: first_sentence(command(name)) for name, (first, word) in names.items() if first == group}
    about = GROUPS.get(group, "Find the artifacts of any Vision Transformer, and see what they do.")
    return commands_help(f"vitreg {group}".strip(), about, lines | ({} if group else GROUPS))


if __name__ == "__main__":
    main()
