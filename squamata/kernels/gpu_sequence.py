# mypy: allow-untyped-defs
"""Convolution and scans over many tokens of B sequences, from the decoder's state to the decoder's state.

Sequences of one call have L places; of sequence b the first ``lengths[b]`` hold tokens, which move its state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu_gemm import permuted
from squamata.kernels.gpu_gemv import INTERPRETED
from squamata.kernels.gpu_math import _MAGIC, dot_float, silu, softplus, to_codes
from squamata.kernels.gpu_norm import _SMALLEST_SCALE
from squamata.kernels.gpu_scan import ConvolutionPlan, InputPlan, StatePlan, _load_state, _store_state

CONV_TOKENS, CONV_CHANNELS = 16, 256  # a program
SSD_TOKENS, SSD_CHANNELS, SSD_WARPS = 64, 32, 4  # of a head, a step
SCAN_TOKENS, SCAN_CHANNELS = 8, 128 if INTERPRETED else 8  # loaded together; channels a program


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
    if CODES:
        x = code
    else:
        x = tl.where(inverse_ == 0, x, code * tl.load(scale + channel, mask=mask, other=0.0)[None, :])
    return x


@triton.jit
def _conv_kernel(entered, ring, taps, factor, bias, inverse, scale, low, high, lengths, position, out, L, N_IN,
                 START: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
                 WIDTH: tl.constexpr, FIRST_ROUNDING: tl.constexpr, REST_ROUNDING: tl.constexpr, CODES: tl.constexpr,
                 FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BC channels of BT tokens of one sequence; the program of the first tokens moves the ring on."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * BT
    row = tl.program_id(2)
    rows = tl.num_programs(2)
    t = first + tl.arange(0, BT)
    live = channel < C
    mask = (t < L)[:, None] & live[None, :]
    now = tl.load(position)
    sequence = entered + row.to(tl.int64) * L * N_IN + START
    total = tl.zeros((BT, BC), tl.float32)
    for k in tl.static_range(WIDTH):
        at = t - (WIDTH - 1) + k
        x = tl.load(sequence + at[:, None] * N_IN + channel[None, :], mask=mask & (at >= 0)[:, None], other=0)
        x = x.to(tl.float32)
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
            at = channel * 0 + (last - WIDTH + k)
            new = tl.load(sequence + at * N_IN + channel, mask=live & (at >= 0), other=0).to(tl.float32)
            slot = (now + at + WIDTH) % WIDTH
            old = tl.load(ring + (slot * rows + row) * C + channel, mask=live & (at < 0), other=0).to(tl.float32)
            kept = kept + (new + old,)  # type: ignore[assignment]  # noqa: RUF005
        if NATIVE:
            tl.debug_barrier()  # every thread has read the ring
        for k in tl.static_range(WIDTH):
            slot = (now + L + k) % WIDTH
            tl.store(ring + (slot * rows + row) * C + channel, kept[k].to(ring.dtype.element_ty), mask=live)


def conv_rows(entered: Tensor, start: int, ring: Tensor, conv: ConvolutionPlan, split: int, sequences: Sequences,
              out: Tensor, format: int) -> None:  # fmt: skip
    """Depthwise causal convolution and SiLU, landed. ``entered`` (B L, N): channels from ``start``, int8 or float.

    ``ring`` (K, B, C) holds what came before and then the last K inputs. ``out`` (B L, C): int8 codes, or values, in
    the column order of ``format``. Channels below ``split`` round as u does, the others as B and C do.
    """
    length, channels = sequences.length, out.shape[1]
    tokens = min(CONV_TOKENS, triton.next_power_of_2(length))
    grid = (triton.cdiv(channels, CONV_CHANNELS), triton.cdiv(length, tokens), sequences.batch)
    _conv_kernel[grid](
        entered, ring, conv.taps, conv.factor, conv.bias, conv.inverse, conv.scale, conv.low, conv.high,
        sequences.lengths, sequences.position, out, length, entered.shape[1], START=start, C=channels, SPLIT=split,
        BT=tokens, BC=CONV_CHANNELS, WIDTH=conv.taps.shape[0], FIRST_ROUNDING=conv.rounding,
        REST_ROUNDING=conv.rounding_bc, CODES=out.dtype == torch.int8, FORMAT=format, NATIVE=not INTERPRETED,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _ssd_kernel(u, u_scale, dt_codes, dt_values, dt_scale, dt_bias, A, skip, state, state_scale, state_inverse,
                state_low, state_high, state_span, lengths, out, L, N_IN, dt_low, dt_high,
                DT_START: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
                T: tl.constexpr, BP: tl.constexpr, CODES: tl.constexpr, UNIFORM: tl.constexpr,
                DT_CODES: tl.constexpr, QUANTIZED: tl.constexpr, ALONG: tl.constexpr, DYNAMIC: tl.constexpr,
                STATE_ROUNDING: tl.constexpr, EXACT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence, T tokens at a time (Dao and Gu 2024, section 6).

    Within a step as masked attention, the state before it through its decay. The state (N, BP) stays in registers.
    """
    KIND: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at = tl.program_id(0)
    row = tl.program_id(1)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)
    n = tl.arange(0, N)
    group = H * P + (head * GROUPS // H) * N
    sequence = u + row.to(tl.int64) * L * C
    last = tl.load(lengths + row)
    place = (row.to(tl.int64) * (H * P) + channel)[None, :] * N + n[:, None]
    scale_place = channel[None, :] * N + n[:, None] if ALONG else channel[None, :]
    if DYNAMIC:
        scale_place += row * (H * P)
    s = tl.load(state + place).to(tl.float32)
    if QUANTIZED:
        s = s * tl.load(state_scale + scale_place)
    decay_rate, shift, through = tl.load(A + head), tl.load(dt_bias + head), tl.load(skip + head)
    u_unit = tl.load(u_scale + channel) if CODES else 1.0
    b_unit = tl.load(u_scale + group + n) if CODES else 1.0
    c_unit = tl.load(u_scale + group + GROUPS * N + n) if CODES else 1.0
    one_b = tl.load(u_scale + group) if UNIFORM else 1.0
    one_c = tl.load(u_scale + group + GROUPS * N) if UNIFORM else 1.0
    dt_unit = tl.load(dt_scale + head)
    step = tl.arange(0, T)
    for start in range(0, L, T):
        t = start + step
        live = t < L
        dt_place = (row.to(tl.int64) * L + t) * N_IN + DT_START + head
        if DT_CODES:
            dt = tl.load(dt_codes + dt_place, mask=live, other=0).to(tl.float32) * dt_unit
        else:
            dt = tl.load(dt_values + dt_place, mask=live, other=0.0).to(tl.float32)
        dt = tl.minimum(tl.maximum(softplus(dt + shift), dt_low), dt_high)
        dt = tl.where(t < last, dt, 0.0)
        log_decay = tl.cumsum(dt * decay_rate, axis=0)  # from before the step to token t
        whole = tl.sum(dt * decay_rate, axis=0)
        token = sequence + t[:, None] * C
        x = tl.load(token + channel[None, :], mask=live[:, None], other=0)
        B = tl.load(token + group + n[None, :], mask=live[:, None], other=0)
        C_ = tl.load(token + group + GROUPS * N + n[None, :], mask=live[:, None], other=0)
        if UNIFORM:
            scores = tl.dot(C_, tl.trans(B), out_dtype=tl.int32).to(tl.float32) * (one_b * one_c)
            C_ = (C_.to(tl.float32) * one_c).to(KIND)
            B_ = B.to(tl.float32) * one_b
        else:
            C_ = (C_.to(tl.float32) * c_unit).to(KIND)
            B_ = B.to(tl.float32) * b_unit
            scores = dot_float(C_, tl.trans(B_.to(KIND)), tl.zeros((T, T), tl.float32), NATIVE)
        between = log_decay[:, None] - log_decay[None, :]
        between = tl.exp(tl.where(step[:, None] >= step[None, :], between, -float("inf")))
        x_ = x.to(KIND)  # codes are exact
        nothing = tl.zeros((T, BP), tl.float32)
        y = dot_float((scores * between * dt[None, :]).to(KIND), x_, nothing, NATIVE) * u_unit
        y += tl.exp(log_decay)[:, None] * dot_float(C_, s.to(KIND), nothing, NATIVE)
        y += through * u_unit * x.to(tl.float32)
        to_end = B_ * (dt * tl.exp(whole - log_decay))[:, None]
        added = dot_float(tl.trans(to_end.to(KIND)), x_, tl.zeros((N, BP), tl.float32), NATIVE)
        s = tl.exp(whole) * s + added * u_unit
        out_place = (row.to(tl.int64) * L + t)[:, None] * (H * P) + channel[None, :]
        if out.dtype.element_ty == tl.float16:
            y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        tl.store(out + out_place, y.to(out.dtype.element_ty), mask=live[:, None])
    if QUANTIZED:
        if DYNAMIC:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(s), axis=0), state_span), _SMALLEST_SCALE)[None, :]
            tl.store(state_scale + scale_place, scale)
            inverse = tl.div_rn(1.0, scale)
        else:
            inverse = tl.load(state_inverse + scale_place)
        tl.store(state + place, to_codes(s, inverse, state_low, state_high, STATE_ROUNDING).to(tl.int8))
    else:
        tl.store(state + place, s.to(state.dtype.element_ty))


