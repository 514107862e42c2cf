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

from squamata.kernels.gpu_conv import ConvolutionPlan
from squamata.kernels.gpu_gemm import permuted
from squamata.kernels.gpu_gemv import INTERPRETED
from squamata.kernels.gpu_math import dot_float, silu, small_to_float, softplus, to_codes
from squamata.kernels.gpu_norm import _SMALLEST_SCALE
from squamata.kernels.gpu_scan import InputPlan, StatePlan
from squamata.kernels.gpu_token import token_rows

CONV_TOKENS, CONV_CHANNELS = 16, 256  # a program
# Of a head, a step. Never one stage: Triton 3.6 then reads shared memory out of bounds (compute-sanitizer; two: clean)
SSD_TOKENS, SSD_CHANNELS, SSD_WARPS, SSD_STAGES = 64, 32, 4, 2
SSD_PROGRAMS = 512  # that fill the device


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
def _landed(x, channel, mask, inverse, scale, low, high, SPLIT: tl.constexpr, FIRST_ROUNDING: tl.constexpr,
            REST_ROUNDING: tl.constexpr, CODES: tl.constexpr):  # fmt: skip
    """x (tokens, channels) on the grids of its channels (inverse 0: as it is); other roundings from SPLIT on."""
    inverse_ = tl.load(inverse + channel, mask=mask, other=0.0)[None, :]
    low_ = tl.load(low + channel, mask=mask, other=0.0)[None, :]
    high_ = tl.load(high + channel, mask=mask, other=0.0)[None, :]
    code = to_codes(x, inverse_, low_, high_, FIRST_ROUNDING if FIRST_ROUNDING >= 0 else REST_ROUNDING)
    if FIRST_ROUNDING >= 0 and REST_ROUNDING >= 0 and FIRST_ROUNDING != REST_ROUNDING:
        code = tl.where((channel < SPLIT)[None, :], code, to_codes(x, inverse_, low_, high_, REST_ROUNDING))
    if not CODES:
        code = tl.where(inverse_ == 0, x, code * tl.load(scale + channel, mask=mask, other=0.0)[None, :])
    return code


