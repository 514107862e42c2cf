# mypy: allow-untyped-defs
"""Mamba-1's scan over many tokens, segments of them at once: where each segment ends from nothing, then all outputs.

A lane owns whole channels, so that a token needs no exchange between lanes. Exponentials bound both kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.gemm import permuted
from squamata.kernels.gpu.math import as_float, take_turn
from squamata.kernels.gpu.scan import _load_state, _store_state

TOKENS = 8  # loaded together
CHANNELS, WARPS = 32, 1  # a program
# Segments cost the exponentials twice: below FEW programs without them they are cut, PROGRAMS in all (four for each of
# 528 schedulers) of at least LEAST tokens; from MANY on, one is enough; between, no lane owns a channel
FEW, MANY, PROGRAMS, LEAST = 320, 1056, 2112, 32
SHORTEST, MOST_STATES = 128, 32  # tokens a sequence; of a channel, which a lane holds


@dataclass(frozen=True)
class Segments:
    """``ends`` float32 (B, segments - 1, N, E): the state that each segment but the last leaves if it starts from
    nothing; ``moved`` (B, segments - 1, E): the sum of its dt. ``tokens`` a segment, ``count`` of them.
    """

    ends: Tensor
    moved: Tensor
    tokens: int
    count: int


def segments(batch: int, length: int, state: Tensor) -> Segments | None:
    """For sequences of ``length`` places and a state (B, E, N); None where another kernel is better."""
    _, channels, states = state.shape
    alone = batch * triton.cdiv(channels, CHANNELS)
    if length < SHORTEST or states % 4 or states > MOST_STATES or FEW <= alone < MANY:
        return None
    wanted = 1 if alone >= MANY else PROGRAMS // alone
    tokens = triton.cdiv(max(LEAST, triton.cdiv(length, wanted)), TOKENS) * TOKENS
    count = triton.cdiv(length, tokens)
    ends = torch.zeros(batch, count - 1, states, channels, device=state.device)
    return Segments(ends, torch.zeros(batch, count - 1, channels, device=state.device), tokens, count)


@triton.jit
def _row(at, N: tl.constexpr, NATIVE: tl.constexpr):
    """N neighbouring float32 that every lane needs, four to a load."""
    found = ()
    for n in tl.static_range(0, N, 4):
        if NATIVE:
            four = tl.inline_asm_elementwise(
                "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [(at + n).to(tl.int64)],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,  # not before its turn
            )  # fmt: skip
        else:
            four = (tl.load(at + n), tl.load(at + n + 1), tl.load(at + n + 2), tl.load(at + n + 3))
        found = found + (four[0], four[1], four[2], four[3])  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _rates(A, channel, live, N: tl.constexpr):
    rates = ()
    for n in tl.static_range(N):
        rate = tl.load(A + channel * N + n, mask=live, other=0.0) * 1.4426950408889634  # log2(e)
        rates = rates + (rate,)  # type: ignore[assignment]  # noqa: RUF005
    return rates


@triton.jit
def _inputs(u_at, dt_at, at, start, last, channel, E: tl.constexpr, T: tl.constexpr):
    """u and dt of tokens at ... at + T - 1; dt, which moves the state, of start ... last - 1."""
    loaded = ()
    for i in tl.static_range(T):
        time = channel * 0 + (at + i)
        moves = (channel < E) & (time >= start) & (time < last)
        u = tl.load(u_at + (at + i) * E, mask=channel < E, other=0)
        loaded = loaded + ((u, tl.load(dt_at + (at + i) * E, mask=moves, other=0.0)),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit
def _moved_on(s, rates, delta, x, B, N: tl.constexpr):
    """The states after one token."""
    new, input = (), delta * x
    for n in tl.static_range(N):
        new = new + (tl.exp2(delta * rates[n]) * s[n] + input * B[n],)  # type: ignore[assignment]  # noqa: RUF005
    return new


@triton.jit
def _ends_kernel(u, u_scale, dt, bc, A, lengths, ends, moved, L, SEGMENT, E: tl.constexpr, N: tl.constexpr,
                 BE: tl.constexpr, T: tl.constexpr, FORMAT: tl.constexpr, CODES: tl.constexpr,
                 PDL: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BE channels of one segment of one sequence, from nothing."""
    take_turn(PDL)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    segment, row = tl.program_id(1), tl.program_id(2)
    live = channel < E
    rates = _rates(A, channel, live, N)
    unit = tl.load(u_scale + channel, mask=live, other=0.0) if CODES else 1.0
    last, base = tl.load(lengths + row), row.to(tl.int64) * L
    u_at, dt_at, b_at = u + base * E + permuted(channel, FORMAT), dt + base * E + channel, bc + base * (2 * N)
    total, s = tl.zeros((BE,), tl.float32), ()
    for _ in tl.static_range(N):
        s = s + (tl.zeros((BE,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(segment * SEGMENT, (segment + 1) * SEGMENT, T):  # never the last: all of it exists
        given = _inputs(u_at, dt_at, start, start, last, channel, E, T)
        for i in tl.static_range(T):
            delta = given[i][1].to(tl.float32)
            x = as_float(given[i][0], NATIVE) * unit
            s = _moved_on(s, rates, delta, x, _row(b_at + (start + i) * (2 * N), N, NATIVE), N)
            total += delta
    at = row * (tl.num_programs(1)) + segment
    tl.store(moved + at.to(tl.int64) * E + channel, total, mask=live)
    for n in tl.static_range(N):
        tl.store(ends + (at.to(tl.int64) * N + n) * E + channel, s[n], mask=live)


@triton.jit
def _segment_kernel(u, u_scale, dt, bc, A, skip, state, state_scale, state_inverse, state_low, state_high, state_span,
                    lengths, ends, moved, out, L, SEGMENT, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
                    T: tl.constexpr, FORMAT: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                    ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr,
                    PDL: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BE channels of one segment of one sequence, from where the segments before it lead (Gu and Dao 2023,
    algorithm 2). The last one leaves the state.
    """
    take_turn(PDL)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    segment, row = tl.program_id(1), tl.program_id(2)
    live = channel < E
    rates = _rates(A, channel, live, N)
    through = tl.load(skip + channel, mask=live, other=0.0)
    unit = tl.load(u_scale + channel, mask=live, other=0.0) if CODES else 1.0
    last, base = tl.load(lengths + row), row.to(tl.int64) * L
    u_at, dt_at, b_at = u + base * E + permuted(channel, FORMAT), dt + base * E + channel, bc + base * (2 * N)
    out_at = out + base * E + channel
    place = (row.to(tl.int64) * E + channel) * N
    s = ()
    for n in tl.static_range(N):
        scale_place = channel * N + n if ALONG else (channel + row * E if DYNAMIC else channel)
        scale = tl.load(state_scale + scale_place, mask=live, other=0.0) if QUANTIZED else 1.0
        s = s + (_load_state(state, place + n, live, scale, QUANTIZED),)  # type: ignore[assignment]  # noqa: RUF005
    before = row.to(tl.int64) * (tl.num_programs(1) - 1)
    for earlier in range(segment):
        total, new = tl.load(moved + (before + earlier) * E + channel, mask=live, other=0.0), ()
        for n in tl.static_range(N):
            end = tl.load(ends + ((before + earlier) * N + n) * E + channel, mask=live, other=0.0)
            new = new + (tl.exp2(total * rates[n]) * s[n] + end,)  # type: ignore[assignment]  # noqa: RUF005
        s = new
    for start in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, L), T):
        at = tl.minimum(start, L - T)  # the last tokens once more, instead of places that do not exist
        given = _inputs(u_at, dt_at, at, start, last, channel, E, T)
        for i in tl.static_range(T):
            delta, bc_at = given[i][1].to(tl.float32), b_at + (at + i) * (2 * N)
            x = as_float(given[i][0], NATIVE) * unit
            s = _moved_on(s, rates, delta, x, _row(bc_at, N, NATIVE), N)
            y, C = through * x, _row(bc_at + N, N, NATIVE)
            for n in tl.static_range(N):
                y += s[n] * C[n]
            if out.dtype.element_ty == tl.float16:
                y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
            tl.store(out_at + (at + i) * E, y.to(out.dtype.element_ty), mask=live & (channel * 0 + (at + i) >= start))
    if segment == tl.num_programs(1) - 1:
        states = tl.arange(0, N)[None, :]
        whole = tl.zeros((BE, N), tl.float32)
        for i in tl.static_range(N):
            whole = tl.where(states == i, s[i][:, None], whole)
        scale_at = channel[:, None] * N + states if ALONG else channel[:, None]
        if DYNAMIC:
            scale_at += row * E
        _store_state(state, place[:, None] + states, live[:, None] & (states >= 0), whole, state_scale, state_inverse,
                     scale_at, live[:, None], state_low, state_high, state_span, QUANTIZED, DYNAMIC,
                     STATE_ROUNDING)  # fmt: skip
