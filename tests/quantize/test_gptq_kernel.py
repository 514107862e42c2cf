"""GPTQ's block of columns as one kernel against the loop, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from test_gptq import COLUMNS, LAYOUT, loss, problem

from squamata.kernels.gpu.columns import round_columns
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.qtensor import QTensor
from squamata.quantize.gptq import gptq
from squamata.scales.gram import Gram
from squamata.spec.quant import QuantSpec

DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(weight: torch.Tensor, spec: QuantSpec, gram: Gram, monkeypatch: pytest.MonkeyPatch,
              act_order: bool = False) -> QTensor:  # fmt: skip
    """By the kernel, which the CPU is made to take."""
    monkeypatch.setattr(import_module("squamata.quantize.gptq"), "_fused", lambda weight, spec: True)
    moved = Gram(COLUMNS)
    moved.gram, moved.count = gram.gram.to(DEVICE), gram.count
    with torch.device(DEVICE):
        return gptq(weight.to(DEVICE), spec, LAYOUT, moved, act_order=act_order).to("cpu")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "segment", "group(16)", "group(33)", "group(128)"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_kernel_gives_the_codes_of_the_loop(
    granularity: str, bits: int, symmetric: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs, gram = problem()
    spec = QuantSpec.model_validate({"bits": bits, "granularity": granularity, "symmetric": symmetric})
    wanted = gptq(weight, spec, LAYOUT, gram, act_order=act_order)
    found = on_device(weight, spec, gram, monkeypatch, act_order)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-5, atol=0)
    assert (found.codes() != wanted.codes()).float().mean() < 0.01  # sums are rounded otherwise: ties may fall so too
    assert loss(weight, found, inputs) < 1.01 * loss(weight, wanted, inputs)


@pytest.mark.parametrize("rounding", ["half-even", "half-away", "truncate"])
def test_a_block_is_the_recurrence_in_float64(rounding: str) -> None:
    """Every column rounded where the ones before it have left it; rows that fill no program, poisoned scales beyond."""
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(19, 45, generator=generator)
    factor = torch.randn(19, 19, generator=generator).triu() * 0.1 + torch.eye(19)
    scale = torch.rand(1, 45, generator=generator).add(0.1).expand(19, 45)
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "channel", "rounding": rounding})
    codes, errors = (
        part.cpu() for part in round_columns(columns.to(DEVICE), factor.to(DEVICE), scale.to(DEVICE), None, spec)
    )
    work = columns.double()
    round_ = {"half-even": torch.round, "truncate": torch.trunc}.get(
        rounding, lambda x: torch.copysign(torch.floor(x.abs() + 0.5), x)
    )
    for i in range(19):
        wanted = round_(work[i] / scale[i].double()).clamp(-7, 7)
        assert (codes[i] != wanted).sum() <= 1  # a tie
        error = (work[i] - codes[i].double() * scale[i].double()) / factor[i, i].double()
        torch.testing.assert_close(errors[i].double(), error, rtol=1e-4, atol=1e-5)
        work[i + 1 :] -= factor[i, i + 1 :, None].double() * error
