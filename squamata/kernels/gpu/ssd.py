# mypy: allow-untyped-defs
"""Mamba-2's scan over many tokens of B sequences, from the decoder's state to the decoder's state.

In steps of some tokens (Dao and Gu 2024, section 6), by three kernels: how far each token decays within its step; the
state that each step starts from, one step after the other; the outputs, all steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import dot_float, softplus
from squamata.kernels.gpu.scan import InputPlan, StatePlan, _store_state
from squamata.kernels.gpu.sequence import Sequences
from squamata.kernels.gpu.token import token_rows

STEP_TOKENS, EXACT_TOKENS = 64, 16  # a step; of float32, which the tensor cores do not multiply
STATES, HEADS = 64, 5  # of a head that a program moves on; at most, whose outputs a program makes
# Never one stage: Triton 3.6 then reads shared memory out of bounds (compute-sanitizer; two: clean)
WARPS, STAGES = 4, 3


@triton.jit
def _decay_kernel(codes, values, dt_scale, dt_bias, A, lengths, step, decay, weight, kept, L, N_IN, dt_low, dt_high,
                  DT_START: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
                  CODES: tl.constexpr):  # fmt: skip
    """dt' of T tokens and BH heads, the running sum of dt' A / ln 2 from the first of them, and what of each token is
    left after the last, times dt': all (B, H, PADDED). What is left of the state before them: (B, H, steps).
    """
    t = tl.program_id(0) * T + tl.arange(0, T)
    row = tl.program_id(1)
    head = tl.program_id(2) * BH + tl.arange(0, BH)
    live = head < H
    mask = (t < L)[:, None] & live[None, :]
    place = (row.to(tl.int64) * L + t)[:, None] * N_IN + DT_START + head[None, :]
    if CODES:
        dt = tl.load(codes + place, mask=mask, other=0).to(tl.float32)
        dt = dt * tl.load(dt_scale + head, mask=live, other=0.0)[None, :]
    else:
        dt = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head, mask=live, other=0.0)[None, :])
    dt = tl.minimum(tl.maximum(dt, dt_low), dt_high)
    dt = tl.where((t < tl.load(lengths + row))[:, None], dt, 0.0)
    rate = tl.load(A + head, mask=live, other=0.0)[None, :] * 1.4426950408889634  # log2(e)
    running = tl.cumsum(dt * rate, axis=0)
    out = (row * H + head)[None, :] * PADDED + t[:, None]
    tl.store(step + out, dt, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(decay + out, running, mask=live[None, :] & (t >= 0)[:, None])
    whole = tl.sum(dt * rate, axis=0)
    tl.store(weight + out, dt * tl.exp2(whole[None, :] - running), mask=live[None, :] & (t >= 0)[:, None])
    tl.store(kept + (row * H + head) * (PADDED // T) + tl.program_id(0), tl.exp2(whole), mask=live)


@triton.jit
def _ssd_states_kernel(u, u_scale, dt_weight, dt_kept, state, state_scale, state_inverse, state_low, state_high,
                       state_span, before, L, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                       GROUPS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr,
                       CODES: tl.constexpr, QUANTIZED: tl.constexpr, ALONG: tl.constexpr, DYNAMIC: tl.constexpr,
                       STATE_ROUNDING: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BN states of one head of one sequence, moved on T tokens at a time.

    What each step starts from goes to ``before`` (B, steps, E, N), what the last one leaves to ``state``.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    head, row = tl.program_id(0), tl.program_id(2)
    channel, n, step = head * P + tl.arange(0, P), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, T)
    group = H * P + (head * GROUPS // H) * N
    place = (row.to(tl.int64) * (H * P) + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * (H * P)
    s = tl.load(state + place).to(tl.float32)
    if QUANTIZED:
        s = s * tl.load(state_scale + scale_place)
    unit = tl.load(u_scale + channel)[:, None] * tl.load(u_scale + group) if CODES else 1.0
    token = u + (row.to(tl.int64) * L + step)[:, None] * C
    x_at, b_at = token + channel[None, :], token + group + n[None, :]
    weight_at = dt_weight + (row * H + head) * PADDED + step
    kept_at = dt_kept + (row * H + head) * (PADDED // T)
    before_at = before + row.to(tl.int64) * (PADDED // T * H * P * N) + channel[:, None] * N + n[None, :]
    kept = tl.load(kept_at)
    for start in range(0, PADDED, T):
        kept_next = tl.load(kept_at + tl.minimum(start + T, PADDED - T) // T)
        tl.store(before_at, s.to(before.dtype.element_ty))
        live = (start + step < L)[:, None]
        weight = tl.load(weight_at)
        x, B = tl.load(x_at, mask=live, other=0), tl.load(b_at, mask=live, other=0)
        to_end = (tl.trans(x).to(tl.float32) * unit * weight[None, :]).to(x.dtype)
        s = dot_float(to_end, B, kept * s, NATIVE)
        kept = kept_next
        weight_at += T
        x_at += T * C
        b_at += T * C
        before_at += H * P * N
    _store_state(state, place, place >= 0, s, state_scale, state_inverse, scale_place, (channel >= 0)[:, None],
                 state_low, state_high, state_span, QUANTIZED, DYNAMIC, STATE_ROUNDING)  # fmt: skip


@triton.jit
def _ssd_outputs_kernel(u, u_scale, dt_step, dt_decay, skip, before, out, L, H: tl.constexpr, P: tl.constexpr,
                        N: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
                        HEADS: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """T tokens of HEADS heads of one group: within them as masked attention, the state before them through its decay.

    C B^T is the same for all heads of a group.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    first, index, row = tl.program_id(0) * HEADS, tl.program_id(1), tl.program_id(2)
    group = H * P + (first * GROUPS // H) * N
    n, p, step = tl.arange(0, N), tl.arange(0, P), tl.arange(0, T)
    time = index * T + step
    live = (time < L)[:, None]
    token = row.to(tl.int64) * L + time
    b_at = u + token[:, None] * C + group + n[None, :]
    B, C_ = tl.load(b_at, mask=live, other=0), tl.load(b_at + GROUPS * N, mask=live, other=0)
    b_unit = tl.load(u_scale + group) if CODES else 1.0
    c_unit = tl.load(u_scale + group + GROUPS * N) if CODES else 1.0
    scores = dot_float(C_, tl.trans(B), tl.zeros((T, T), tl.float32), NATIVE) * (b_unit * c_unit)
    before_at = before + (row.to(tl.int64) * (PADDED // T) + index) * (H * P * N) + p[:, None] * N + n[None, :]
    for head in range(first, first + HEADS):
        dt = tl.load(dt_step + (row * H + head) * PADDED + time)
        log_decay = tl.load(dt_decay + (row * H + head) * PADDED + time)
        x = tl.load(u + token[:, None] * C + head * P + p[None, :], mask=live, other=0)
        s = tl.load(before_at + head * (P * N))
        through = tl.load(skip + head)
        unit = tl.load(u_scale + head * P + p)[None, :] if CODES else 1.0
        between = log_decay[:, None] - log_decay[None, :]
        between = tl.exp2(tl.where(step[:, None] >= step[None, :], between, -float("inf")))
        within = (scores * between * dt[None, :]).to(x.dtype)
        past = dot_float(C_, tl.trans(s), tl.zeros((T, P), tl.float32), NATIVE) * (tl.exp2(log_decay) * c_unit)[:, None]
        y = dot_float(within, x, tl.zeros((T, P), tl.float32), NATIVE) + through * x.to(tl.float32)
        y = y * unit + past
        if out.dtype.element_ty == tl.float16:
            y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        tl.store(out + token[:, None] * (H * P) + head * P + p[None, :], y.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class ScanScratch:
    """Memory of Mamba-2's scan. ``step``, ``decay``, ``weight``: float32 (B, H, places), ``kept``: (B, H, steps), see
    ``_decay_kernel``; ``before``: (B, steps, E, N), the state that each step of ``tokens`` starts from, in the type of
    the convolution's outputs.
    """

    step: Tensor
    decay: Tensor
    weight: Tensor
    kept: Tensor
    before: Tensor
    tokens: int


def scan_scratch(batch: int, length: int, state: Tensor, dtype: torch.dtype) -> ScanScratch:
    """For sequences of ``length`` places, a state (B, H, P, N) and outputs of the convolution in ``dtype``."""
    _, heads, head_dim, states = state.shape
    tokens = min(
        STEP_TOKENS, max(16, triton.next_power_of_2(length) // 2)
    )  # one step of 64 lost the state (Triton 3.6)
    steps = triton.cdiv(length, tokens) if length > 1 else 0
    step, decay, weight = (torch.zeros(batch, heads, steps * tokens, device=state.device) for _ in range(3))
    kept = torch.zeros(batch, heads, steps, device=state.device)
    before = torch.zeros(batch, steps, heads * head_dim, states, dtype=dtype, device=state.device)
    return ScanScratch(step, decay, weight, kept, before, tokens)


def ssd_rows(u: Tensor, codes: bool, conv: ConvolutionPlan, dt: tuple[Tensor, Tensor], dt_input: InputPlan,
             dt_start: int, parameters: tuple[Tensor, Tensor, Tensor], scratch: ScanScratch, state: Tensor,
             grid: StatePlan | None, groups: int, limit: tuple[float, float], sequences: Sequences,
             out: Tensor) -> None:  # fmt: skip
    """Mamba-2's scan with skip: out (B L, E); ``state`` (B, H, P, N) is moved on.

    ``u``: the convolution's outputs (B L, C) as values, or as ``codes`` in a float type (B one scale a group, C too).
    ``parameters``: dt_bias, A, skip.
    """
    rows, heads, head_dim, states = state.shape
    filler, length = conv.factor, sequences.length
    grids = (grid.scale, grid.inverse, grid.low, grid.high, grid.span) if grid else (filler, filler, 0.0, 0.0, 0.0)
    sizes: dict[str, Any] = {"H": heads, "P": head_dim, "N": states, "GROUPS": groups, "CODES": codes}
    stored = {
        "QUANTIZED": grid is not None, "ALONG": grid.along_states if grid else False,
        "DYNAMIC": grid is not None and grid.span > 0, "STATE_ROUNDING": grid.rounding if grid else 0,
    }  # fmt: skip
    dt_bias, A, skip = parameters
    if length == 1:
        token_rows(u, codes, conv, dt, dt_input, dt_start, parameters, state, grid, groups, limit, out)
        return
    sizes |= {"T": scratch.tokens, "PADDED": scratch.step.shape[2], "NATIVE": not INTERPRETED}
    steps, block = scratch.kept.shape[2], min(32, triton.next_power_of_2(heads))
    _decay_kernel[(steps, rows, triton.cdiv(heads, block))](
        *dt, dt_input.scale, dt_bias, A, sequences.lengths, scratch.step, scratch.decay, scratch.weight, scratch.kept,
        length, dt[0].shape[1], *limit, DT_START=dt_start, H=heads, BH=block, T=sizes["T"], PADDED=sizes["PADDED"],
        CODES=dt_input.codes, num_warps=WARPS,
    )  # fmt: skip
    block = states if stored["DYNAMIC"] else min(STATES, states)  # a new scale is of all states
    _ssd_states_kernel[(heads, states // block, rows)](
        u, conv.scale, scratch.weight, scratch.kept, state, *grids, scratch.before, length, BN=block,
        num_warps=WARPS, num_stages=STAGES, **sizes, **stored,
    )  # fmt: skip
    together = max(count for count in range(1, HEADS + 1) if heads // groups % count == 0)
    _ssd_outputs_kernel[(heads // together, steps, rows)](
        u, conv.scale, scratch.step, scratch.decay, skip, scratch.before, out, length, HEADS=together,
        num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
