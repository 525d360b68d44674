"""Fixtures shared by all tests: where the optional sample data and golden files are."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _shared_folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}; set {variable} to where it is")
    return folder


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """Folder of small pieces of public data sets (not part of the project)."""
    return _shared_folder("HF_SEGVIT_SAMPLE_DATA", "data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of outputs of the official EoMT and ViT-P code on tiny random models."""
    return _shared_folder("HF_SEGVIT_GOLDEN", "golden")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
