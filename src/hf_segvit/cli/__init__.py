"""The command `hf-segvit`: its subcommands, and how errors become exit codes.

Each subcommand is a module with `add_parser(subparsers)` and `run(args) -> int`; heavy imports happen in `run`,
after everything that can be refused without them, so that help and mistakes are answered at once.
Exit codes: 0 all done; 1 done, but not for every input; 2 wrong usage, settings or files, told in one line on stderr;
75 training was asked to stop, has saved, and can go on; 130 interrupted.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

_NEGATIVE = re.compile(r"-[\d.]+(,[-\d.]+)+")  # numbers in a row, such as -5,240
COMMANDS = ("segment", "classify-points", "check-data", "train", "evaluate", "demo", "convert", "push")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; `None` takes those of the process.

    Returns:
        The exit code.
    """
    args = None
    try:
        args = _parse(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("hf-segvit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if args is None or args.debug:
            raise
        print(f"hf-segvit {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. argparse takes no more `key=value` once an option came in between; they are collected here."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    # No option before the command takes a value, so the first word that is none is the command.
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        from ..lookup import suggestion

        parser.error(f"there is no command {command!r}; {suggestion(command, COMMANDS)}")
    # A word that begins with a blank is never taken for an option, and numbers may have blanks around them.
    args, rest = parser.parse_known_args([f" {word}" if _NEGATIVE.fullmatch(word) else word for word in words])
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="hf-segvit", description="Segment images with plain Vision Transformers (EoMT)."
    )
    parser.add_argument("--version", action="version", version=f"hf-segvit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        # Not at the top of this file, as `main` then tells of Ctrl-C in one line while they are imported, too.
        import_module(f".{command.replace('-', '_')}", __name__).add_parser(subparsers)
    return parser