@triton.jit
def _ssd_token_kernel(u, u_scale, dt_codes, dt_values, dt_scale, dt_bias, A, skip, state, state_scale, state_inverse,
                      state_low, state_high, state_span, out, N_IN, dt_low, dt_high,
                      DT_START: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
                      BP: tl.constexpr, CODES: tl.constexpr, DT_CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                      ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr):  # fmt: skip
    """One token of many sequences: BP channels of one head. What bounds it is the state, read and written once."""
    C: tl.constexpr = H * P + 2 * GROUPS * N
    at = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
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
    x, B, C_ = tl.load(token + channel).to(tl.float32), tl.load(token + group + n).to(tl.float32), \
        tl.load(token + group + GROUPS * N + n).to(tl.float32)  # fmt: skip
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


def ssd_rows(u: Tensor, conv: ConvolutionPlan, dt: tuple[Tensor, Tensor], dt_input: InputPlan, dt_start: int,
             parameters: tuple[Tensor, Tensor, Tensor], state: Tensor, grid: StatePlan | None, groups: int,
             limit: tuple[float, float], sequences: Sequences, out: Tensor, uniform: bool, exact: bool) -> None:  # fmt: skip
    """Mamba-2's scan with skip: out (B L, E); ``state`` (B, H, P, N) is moved on. ``u``: the convolution's (B L, C).

    ``parameters``: dt_bias, A, skip. ``uniform``: B, and C, have one scale each in int8, so that C B^T is exact.
    """
    rows, heads, head_dim, states = state.shape
    filler = conv.factor
    codes = u.dtype == torch.int8
    grids = (grid.scale, grid.inverse, grid.low, grid.high, grid.span) if grid else (filler, filler, 0.0, 0.0, 0.0)
    shared = dict(
        DT_START=dt_start, H=heads, P=head_dim, N=states, GROUPS=groups, CODES=codes, DT_CODES=dt_input.codes,
        QUANTIZED=grid is not None, ALONG=grid.along_states if grid else False,
        DYNAMIC=grid is not None and grid.span > 0, STATE_ROUNDING=grid.rounding if grid else 0,
    )  # fmt: skip
    if sequences.length == 1:
        _ssd_token_kernel[(heads, rows)](
            u, conv.scale, *dt, dt_input.scale, *parameters, state, *grids, out, dt[0].shape[1], *limit, BP=head_dim,
            num_warps=4, **shared,
        )  # fmt: skip
        return
    channels = min(SSD_CHANNELS, head_dim)
    tokens = min(SSD_TOKENS, max(16, triton.next_power_of_2(sequences.length)))
    _ssd_kernel[(heads * head_dim // channels, rows)](
        u, conv.scale, *dt, dt_input.scale, *parameters, state, *grids, sequences.lengths, out, sequences.length,
        dt[0].shape[1], *limit, T=tokens, BP=channels, UNIFORM=codes and uniform, EXACT=exact, NATIVE=not INTERPRETED, num_warps=SSD_WARPS,
        num_stages=2, **shared,
    )  # fmt: skip


@triton.jit
def _selective_kernel(u, u_scale, dt, bc, A, skip, state, state_scale, state_inverse, state_low, state_high,
                      state_span, lengths, out, L, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
                      T: tl.constexpr, FORMAT: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                      ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr):  # fmt: skip
    """BE channels of one sequence, token by token, T tokens loaded ahead (Gu and Dao 2023, algorithm 2)."""
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.program_id(1)
    n = tl.arange(0, N)
    live = channel < E
    mask = live[:, None] & (n >= 0)[None, :]
    place = (row.to(tl.int64) * E + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * E
    grid_scale = tl.load(state_scale + scale_place, mask=live[:, None], other=0.0) if QUANTIZED else 1.0
    s = _load_state(state, place, mask, grid_scale, QUANTIZED)
    rate = tl.load(A + channel[:, None] * N + n[None, :], mask=mask, other=0.0) * 1.4426950408889634  # log2(e)
    through = tl.load(skip + channel, mask=live, other=0.0)
    unit = tl.load(u_scale + channel, mask=live, other=0.0) if CODES else 1.0
    last = tl.load(lengths + row)
    base = row.to(tl.int64) * L
    u_at, dt_at = u + base * E + permuted(channel, FORMAT), dt + base * E + channel
    bc_at, out_at = bc + base * (2 * N) + n, out + base * E + channel
    for start in range(0, L, T):
        us, dts, Bs, Cs = (), (), (), ()
        for i in tl.static_range(T):
            t = channel * 0 + (start + i)
            us = us + (tl.load(u_at + t * E, mask=live & (t < L), other=0),)  # type: ignore[assignment]  # noqa: RUF005
            dts = dts + (tl.load(dt_at + t * E, mask=live & (t < last), other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
            Bs = Bs + (tl.load(bc_at + (start + i) * (2 * N), mask=n * 0 + (start + i) < L, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
            Cs = Cs + (tl.load(bc_at + (start + i) * (2 * N) + N, mask=n * 0 + (start + i) < L, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(T):
            x = us[i].to(tl.float32) * unit
            delta = dts[i].to(tl.float32)
            s = tl.exp2(delta[:, None] * rate) * s + (delta * x)[:, None] * Bs[i][None, :]
            y = tl.sum(s * Cs[i][None, :], axis=1) + through * x
            if out.dtype.element_ty == tl.float16:
                y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
            tl.store(out_at + (start + i) * E, y.to(out.dtype.element_ty), mask=live & (channel * 0 + (start + i) < L))
    _store_state(state, place, mask, s, state_scale, state_inverse, scale_place, live[:, None], state_low, state_high,
                 state_span, QUANTIZED, DYNAMIC, STATE_ROUNDING)  # fmt: skip


def selective_rows(u: Tensor, u_input: InputPlan, dt: Tensor, bc: Tensor, A: Tensor, skip: Tensor, state: Tensor,
                   grid: StatePlan | None, sequences: Sequences, out: Tensor, format: int) -> None:  # fmt: skip
    """Mamba-1's scan with skip: out (B L, E); ``state`` (B, E, N) is moved on.

    ``u``: int8 or float (B L, E), columns in the order of ``format``; ``dt``: after its softplus, (B L, E); ``bc``:
    float32 (B L, 2 N).
    """
    rows, channels, states = state.shape
    filler = skip
    grids = (grid.scale, grid.inverse, grid.low, grid.high, grid.span) if grid else (filler, filler, 0.0, 0.0, 0.0)
    _selective_kernel[(triton.cdiv(channels, SCAN_CHANNELS), rows)](
        u, u_input.scale, dt, bc, A, skip, state, *grids, sequences.lengths, out, sequences.length, E=channels,
        N=states, BE=SCAN_CHANNELS, T=min(SCAN_TOKENS, sequences.length), FORMAT=format, CODES=u.dtype == torch.int8,
        QUANTIZED=grid is not None, ALONG=grid.along_states if grid else False,
        DYNAMIC=grid is not None and grid.span > 0, STATE_ROUNDING=grid.rounding if grid else 0, num_warps=1,
    )  # fmt: skip
