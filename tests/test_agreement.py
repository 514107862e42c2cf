"""The table of differing integers: nothing may differ on a trained model, and a planted fault is seen."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from judged import SHIPPED

from squamata.kernels.dispatch import use_backend
from squamata.pipeline import quantize
from squamata.save.read import read_checkpoint
from squamata.spec.recipe import Recipe

QUAMBA2 = Recipe.from_mapping(
    {
        "name": "quamba2-pieces",
        "extends": "quamba-w8a8",
        "transforms": ["reorder", "hadamard"],
        "rules": [
            {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index", "rounding": "half-away"}},
            {"site": "*.mixer.[BC]_conv", "spec": {"bits": 8, "granularity": "ssd_group"}},
            {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state", "rounding": "half-away"}},
        ],
        "architectures": ["mamba2"],
    }
)


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "agreement.py"
    spec = importlib.util.spec_from_file_location("agreement", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreement"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grouped(bundled_folder: Path, bundled_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with Quamba2's scales."""
    out = tmp_path_factory.mktemp("grouped") / "out"
    with use_backend("ref"):
        quantize(bundled_folder, QUAMBA2, out, calibration=bundled_calibration, samples=4, length=48)
    return out


@torch.no_grad()
def judged(agreement: ModuleType, folder: Path, bundled_folder: Path, tokens: int = 80, decoded: int = 4) -> Any:
    judge = agreement.Judge(read_checkpoint(folder), folder.name)
    judge.run(agreement.text_ids(bundled_folder, bundled_folder / "excerpt.jsonl", tokens), decoded)
    return judge


FOR_MAMBA2 = [  # a state rounded by noise is another one in every kernel: tests/kernels/test_stochastic_rounding.py
    name for name in SHIPPED if "mamba2" in Recipe.read(name).architectures and not Recipe.read(name).stochastic
]


@pytest.mark.parametrize("recipe", [*FOR_MAMBA2, "quamba2-pieces"])
def test_integers_are_those_of_the_simulation(
    recipe: str, agreement: ModuleType, grouped: Path, shipped: Callable[[str, str], Path], bundled_folder: Path
) -> None:
    folder = grouped if recipe == "quamba2-pieces" else shipped("mamba2", recipe)
    judge = judged(agreement, folder, bundled_folder)
    counts = list(judge.counts.values())
    assert not [count for count in counts if count.violated]
    if recipe.startswith("quamba") and "w4a16" not in recipe:
        compared = {(count.phase, count.site) for count in counts}
        assert {("prefill", site) for site in ("in", "z", "x", "dt", "u", "B_conv", "state", "out")} <= compared
        assert {("decode", "state"), ("decode", "inputs kept")} <= compared and judge.whole is not None


@torch.no_grad()
def test_a_scale_that_one_contestant_has_wrong_is_seen(
    agreement: ModuleType, grouped: Path, bundled_folder: Path
) -> None:
    judge = agreement.Judge(read_checkpoint(grouped), "bundled")
    site = judge.models["cpu"].blocks[3].sites["u"]
    site.set_scale(site.scale * (1 + 2**-10))
    judge.run(agreement.text_ids(bundled_folder, bundled_folder / "excerpt.jsonl", 40), 0)
    violated = {(count.site, count.contestant) for count in judge.counts.values() if count.violated}
    assert ("u", "cpu") in violated and not [site for site, _ in violated if site in ("in", "x", "z", "B_conv")]
