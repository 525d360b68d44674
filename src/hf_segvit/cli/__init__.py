"""The command `hf-segvit`: subcommands, and exit codes for errors.

Each subcommand is a module with `add_parser(subparsers)` and `run(args) -> int`. Exit codes: 0 success; 1 done, but not
for every input, or not at all because the disk is full; 2 wrong usage, settings or files, with one line on stderr; 75
asked to stop, what was done is saved, and can be resumed; 130 interrupted.
"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..atomic_files import is_disk_full
from ..lookup import printable
from .terminal import escaped_output

_NEGATIVE = re.compile(r"-[\d.]+([,-]-?[\d.]+)+")  # several numbers, such as -5,240 and -1024-3071
# Modules import PyTorch in `run`, after all checks that do not need it, so that help and mistakes take no time.
COMMANDS = (
    "segment",
    "classify-points",
    "check-data",
    "train",
    "compare",
    "evaluate",
    "benchmark",
    "demo",
    "app",
    "convert",
    "export",
    "push",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; `argv` defaults to the process's arguments."""
    for stream in (sys.stdout, sys.stderr):
        # A class or file name that the terminal's encoding lacks must not end a command: it is written as an escape.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with escaped_output():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    """Run the command line; every expected error becomes a line and an exit code."""
    args = None
    try:
        args = _parse(argv)
        _refuse_impossible_paths(sys.argv[1:] if argv is None else argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("hf-segvit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has exited; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        full = is_disk_full(error)  # which libraries report by errors of their own
        # An error before the arguments are parsed is a bug, and so is one of another kind.
        if args is None or args.debug or not (full or isinstance(error, ValueError | OSError)):
            raise
        text = "\n".join(map(printable, _in_words(error).split("\n")))
        if full and "the disk is full" not in text:
            text = f"the disk is full ({text}); make room and run the same command again"
        print(f"hf-segvit {args.command}: error: {text}", file=sys.stderr)
        return 1 if full else 2


def _in_words(error: Exception) -> str:
    """The text of an error; for one of the system the file, what is wrong with it, and the remedy."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno, "check the path and its permissions")
    return f"{str(error.filename)[:_LONGEST_PATH]}: {str(error.strerror).lower()}; {remedy}"


_LONGEST_PATH = 400
_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "change its permissions, or name another",
    errno.ELOOP: "it is a link that leads to itself; name the file",
}


def _refuse_impossible_paths(words: Sequence[str]) -> None:
    """Refuse words with a null, which no path can hold, and homes of users who are unknown to this machine."""
    for word in words:
        if "\0" in word:
            raise ValueError(f"{word.replace(chr(0), '?')!r} holds a null character, which no path can; correct it")
        for home in re.findall(r"(?:^|(?<=[:=,]))~[^/\\,?&]+", word):
            if os.path.expanduser(home) == home and not os.path.lexists(home):
                raise ValueError(f"{word[:_LONGEST_PATH]}: there is no user {home[1:]!r} here; check the path")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments, with `key=value` words at any position."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    # No option before the command takes a value, so the first other word is the command.
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        from ..lookup import suggestion

        parser.error(f"there is no command {command!r}; {suggestion(command, COMMANDS)}")
    # argparse never takes a word that begins with a blank for an option; our numbers may have blanks around them.
    args, rest = parser.parse_known_args([f" {word}" if _NEGATIVE.fullmatch(word) else word for word in words])
    # argparse stops collecting `key=value` words at the first option between them.
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
        # Imported here, so that `main` also handles Ctrl-C during the imports.
        import_module(f".{command.replace('-', '_')}", __name__).add_parser(subparsers)
    return parser
