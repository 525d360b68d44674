"""Fixtures shared by all tests: where the sample data and golden files are."""

import os
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