@triton.jit
def _conv_kernel(entered, ring, taps, factor, bias, inverse, scale, low, high, lengths, position, out, L, N_IN,
                 START: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
                 WIDTH: tl.constexpr, FIRST_ROUNDING: tl.constexpr, REST_ROUNDING: tl.constexpr, CODES: tl.constexpr,
                 FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BC channels of BT tokens of one sequence; the program of the first tokens moves the ring on."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * BT
    row, rows = tl.program_id(2), tl.num_programs(2)
    t = first + tl.arange(0, BT)
    live = channel < C
    mask = (t < L)[:, None] & live[None, :]
    now = tl.load(position)
    sequence = entered + row.to(tl.int64) * L * N_IN + START
    total = tl.zeros((BT, BC), tl.float32)
    for k in tl.static_range(WIDTH):
        at = t - (WIDTH - 1) + k
        x = tl.load(sequence + at[:, None] * N_IN + channel[None, :], mask=mask & (at >= 0)[:, None], other=0)
        x = small_to_float(x.to(tl.int32)) if entered.dtype.element_ty == tl.int8 else x.to(tl.float32)
        if first == 0:
            slot = (now + at + WIDTH) % WIDTH
            past = ring + (slot[:, None] * rows + row) * C + channel[None, :]
            x += tl.load(past, mask=live[None, :] & (at < 0)[:, None], other=0).to(tl.float32)
        total += x * tl.load(taps + k * C + channel, mask=live, other=0.0)[None, :]
    factor_ = tl.load(factor + channel, mask=live, other=0.0)[None, :]
    u = silu(total * factor_ + tl.load(bias + channel, mask=live, other=0.0)[None, :])
    if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
        u = _landed(u, channel, live, inverse, scale, low, high, SPLIT, FIRST_ROUNDING, REST_ROUNDING, CODES)
    place = (row.to(tl.int64) * L + t)[:, None] * C + permuted(channel, FORMAT)[None, :]
    tl.store(out + place, u.to(out.dtype.element_ty), mask=mask)
    if first == 0:
        last = tl.load(lengths + row)
        kept = ()
        for k in tl.static_range(WIDTH):
            time = channel * 0 + (last - WIDTH + k)
            new = tl.load(sequence + time * N_IN + channel, mask=live & (time >= 0), other=0).to(tl.float32)
            old_slot = (now + time + WIDTH) % WIDTH
            old = tl.load(ring + (old_slot * rows + row) * C + channel, mask=live & (time < 0), other=0).to(tl.float32)
            kept = kept + (new + old,)  # type: ignore[assignment]  # noqa: RUF005
        if NATIVE:
            tl.debug_barrier()  # every thread has read the ring
        for k in tl.static_range(WIDTH):
            new_slot = (now + L + k) % WIDTH
            tl.store(ring + (new_slot * rows + row) * C + channel, kept[k].to(ring.dtype.element_ty), mask=live)


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
        BT=tokens, BC=CONV_CHANNELS, WIDTH=conv.taps.shape[0], FIRST_ROUNDING=conv.rounding,
        REST_ROUNDING=conv.rounding_bc, CODES=codes, FORMAT=format, NATIVE=not INTERPRETED,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _decay_kernel(codes, values, dt_scale, dt_bias, A, lengths, step, decay, L, N_IN, dt_low, dt_high,
                  DT_START: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
                  CODES: tl.constexpr):  # fmt: skip
    """dt' of T tokens and BH heads, and the running sum of dt' A from the first of them: both (B, H, PADDED)."""
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
    running = tl.cumsum(dt * tl.load(A + head, mask=live, other=0.0)[None, :], axis=0)
    out = (row * H + head)[None, :] * PADDED + t[:, None]
    tl.store(step + out, dt, mask=live[None, :] & (t >= 0)[:, None])
    tl.store(decay + out, running, mask=live[None, :] & (t >= 0)[:, None])


@triton.jit
def _given_state(state, state_scale, row, channel, n, E: tl.constexpr, N: tl.constexpr, QUANTIZED: tl.constexpr,
                 ALONG: tl.constexpr, DYNAMIC: tl.constexpr):  # fmt: skip
    """The stored state of some channels of one sequence, float32 (N, channels)."""
    s = tl.load(state + (row.to(tl.int64) * E + channel)[None, :] * N + n[:, None]).to(tl.float32)
    if QUANTIZED:
        scale_place = channel[None, :] * N + n[:, None] if ALONG else channel[None, :]
        if DYNAMIC:
            scale_place += row * E
        s = s * tl.load(state_scale + scale_place)
    return s


@triton.jit(do_not_specialize=["STEPS"])
def _ssd_ends_kernel(u, u_scale, dt_step, dt_decay, state, state_scale, ends, totals, L, STEPS, H: tl.constexpr,
                     P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
                     BP: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr, ALONG: tl.constexpr,
                     DYNAMIC: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """The state at the end of a segment of STEPS steps that starts from nothing (the first: from ``state``), and the
    log of the segment's decay. ``ends`` (1 + segments, B, N, E): the given state first.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at, row = tl.program_id(0), tl.program_id(1)
    segment, rows = tl.program_id(2), tl.num_programs(1)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)
    n = tl.arange(0, N)
    group = H * P + (head * GROUPS // H) * N
    step = tl.arange(0, T)
    end = ends + row.to(tl.int64) * (N * H * P) + n[:, None] * (H * P) + channel[None, :]
    slot = rows.to(tl.int64) * (N * H * P)
    s = tl.zeros((N, BP), tl.float32)
    if segment == 0:
        s = _given_state(state, state_scale, row, channel, n, H * P, N, QUANTIZED, ALONG, DYNAMIC)
        tl.store(end, s)
    u_unit = tl.load(u_scale + channel)[None, :] if CODES else 1.0
    b_unit = tl.load(u_scale + group) if CODES else 1.0
    total = 0.0
    for index in range(0, STEPS):
        start = (segment * STEPS + index) * T
        live = (start + step < L)[:, None]
        place = (row * H + head) * PADDED + start + step
        dt, log_decay = tl.load(dt_step + place), tl.load(dt_decay + place)
        whole = tl.sum(tl.where(step == T - 1, log_decay, 0.0), axis=0)
        token = u + (row.to(tl.int64) * L + start + step)[:, None] * C
        x = tl.load(token + channel[None, :], mask=live, other=0)
        B = tl.load(token + group + n[None, :], mask=live, other=0)
        weight = (dt * tl.exp(whole - log_decay) * b_unit)[:, None]
        to_end = (x.to(tl.float32) * u_unit * weight).to(x.dtype)
        s = dot_float(tl.trans(B), to_end, tl.exp(whole) * s, NATIVE)
        total += whole
    tl.store(end + (segment + 1) * slot, s)
    tl.store(totals + (segment * rows + row) * H + head, total)


@triton.jit(do_not_specialize=["STEPS"])
def _ssd_kernel(u, u_scale, dt_step, dt_decay, skip, state, state_scale, state_inverse, state_low, state_high,
                state_span, ends, totals, out, L, STEPS, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
                BP: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr,
                NATIVE: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence's segment, T tokens at a time (Dao and Gu 2024, section 6).

    Within a step as masked attention, the state before it through its decay. The state (N, BP) stays in registers.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at, row = tl.program_id(0), tl.program_id(1)
    segment = tl.program_id(2)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)
    n = tl.arange(0, N)
    group = H * P + (head * GROUPS // H) * N
    step = tl.arange(0, T)
    if SEGMENTS == 1:
        s = _given_state(state, state_scale, row, channel, n, H * P, N, QUANTIZED, ALONG, DYNAMIC)
    else:
        rows = tl.num_programs(1)
        end = ends + row.to(tl.int64) * (N * H * P) + n[:, None] * (H * P) + channel[None, :]
        slot = rows.to(tl.int64) * (N * H * P)
        s = tl.load(end + tl.minimum(segment, 1) * slot)
        for before in range(1, segment):
            s = tl.exp(tl.load(totals + (before * rows + row) * H + head)) * s + tl.load(end + (before + 1) * slot)
    through = tl.load(skip + head)
    u_unit = tl.load(u_scale + channel)[None, :] if CODES else 1.0
    b_unit = tl.load(u_scale + group) if CODES else 1.0
    c_unit = tl.load(u_scale + group + GROUPS * N) if CODES else 1.0
    begin = segment * STEPS * T
    sequence = u + (row.to(tl.int64) * L + begin + step)[:, None] * C
    x_at, b_at = sequence + channel[None, :], sequence + group + n[None, :]
    dt_at = dt_step + (row * H + head) * PADDED + begin + step
    decay_at = dt_decay + (row * H + head) * PADDED + begin + step
    out_at = out + (row.to(tl.int64) * L + begin + step)[:, None] * (H * P) + channel[None, :]
    for start in range(0, STEPS * T, T):
        live = (begin + start + step < L)[:, None]
        dt, log_decay = tl.load(dt_at + start), tl.load(decay_at + start)
        whole = tl.sum(tl.where(step == T - 1, log_decay, 0.0), axis=0)
        x = tl.load(x_at, mask=live, other=0)
        B = tl.load(b_at, mask=live, other=0)
        C_ = tl.load(b_at + GROUPS * N, mask=live, other=0)
        scores = dot_float(C_, tl.trans(B), tl.zeros((T, T), tl.float32), NATIVE)
        between = log_decay[:, None] - log_decay[None, :]
        between = tl.exp(tl.where(step[:, None] >= step[None, :], between, -float("inf")))
        scores = scores * between * (dt * (b_unit * c_unit))[None, :]
        y = dot_float(C_, s.to(x.dtype), tl.zeros((T, BP), tl.float32), NATIVE)
        y = y * (tl.exp(log_decay) * c_unit)[:, None]
        y += dot_float(scores.to(x.dtype), x, tl.zeros((T, BP), tl.float32), NATIVE) * u_unit
        x_ = x.to(tl.float32) * u_unit
        y += through * x_
        to_end = (x_ * (dt * tl.exp(whole - log_decay) * b_unit)[:, None]).to(x.dtype)
        s = dot_float(tl.trans(B), to_end, tl.exp(whole) * s, NATIVE)
        if out.dtype.element_ty == tl.float16:
            y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        tl.store(out_at, y.to(out.dtype.element_ty), mask=live)
        x_at += T * C
        b_at += T * C
        out_at += T * (H * P)
    if segment == SEGMENTS - 1:
        place = (row.to(tl.int64) * (H * P) + channel)[None, :] * N + n[:, None]
        if QUANTIZED:
            scale_place = channel[None, :] * N + n[:, None] if ALONG else channel[None, :]
            if DYNAMIC:
                scale_place += row * (H * P)
                scale = tl.maximum(tl.div_rn(tl.max(tl.abs(s), axis=0), state_span), _SMALLEST_SCALE)[None, :]
                tl.store(state_scale + scale_place, scale)
                inverse = tl.div_rn(1.0, scale)
            else:
                inverse = tl.load(state_inverse + scale_place)
            tl.store(state + place, to_codes(s, inverse, state_low, state_high, STATE_ROUNDING).to(tl.int8))
        else:
            tl.store(state + place, s.to(state.dtype.element_ty))


@dataclass(frozen=True)
class ScanScratch:
    """Memory of Mamba-2's scan. ``step``, ``decay``: float32 (B, H, places). With more than one segment, ``ends``:
    float32 (segments, B, N, E), ``totals``: (segments, B, H).
    """

    step: Tensor
    decay: Tensor
    ends: Tensor
    totals: Tensor
    segments: int
    tokens: int


def scan_scratch(batch: int, length: int, state: Tensor) -> ScanScratch:
    """For sequences of ``length`` places and a state (B, H, P, N): segments enough to fill the device."""
    _, heads, head_dim, states = state.shape
    tokens = min(SSD_TOKENS, max(16, triton.next_power_of_2(length) // 2))  # one step of 64 lost the state (Triton 3.6)
    steps = triton.cdiv(length, tokens)
    programs = batch * heads * head_dim // min(SSD_CHANNELS, head_dim)
    segments = 1
    while steps % (2 * segments) == 0 and steps // segments >= 4 and programs * segments < SSD_PROGRAMS:
        segments *= 2
    device = state.device
    step, decay = (torch.zeros(batch, heads, steps * tokens, device=device) for _ in range(2))
    size = (segments, batch, states, heads * head_dim) if segments > 1 else (1,)
    ends, totals = torch.zeros(size, device=device), torch.zeros(segments, batch, heads, device=device)
    return ScanScratch(step, decay, ends, totals, segments, tokens)


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
        token_rows(u, codes, conv, dt, dt_input, dt_start, parameters, state, grid, groups, limit, out)
        return
    channels, tokens, padded = min(SSD_CHANNELS, head_dim), scratch.tokens, scratch.step.shape[2]
    block, steps = min(32, triton.next_power_of_2(heads)), padded // scratch.tokens // scratch.segments
    _decay_kernel[(padded // tokens, rows, triton.cdiv(heads, block))](
        *dt, dt_input.scale, dt_bias, A, sequences.lengths, scratch.step, scratch.decay, length, dt[0].shape[1], *limit,
        DT_START=dt_start, H=heads, BH=block, T=tokens, PADDED=padded, CODES=dt_input.codes, num_warps=4,
    )  # fmt: skip
    shared |= {"T": tokens, "PADDED": padded, "BP": channels, "NATIVE": not INTERPRETED, "num_stages": SSD_STAGES}
    programs = heads * head_dim // channels
    if scratch.segments > 1:
        _ssd_ends_kernel[(programs, rows, scratch.segments - 1)](
            u, conv.scale, scratch.step, scratch.decay, state, grids[0], scratch.ends, scratch.totals, length, steps,
            num_warps=SSD_WARPS, **shared,
        )  # fmt: skip
    _ssd_kernel[(programs, rows, scratch.segments)](
        u, conv.scale, scratch.step, scratch.decay, skip, state, *grids, scratch.ends, scratch.totals, out, length,
        steps, SEGMENTS=scratch.segments, STATE_ROUNDING=rounding, num_warps=SSD_WARPS, **shared,
    )  # fmt: skip
