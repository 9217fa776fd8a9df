"""Shared by all tests. No tests/__init__.py: see CONTRIBUTING, 'one copy of the package'."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before mien.kernels is imported: without a GPU, tests interpret the Triton kernels.
    os.environ["TRITON_INTERPRET"] = "1"

from mien import models
from mien.kernels import dispatch

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def _folder(variable: str, *fallbacks: Path) -> Path | None:
    """The folder that a variable names, else the first fallback there is."""
    given = os.environ.get(variable)
    if given:
        folder = Path(given).expanduser()
        folder = folder if folder.is_absolute() else ROOT / folder
        if not folder.is_dir():
            raise pytest.UsageError(f"{variable} names {folder}, which is no folder")
        return folder
    return next((folder for folder in fallbacks if folder.is_dir()), None)


ORACLE = _folder("MIEN_ORACLE", ROOT.parent / "shared/oracle", TESTS / "oracle")
FACES = _folder("MIEN_FACES", ROOT.parent / "shared/faces")


def oracle_files(pattern: str) -> list[Path]:
    """Files of the oracle that match, sorted; a list to parametrise a test with."""
    return sorted(ORACLE.glob(pattern)) if ORACLE else []


def tiny_options(name: str) -> dict[str, Any]:
    """Options of the smallest model of a family."""
    options = dataclasses.asdict(models.family(name).tiny)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
    }


@pytest.fixture
def oracle_dir() -> Path:
    if ORACLE is None:
        pytest.skip("no oracle: set MIEN_ORACLE")
    return ORACLE


@pytest.fixture
def oracle(oracle_dir):
    """Load one file of the oracle, or skip the test where the folder lacks it."""

    def load(name: str):
        path = oracle_dir / name
        if not path.exists():
            pytest.skip(f"the oracle {oracle_dir} has no {name}")
        return np.load(path, allow_pickle=False)

    return load


@pytest.fixture
def faces_dir() -> Path:
    if FACES is None:
        pytest.skip("no real faces: set MIEN_FACES")
    return FACES


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty gives NaN, so a kernel that leaves part of its output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_device(device):
    """Where Triton kernels run in this test: on the GPU, else in Triton's interpreter."""
    if device == "cuda":
        yield device
        return
    with dispatch.interpreted():
        yield device


@pytest.fixture
def same_algorithms():
    """cuDNN chooses by rule, not by time, so that two runs can be compared bit by bit."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.deterministic = False


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
