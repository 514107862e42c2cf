"""What every room's tests share: where the optional data is, the models to judge on, and calm threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when the first of the GPU kernels is imported, by whatever test

TESTS = Path(__file__).parent
sys.path += [str(TESTS), str(TESTS / "load")]  # helper modules: fakes, tiny, layout_writers

from squamata.kernels.dispatch import use_backend  # noqa: E402
from squamata.load.hub import bundled  # noqa: E402
from squamata.pipeline import quantize  # noqa: E402


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def bundled_folder() -> Path:
    """Folder of the bundled float model (Mamba-2, 5M)."""
    return bundled()


@pytest.fixture(scope="session")
def bundled_calibration() -> Path:
    """The calibration text that comes with the bundled model."""
    return bundled() / "calibration.jsonl"


@pytest.fixture(scope="session")
def tiny_mamba1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float folder of a tiny random Mamba-1 with the bundled tokenizer."""
    from tiny import write_tiny_folder

    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "mamba1", "mamba1")


@pytest.fixture(scope="session")
def shipped(
    tmp_path_factory: pytest.TempPathFactory, bundled_folder: Path, bundled_calibration: Path, tiny_mamba1: Path
) -> Callable[[str, str], Path]:
    """``shipped("mamba1", "w4a16")``: the folder of that checkpoint, made once by the pipeline, reference kernels."""
    parent = tmp_path_factory.mktemp("shipped")

    def folder(kind: str, recipe: str) -> Path:
        out = parent / f"{kind}-{recipe}"
        if not out.exists():
            source = bundled_folder if kind == "mamba2" else tiny_mamba1
            with use_backend("ref"):
                quantize(source, recipe, out, calibration=bundled_calibration, samples=4, length=48, seed=1)
        return out

    return folder
