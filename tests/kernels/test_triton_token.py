"""One token of many sequences, int8 states with a scale a channel, against float64, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.scan import InputPlan, StatePlan
from squamata.kernels.gpu.token import token_rows

DEVICE = "cpu" if INTERPRETED else "cuda"
BATCH, HEADS, CHANNELS, STATES, GROUPS, SPAN = 2, 2, 32, 16, 2, 127.0
INNER, WIDTH = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATES


def random_case(seed: int) -> dict[str, torch.Tensor]:
    """Codes of u, B, C and the state, their scales, dt and its parameters. The first channel gets no input, the
    second has no state, the third neither."""
    torch.manual_seed(seed)
    u = torch.randint(-127, 128, (BATCH, WIDTH)).float()
    state = torch.randint(-127, 128, (BATCH, HEADS, CHANNELS, STATES), dtype=torch.int8)
    u[:, [0, 2]] = 0
    state.flatten(1, 2)[:, 1:3] = 0
    unit = torch.cat([torch.rand(INNER), torch.rand(2 * GROUPS).repeat_interleave(STATES)]) * 0.01 + 0.001
    scale = torch.rand(BATCH, INNER) * 0.1
    scale[:, 1:3] = 1e-8
    return {"u": u, "unit": unit, "state": state, "scale": scale, "dt": torch.randn(BATCH, HEADS),
            "bias": torch.randn(HEADS), "A": -torch.rand(HEADS), "skip": torch.randn(HEADS)}  # fmt: skip


def exact(case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, E) and the new state (B, E, N) before it is rounded, in float64."""
    part = {name: value.double() for name, value in case.items()}
    values = part["u"] * part["unit"]
    x, B, C = values.split([INNER, GROUPS * STATES, GROUPS * STATES], 1)
    B, C = (side.unflatten(1, (GROUPS, STATES)).repeat_interleave(INNER // GROUPS, 1) for side in (B, C))
    spread = [name.repeat_interleave(CHANNELS, -1) for name in (part["dt"] + part["bias"], part["A"], part["skip"])]
    dt = torch.nn.functional.softplus(spread[0])
    old = part["state"].flatten(1, 2) * part["scale"][..., None]
    new = (dt * spread[1]).exp()[..., None] * old + (dt * x)[..., None] * B
    return (new * C).sum(-1) + spread[2] * x, new


@pytest.mark.parametrize("rounding", [0, 1])  # half to even: four codes are one word; away from zero: one by one
def test_a_token_agrees_with_float64(rounding: int) -> None:
    case = random_case(rounding)
    moved = {name: value.to(DEVICE) for name, value in case.items()}
    wanted, new = exact(case)
    filler = torch.ones(WIDTH, device=DEVICE)
    conv = ConvolutionPlan(filler, filler, filler, filler, moved["unit"], filler, filler, 0)
    grid = StatePlan(moved["scale"].reshape(-1), filler, -127.0, 127.0, rounding, False, SPAN)
    out = torch.full((BATCH, INNER), float("nan"), device=DEVICE)
    token_rows(
        moved["u"], True, conv, (moved["dt"], moved["dt"]), InputPlan(False, filler), 0,
        (moved["bias"], moved["A"], moved["skip"]), moved["state"], grid, GROUPS, (0.0, 1e9), out,
    )  # fmt: skip
    assert torch.allclose(out.cpu().double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    scale = grid.scale.cpu().double().view(BATCH, INNER)
    assert torch.allclose(scale, (new.abs().amax(-1) / SPAN).clamp(min=1e-8), rtol=1e-5)
    error = (moved["state"].cpu().double().flatten(1, 2) * scale[..., None] - new).abs()
    assert bool((error <= 0.501 * scale[..., None]).all())
