"""Run a command many times, each in a forked process that is killed at another moment, and then once to its end.

Argument: JSON with `command`, `output` (file or folder that it writes), `tries`, `seed`, and `restore` (a folder that
is copied to the output before each try, or null). Prints JSON: the `whole` output of an uninterrupted run, and for each
of the `tries` the moment, what the kill left, the exit code of the run after it, and what that left.

The moments are operations on files, drawn at random: a process that only computes has nothing to leave half-written.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import torch

from hf_segvit.cli import main

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "ctypes.dlsym", "fcntl.lockf")


def snapshot(output: Path) -> dict[str, str] | None:
    """Hash of each file that has its final name; `None` if there is no output."""
    if not output.exists():
        return None
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(output).parts)]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(visible)}


def run(command: list[str], output: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Exit code of the command in a forked process, and the operations that it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        count, folder = 0, str(output.parent)

        def note(event, arguments):
            nonlocal count
            if event not in EVENTS or (event == "open" and not str(arguments[0]).startswith(folder)):
                return
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), 9)

        sys.addaudithook(note)
        code = 70
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            code = main(command)
        os.write(writing, str(count).encode())
        os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        count = int(pipe.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


def restore(output: Path, original: str | None) -> None:
    for path in output.parent.glob(f"*{output.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if original is not None:
        shutil.copytree(original, output)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    settings = json.loads(sys.argv[1])
    command, output = settings["command"], Path(settings["output"])
    restore(output, settings["restore"])
    with contextlib.redirect_stdout(io.StringIO()):
        main(command)  # imports everything, once for all
    restore(output, settings["restore"])
    code, operations = run(command, output)
    result = {"code": code, "operations": operations, "whole": snapshot(output), "tries": []}
    tries = min(settings["tries"], operations)
    for moment in random.Random(settings["seed"]).sample(range(1, operations + 1), tries):
        restore(output, settings["restore"])
        killed, _ = run(command, output, moment)
        left = snapshot(output)
        code, _ = run(command, output)
        result["tries"].append(
            {"moment": moment, "killed": killed, "left": left, "code": code, "after": snapshot(output)}
        )
    print(json.dumps(result))
