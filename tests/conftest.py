"""Fixtures shared by all tests: where the sample data and golden files are."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder of small pieces of public data sets (not part of the project)."""
    folder = Path(os.environ.get("HF_SEGVIT_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}; set HF_SEGVIT_SAMPLE_DATA to where it is")
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Finds a file by its name among the outputs of the official EoMT and ViT-P code on tiny random models."""
    # The repository holds some of them, to stay small; the other folder has more of the same form.
    folders = (GOLDEN, Path(os.environ.get("HF_SEGVIT_GOLDEN", ROOT.parent / "shared" / "golden")))

    def find(name: str) -> Path:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"{name} is neither in {folders[0]} nor in {folders[1]}; set HF_SEGVIT_GOLDEN to where it is")

    return find


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test that is marked `own_process`, fixtures included, in a process that has run nothing before."""
    if item.get_closest_marker("own_process") is None or "HF_SEGVIT_OWN_PROCESS" in os.environ:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", item.nodeid]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "HF_SEGVIT_OWN_PROCESS": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    reason = re.search(r"^SKIPPED \[1\] \S+ (.*)", done.stdout, re.MULTILINE)
    outcome, why = "failed", f"its process ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    if done.returncode == 0 and re.search(r"^1 passed", done.stdout, re.MULTILINE):
        outcome, why = "passed", None
    elif done.returncode == 0 and reason:
        outcome, why = "skipped", (str(item.path), item.location[1], f"Skipped: {reason[1]}")
    keywords = dict.fromkeys(item.keywords, 1)
    for when in ("setup", "call", "teardown"):
        own = (outcome, why) if when == "call" else ("passed", None)
        duration = time.perf_counter() - start if when == "call" else 0.0
        report = pytest.TestReport(item.nodeid, item.location, keywords, *own, when, duration=duration)
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)  # what the test before has left for this one
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
