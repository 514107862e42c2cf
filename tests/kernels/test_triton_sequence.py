"""The GPU's kernels over many tokens, each against its definition in float64: in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from test_triton_decode import DEVICE

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemm import permuted, unpermuted
from squamata.kernels.gpu.scan import InputPlan, StatePlan
from squamata.kernels.gpu.selective import selective_rows
from squamata.kernels.gpu.sequence import Sequences, conv_rows
from squamata.kernels.gpu.ssd import scan_scratch, ssd_rows
from squamata.kernels.gpu.tiles import Format


def sequences(length: int, lengths: list[int], position: int = 0) -> Sequences:
    return Sequences(
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.tensor([position], dtype=torch.int32, device=DEVICE),
        length,
    )


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.cpu().double() - wanted).norm() / wanted.norm())


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def plain_convolution(channels: int, taps: Tensor) -> ConvolutionPlan:
    """Outputs stay float, times one and plus nothing."""
    ones, zeros = torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE)
    return ConvolutionPlan(taps.to(DEVICE), ones, zeros, zeros, ones, zeros, zeros, -1)


@pytest.mark.parametrize("format", list(Format))
def test_an_order_and_its_inverse_cancel(format: Format) -> None:
    k = torch.arange(96)
    assert torch.equal(permuted.fn(unpermuted.fn(k, int(format)), int(format)), k)


@pytest.mark.parametrize("format", [Format.INT8_INT8, Format.BFLOAT16_FLOAT])
def test_convolution_goes_on_from_the_ring_and_leaves_the_last_inputs(format: Format) -> None:
    torch.manual_seed(0)
    batch, length, channels, start, position = 2, 37, 304, 16, 6
    lengths = [37, 2]
    entered = torch.randn(batch, length, start + channels)
    before = torch.randn(4, batch, channels)  # by slot: time t of the call lies at (position + t) % 4
    taps = torch.randn(4, channels)
    ring, out = before.clone().to(DEVICE), poisoned(batch * length, channels)
    conv_rows(
        entered.view(-1, start + channels).to(DEVICE), start, ring, plain_convolution(channels, taps), channels,
        sequences(length, lengths, position), out, False, int(format),
    )  # fmt: skip
    past = torch.stack([before[(position + time) % 4] for time in range(-4, 0)], dim=1)
    whole = torch.cat([past, entered[..., start:]], dim=1).double()
    wanted = silu(sum(whole[:, 1 + k : 1 + k + length] * taps[k].double() for k in range(4)))
    ours = out.view(batch, length, channels)[..., permuted.fn(torch.arange(channels), int(format))]
    assert relative(ours, wanted) < 1e-6
    for row, last in enumerate(lengths):
        for k in range(4):  # the token after the call sits at slot (position + length) % 4
            assert torch.equal(ring[(position + length + k) % 4, row].cpu().double(), whole[row, last + k])


def recurrence(x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba-2 token by token, float64: x (L, H, P), B and C (L, H, N), dt (L, H), state (H, P, N)."""
    outputs = []
    for t in range(len(x)):
        state = state * torch.exp(dt[t] * A)[:, None, None] + (dt[t][:, None] * x[t])[:, :, None] * B[t][:, None, :]
        outputs.append((state * C[t][:, None, :]).sum(-1))
    return torch.stack(outputs), state


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("length", [5, 150])
def test_scan_in_steps_is_the_recurrence(length: int, integers: bool) -> None:
    torch.manual_seed(1)
    batch, heads, width, states, groups = 2, 4, 16, 32, 2
    inner, lengths = heads * width, [length, max(1, length - 70)]
    channels = inner + 2 * groups * states
    conv = plain_convolution(channels, torch.ones(4, channels))
    u, tolerance, grid = torch.randn(batch, length, channels), 1e-5, None
    state_scale = torch.rand(inner) * 0.01 + 0.01
    given = torch.randint(-127, 128, (batch, heads, width, states), dtype=torch.int8)
    values = given * state_scale.view(heads, width, 1)
    state = (given.clone() if integers else values.clone()).to(DEVICE)
    if integers:  # codes, exact in bfloat16; what the products add up is rounded to it
        u, tolerance = torch.randint(-127, 128, u.shape).bfloat16(), 1e-2
        unit = (
            torch.cat([torch.rand(inner), torch.full((groups * states,), 0.5), torch.full((groups * states,), 2.0)])
            / 64
        )
        conv = replace(conv, scale=unit.to(DEVICE))
        grid = StatePlan(state_scale.to(DEVICE), 1 / state_scale.to(DEVICE), -127.0, 127.0, 0, False)
    raw, bias = torch.randn(batch, length, heads), torch.randn(heads)
    A, skip = -torch.rand(heads) - 0.1, torch.rand(heads)
    out, scratch = poisoned(batch * length, inner), scan_scratch(batch, length, state, u.dtype)
    for memory in (scratch.step, scratch.decay, scratch.weight, scratch.kept, scratch.before):
        memory.fill_(float("nan"))
    ssd_rows(
        u.view(-1, channels).to(DEVICE), integers, conv, (raw.view(-1, heads).to(DEVICE),) * 2,
        InputPlan(False, torch.ones(heads, device=DEVICE)), 0, (bias.to(DEVICE), A.to(DEVICE), skip.to(DEVICE)),
        scratch, state, grid, groups, (0.0, 1e9), sequences(length, lengths), out,
    )  # fmt: skip
    entered = u.double() * conv.scale.cpu().double()
    x, B, C = entered.split([inner, groups * states, groups * states], -1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (groups, states)), C.unflatten(-1, (groups, states))
    B, C = (part.repeat_interleave(heads // groups, 2) for part in (B, C))
    dt = softplus((raw + bias).double())
    for row, last in enumerate(lengths):
        y, end = recurrence(x[row, :last], B[row], C[row], dt[row], A.double(), values[row].double())
        y = (y + skip.double()[:, None] * x[row, :last]).flatten(1)
        assert relative(out.view(batch, length, inner)[row, :last], y) < tolerance
        if integers:
            codes = (end / state_scale.double().view(heads, width, 1)).clamp(-127, 127)
            assert (state[row].cpu() - codes).abs().max() < 1.5 and relative(state[row], codes) < tolerance
        else:
            assert relative(state[row], end) < tolerance


@pytest.mark.parametrize("length", [1, 3, 11, 16])
def test_selective_scan_is_the_recurrence(length: int) -> None:
    torch.manual_seed(2)
    batch, channels, states = 2, 48, 16
    lengths = [length, max(1, length - 5)]
    u, dt = torch.randn(batch, length, channels), torch.rand(batch, length, channels)
    bc, A = torch.randn(batch, length, 2 * states), -torch.rand(channels, states) * 4
    skip, before = torch.rand(channels), torch.randn(batch, channels, states)
    state, out = before.clone().to(DEVICE), poisoned(batch * length, channels)
    selective_rows(
        u.view(-1, channels).to(DEVICE), InputPlan(False, torch.ones(channels, device=DEVICE)),
        dt.view(-1, channels).to(DEVICE), bc.view(-1, 2 * states).to(DEVICE), A.to(DEVICE), skip.to(DEVICE), state,
        None, sequences(length, lengths), out, 0,
    )  # fmt: skip
    for row, last in enumerate(lengths):
        s, wanted = before[row].double(), []
        for t in range(last):
            delta, x = dt[row, t].double()[:, None], u[row, t].double()[:, None]
            s = torch.exp(delta * A) * s + delta * x * bc[row, t, :states]
            wanted.append((s * bc[row, t, states:]).sum(-1) + skip * x[:, 0])
        assert relative(out.view(batch, length, channels)[row, :last], torch.stack(wanted)) < 1e-5
        assert relative(state[row], s) < 1e-5
