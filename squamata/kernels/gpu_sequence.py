# mypy: allow-untyped-defs
"""Convolution and Mamba-2's scan over many tokens of B sequences, from the decoder's state to the decoder's state.

Sequences of one call have L places; of sequence b the first ``lengths[b]`` hold tokens, which move its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu_gemm import unpermuted
from squamata.kernels.gpu_gemv import INTERPRETED
from squamata.kernels.gpu_math import _MAGIC, dot_float, silu, softplus, to_codes
from squamata.kernels.gpu_norm import _SMALLEST_SCALE
from squamata.kernels.gpu_scan import ConvolutionPlan, InputPlan, StatePlan, _store_state

CONV_TOKENS, CONV_AHEAD, CONV_CHANNELS, CONV_WARPS = 16, 8, 256, 2  # a program
# Of a head, a step. Never one stage: Triton 3.6 then reads shared memory out of bounds (compute-sanitizer; two: clean)
SSD_TOKENS, SSD_STATES, SSD_HEADS, SSD_WARPS, SSD_STAGES = 64, 64, 5, 4, 3
OUT_WARPS, OUT_STAGES, SSD_CHANNELS = 4, 3, 64
TOKEN_CHANNELS, TOKEN_WARPS = 32, 2  # of a head, one token


@dataclass(frozen=True)
class Sequences:
    """``lengths``: int32 (B,). ``position``: int32 (1,), tokens that the state has taken in (modulo nothing)."""

    lengths: Tensor
    position: Tensor
    length: int

    @property
    def batch(self) -> int:
        return int(self.lengths.shape[0])


@triton.jit
def _landed(x, grid, second, ROUNDING: tl.constexpr, SECOND_ROUNDING: tl.constexpr, CODES: tl.constexpr):
    """x on the grids of its channels, those that are ``second`` with their own rounding; as it is where inverse is 0."""
    inverse, scale, low, high = grid
    code = to_codes(x, inverse, low, high, ROUNDING if ROUNDING >= 0 else SECOND_ROUNDING)
    if ROUNDING >= 0 and SECOND_ROUNDING >= 0 and ROUNDING != SECOND_ROUNDING:
        code = tl.where(second, to_codes(x, inverse, low, high, SECOND_ROUNDING), code)
    return code if CODES else tl.where(inverse == 0, x, code * scale)


@triton.jit
def _conv_input(sequence, ring, time, channel, live, now, row, rows, L, N_IN, C: tl.constexpr, WIDTH: tl.constexpr):
    """What entered some channels at one time of this call, or, where that is negative, before it."""
    time_ = channel * 0 + time
    x = tl.load(sequence + time_ * N_IN + channel, mask=live & (time_ >= 0) & (time_ < L), other=0).to(tl.float32)
    place = ((now + time_ + WIDTH) % WIDTH * rows + row) * C + channel
    return x + tl.load(ring + place, mask=live & (time_ < 0), other=0).to(tl.float32)


@triton.jit
def _conv_kernel(entered, ring, taps, factor, bias, inverse, scale, low, high, lengths, position, out, L, N_IN,
                 START: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr,
                 BC: tl.constexpr, WIDTH: tl.constexpr, FIRST_ROUNDING: tl.constexpr, REST_ROUNDING: tl.constexpr,
                 CODES: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BC channels of BT tokens of one sequence, token by token, AHEAD of them loaded together.

    The last inputs stay in registers. The program of the first tokens moves the ring on.
    """
    place = tl.program_id(0) * BC + tl.arange(0, BC)
    channel = unpermuted(place, FORMAT)  # stores stay whole
    first = tl.program_id(1) * BT
    row, rows = tl.program_id(2), tl.num_programs(2)
    live = place < C
    now = tl.load(position)
    sequence = entered + row.to(tl.int64) * L * N_IN + START
    tap, window = (), ()
    for k in tl.static_range(WIDTH):
        tap = tap + (tl.load(taps + k * C + channel, mask=live, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    for k in tl.static_range(WIDTH - 1):
        x = _conv_input(sequence, ring, first - (WIDTH - 1) + k, channel, live, now, row, rows, L, N_IN, C, WIDTH)
        window = window + (x,)  # type: ignore[assignment]  # noqa: RUF005
    factor_ = tl.load(factor + channel, mask=live, other=0.0)
    bias_ = tl.load(bias + channel, mask=live, other=0.0)
    if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
        grid = (
            tl.load(inverse + channel, mask=live, other=0.0), tl.load(scale + channel, mask=live, other=0.0),
            tl.load(low + channel, mask=live, other=0.0), tl.load(high + channel, mask=live, other=0.0),
        )  # fmt: skip
    for start in range(first, first + BT, AHEAD):
        new = ()
        for i in tl.static_range(AHEAD):
            inside = live & (channel * 0 + (start + i) < L)
            newest = tl.load(sequence + (start + i) * N_IN + channel, mask=inside, other=0)
            new = new + (newest,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(AHEAD):
            window = window + (new[i].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
            total = window[0] * tap[0]
            for k in tl.static_range(1, WIDTH):
                total += window[k] * tap[k]
            u = silu(total * factor_ + bias_)
            if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
                u = _landed(u, grid, channel >= SPLIT, FIRST_ROUNDING, REST_ROUNDING, CODES)
            at = (row.to(tl.int64) * L + start + i) * C + place
            tl.store(out + at, u.to(out.dtype.element_ty), mask=live & (channel * 0 + (start + i) < L))
            window = window[1:]
    if first == 0:
        last = tl.load(lengths + row)
        kept = ()
        for k in tl.static_range(WIDTH):
            x = _conv_input(sequence, ring, last - WIDTH + k, channel, live, now, row, rows, L, N_IN, C, WIDTH)
            kept = kept + (x,)  # type: ignore[assignment]  # noqa: RUF005
        if NATIVE:
            tl.debug_barrier()  # every thread has read the ring
        for k in tl.static_range(WIDTH):
            slot = ((now + L + k) % WIDTH * rows + row) * C + channel
            tl.store(ring + slot, kept[k].to(ring.dtype.element_ty), mask=live)


def conv_rows(entered: Tensor, start: int, ring: Tensor, conv: ConvolutionPlan, split: int, sequences: Sequences,
              out: Tensor, codes: bool, format: int) -> None:  # fmt: skip
    """Depthwise causal convolution and SiLU, landed. ``entered`` (B L, N): channels from ``start``, int8 or float.

    ``ring`` (K, B, C) holds what came before and then the last K inputs. ``out`` (B L, C): ``codes`` (in any type), or
    values, in the column order of ``format``. Channels below ``split`` round as u does, the others as B and C do.
    """
    length, channels = sequences.length, out.shape[1]
    tokens = min(CONV_TOKENS, triton.next_power_of_2(length))
    grid = (triton.cdiv(channels, CONV_CHANNELS), triton.cdiv(length, tokens), sequences.batch)
    _conv_kernel[grid](
        entered, ring, conv.taps, conv.factor, conv.bias, conv.inverse, conv.scale, conv.low, conv.high,
        sequences.lengths, sequences.position, out, length, entered.shape[1], START=start, C=channels, SPLIT=split,
        BT=tokens, AHEAD=min(CONV_AHEAD, tokens), BC=CONV_CHANNELS, WIDTH=conv.taps.shape[0],
        FIRST_ROUNDING=conv.rounding, REST_ROUNDING=conv.rounding_bc, CODES=codes, FORMAT=format, NATIVE=not INTERPRETED,
        num_warps=CONV_WARPS,
    )  # fmt: skip


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
def _given_state(state, state_scale, row, channel, n, E: tl.constexpr, N: tl.constexpr, QUANTIZED: tl.constexpr,
                 ALONG: tl.constexpr, DYNAMIC: tl.constexpr):  # fmt: skip
    """The stored state of some channels of one sequence, float32 (channels, N)."""
    s = tl.load(state + (row.to(tl.int64) * E + channel)[:, None] * N + n[None, :]).to(tl.float32)
    if QUANTIZED:
        scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
        if DYNAMIC:
            scale_place += row * E
        s = s * tl.load(state_scale + scale_place)
    return s


@triton.jit
def _ssd_states_kernel(u, u_scale, dt_weight, dt_kept, state, state_scale, state_inverse, state_low, state_high,
                       state_span, before, L, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                       GROUPS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr,
                       BP: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr, ALONG: tl.constexpr,
                       DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BN states of BP channels of one sequence, moved on T tokens at a time (Dao and Gu 2024, section 6).

    What each step starts from goes to ``before`` (B, steps, E, N), what the last one leaves to ``state``.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at, row = tl.program_id(0), tl.program_id(2)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    group = H * P + (head * GROUPS // H) * N
    step = tl.arange(0, T)
    s = _given_state(state, state_scale, row, channel, n, H * P, N, QUANTIZED, ALONG, DYNAMIC)
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
    place = (row.to(tl.int64) * (H * P) + channel)[:, None] * N + n[None, :]
    if QUANTIZED:
        scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
        if DYNAMIC:
            scale_place += row * (H * P)
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(s), axis=1), state_span), _SMALLEST_SCALE)[:, None]
            tl.store(state_scale + scale_place, scale)
            inverse = tl.div_rn(1.0, scale)
        else:
            inverse = tl.load(state_inverse + scale_place)
        tl.store(state + place, to_codes(s, inverse, state_low, state_high, STATE_ROUNDING).to(tl.int8))
    else:
        tl.store(state + place, s.to(state.dtype.element_ty))


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


@triton.jit
def _ssd_token_kernel(u, u_scale, dt_codes, dt_values, dt_scale, dt_bias, A, skip, state, state_scale, state_inverse,
                      state_low, state_high, state_span, out, N_IN, dt_low, dt_high,
                      DT_START: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
                      BP: tl.constexpr, CODES: tl.constexpr, DT_CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                      ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr):  # fmt: skip
    """One token of many sequences: BP channels of one head. What bounds it is the state, read and written once."""
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)
    n = tl.arange(0, N)
    place = (row * (H * P) + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * (H * P)
    s = tl.load(state + place).to(tl.float32)
    group = H * P + (head * GROUPS // H) * N
    token = u + row * C
    x, B = tl.load(token + channel).to(tl.float32), tl.load(token + group + n).to(tl.float32)
    C_ = tl.load(token + group + GROUPS * N + n).to(tl.float32)
    if CODES:
        x = x * tl.load(u_scale + channel)
        B = B * tl.load(u_scale + group + n)
        C_ = C_ * tl.load(u_scale + group + GROUPS * N + n)
    if DT_CODES:
        dt = tl.load(dt_codes + row * N_IN + DT_START + head).to(tl.float32) * tl.load(dt_scale + head)
    else:
        dt = tl.load(dt_values + row * N_IN + DT_START + head).to(tl.float32)
    dt = tl.minimum(tl.maximum(softplus(dt + tl.load(dt_bias + head)), dt_low), dt_high)
    decay = tl.exp(dt * tl.load(A + head))
    if QUANTIZED:
        s = s * (tl.load(state_scale + scale_place) * decay) + (dt * x)[:, None] * B[None, :]
    else:
        s = s * decay + (dt * x)[:, None] * B[None, :]
    y = tl.sum(s * C_[None, :], axis=1) + tl.load(skip + head) * x
    tl.store(out + row * (H * P) + channel, y.to(out.dtype.element_ty))
    if DYNAMIC and STATE_ROUNDING == 0:  # no code beyond the span: the bits of the rounded sum end in it
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(s), axis=1), state_span), _SMALLEST_SCALE)[:, None]
        tl.store(state_scale + scale_place, scale)
        bits = (s * tl.div_rn(1.0, scale) + _MAGIC).to(tl.int32, bitcast=True)
        tl.store(state + place, bits.to(tl.int8))
    else:
        _store_state(state, place, place >= 0, s, state_scale, state_inverse, scale_place, (channel >= 0)[:, None],
                     state_low, state_high, state_span, QUANTIZED, DYNAMIC, STATE_ROUNDING)  # fmt: skip


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
    tokens = min(SSD_TOKENS, max(16, triton.next_power_of_2(length) // 2))  # one step of 64 lost the state (Triton 3.6)
    steps = triton.cdiv(length, tokens)
    places = (torch.zeros(batch, heads, steps * tokens, device=state.device) for _ in range(3))
    kept = torch.zeros(batch, heads, steps, device=state.device)
    before = torch.zeros(batch, steps, heads * head_dim, states, dtype=dtype, device=state.device)
    return ScanScratch(*places, kept, before, tokens)


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
    shared: dict[str, Any] = {
        "H": heads, "P": head_dim, "N": states, "GROUPS": groups, "CODES": codes, "QUANTIZED": grid is not None,
        "ALONG": grid.along_states if grid else False, "DYNAMIC": grid is not None and grid.span > 0,
    }  # fmt: skip
    rounding = grid.rounding if grid else 0
    dt_bias, A, skip = parameters
    if length == 1:
        channels = min(TOKEN_CHANNELS, head_dim)
        _ssd_token_kernel[(heads * head_dim // channels, rows)](
            u, conv.scale, *dt, dt_input.scale, dt_bias, A, skip, state, *grids, out, dt[0].shape[1], *limit,
            DT_START=dt_start, BP=channels, DT_CODES=dt_input.codes, STATE_ROUNDING=rounding, num_warps=TOKEN_WARPS,
            **shared,
        )  # fmt: skip
        return
    tokens, padded = scratch.tokens, scratch.step.shape[2]
    block = min(32, triton.next_power_of_2(heads))
    _decay_kernel[(padded // tokens, rows, triton.cdiv(heads, block))](
        *dt, dt_input.scale, dt_bias, A, sequences.lengths, scratch.step, scratch.decay, scratch.weight,
        scratch.kept, length, dt[0].shape[1], *limit, DT_START=dt_start, H=heads, BH=block, T=tokens, PADDED=padded, CODES=dt_input.codes, num_warps=4,
    )  # fmt: skip
    shared |= {"T": tokens, "PADDED": padded, "NATIVE": not INTERPRETED, "num_stages": SSD_STAGES}
    block = states if shared["DYNAMIC"] else min(SSD_STATES, states)
    width = min(SSD_CHANNELS, head_dim)
    _ssd_states_kernel[(heads * head_dim // width, states // block, rows)](
        u, conv.scale, scratch.weight, scratch.kept, state, *grids, scratch.before, length, BN=block, BP=width,
        STATE_ROUNDING=rounding, num_warps=SSD_WARPS, **shared,
    )  # fmt: skip
    together = max(count for count in range(1, SSD_HEADS + 1) if heads // groups % count == 0)
    for switch in ("QUANTIZED", "ALONG", "DYNAMIC"):
        del shared[switch]
    _ssd_outputs_kernel[(heads // together, padded // tokens, rows)](
        u, conv.scale, scratch.step, scratch.decay, skip, scratch.before, out, length, HEADS=together,
        num_warps=OUT_WARPS, **(shared | {"num_stages": OUT_STAGES}),
    )  # fmt: skip
