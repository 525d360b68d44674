"""Fixtures shared by all tests: where the sample data and golden files are."""

import os
import subprocess
import sys
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
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `own_process` in a process that has run nothing before."""
    if pyfuncitem.get_closest_marker("own_process") is None or "HF_SEGVIT_OWN_PROCESS" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["HF_SEGVIT_OWN_PROCESS"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(
            f"its process ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}", pytrace=False
        )
    assert " passed" in done.stdout, done.stdout
    return True
