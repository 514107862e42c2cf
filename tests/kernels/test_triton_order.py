"""Kernels that start before their predecessors have ended: what they touch before they wait, in Triton's interpreter.

Tests without dependent launch cannot see a race, and a GPU shows it now and then; here every address is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")
import triton.language as tl
from launch_order import CAN_RECORD, recorded, violations
from test_triton_decode import CASES, recipe, small
from tiny import config_of, perturbed_tensors, quantized, random_ids
from triton import jit

from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import count_program, wait_for_previous, wait_for_programs, wanted_programs
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.spec.recipe import Recipe

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="addresses are seen in Triton's interpreter only"),
    pytest.mark.skipif(not CAN_RECORD, reason="this Triton's interpreter is another inside"),
]


def decoder_of(config: ModelConfig, chosen: Recipe, batch: int) -> CapturedDecoder:
    checkpoint = quantized(config, perturbed_tensors(config), chosen, [random_ids(config, 2, 24)])
    return CapturedDecoder(LanguageModel(checkpoint), batch, "cpu", pdl=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_token_keeps_the_rules(kind: str, case: str) -> None:
    config = small(kind)
    with recorded() as launches:
        decoder = decoder_of(config, recipe(case), 2)
        launches.clear()  # those that would compile
        decoder.step(random_ids(config, 2, 1)[:, 0])
    assert sum(launch.dependent for launch in launches) > 4 * len(config.blocks)
    assert violations(launches) == []


def test_a_token_of_a_falcon_keeps_the_rules() -> None:
    config = config_of("mamba1", d_model=64, d_inner=128, dt_rank=16, bcdt_norm_epsilon=1e-5)
    with recorded() as launches:
        decoder = decoder_of(config, recipe("w8a8"), 1)
        launches.clear()
        decoder.step(random_ids(config, 1, 1)[:, 0])
    assert violations(launches) == []


@pytest.mark.parametrize(("kind", "case"), [("mamba1", "w8a8"), ("mamba2", "w4a8")])
def test_a_prompt_keeps_the_rules(kind: str, case: str) -> None:
    """Of them the one that holds without dependent launch too: programs do not use what another one writes."""
    config = small(kind)
    with recorded() as launches:
        decoder = decoder_of(config, recipe(case), 2)
        launches.clear()
        decoder.prefill(random_ids(config, 2, 20))
    assert len(launches) > 8 * len(config.blocks)
    assert violations(launches) == []


@jit
def _adds(x, y, counter, EARLY: tl.constexpr, COUNTS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x + 1, a number a program, the first program counted; with EARLY read before waiting."""
    at = tl.program_id(0)
    early = tl.load(x + at) if EARLY else 0.0
    wait_for_previous(PDL)
    tl.store(y + at, (early if EARLY else tl.load(x + at)) + 1)
    if COUNTS and at == 0:
        count_program(counter)


@jit
def _goes_on(x, y, after, MORE: tl.constexpr, WAITS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x + 1 as soon as the counter allows; MORE numbers are read."""
    wait_for_programs(after, wanted_programs(after), PDL, False)
    at = tl.program_id(0) + tl.arange(0, MORE)
    tl.store(y + at, tl.load(x + at) + 1)
    if WAITS:
        wait_for_previous(PDL)


def found(*launches: Callable[[], None]) -> str:
    """What is said of a token of these launches."""
    with recorded() as seen:
        for launch in launches:
            launch()
    return "; ".join(violations(seen))


def test_what_breaks_a_rule_is_found() -> None:
    x, y, z = torch.zeros(3, 8)

    def first() -> None:
        _adds[(2,)](x, y, None, EARLY=False, COUNTS=False, PDL=False)

    def second(early: bool = False) -> None:
        _adds[(2,)](y, z, None, EARLY=early, COUNTS=False, PDL=True)

    assert found(first, second) == ""
    assert "reads before it waits 8 bytes" in found(first, lambda: second(early=True))
    assert "does not wait for the last one" in found(second)
    sharing = found(lambda: _goes_on[(2,)](y, z, None, MORE=2, WAITS=True, PDL=False))
    assert "programs of 0 (_goes_on) share 4 bytes" in sharing


def test_what_a_counter_does_not_tell_of_is_found() -> None:
    x, y, z = torch.zeros(3, 8)
    counter, steps = torch.zeros(2, dtype=torch.int64).split(1)

    def first() -> None:
        _adds[(2,)](x, y, counter, EARLY=False, COUNTS=True, PDL=False)

    def last(out: torch.Tensor = z, more: int = 1, waits: bool = True) -> None:
        _goes_on[(1,)](y, out, (counter, steps, 1), MORE=more, WAITS=waits, PDL=True)

    assert found(first, last) == ""
    assert "reads 4 bytes that the counter does not tell of" in found(first, lambda: last(more=2))
    assert "1 programs of 1 (_goes_on) end without having waited" in found(first, lambda: last(waits=False))
    assert "writes 4 bytes that _adds may still use" in found(first, lambda: last(out=x))
