# mypy: allow-untyped-defs
"""Many tokens of B sequences at once, and their causal convolution, from the decoder's ring to the decoder's ring.

Sequences of one call have L places; of sequence b the first ``lengths[b]`` hold tokens, which move its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemm import unpermuted
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import as_float, rounded_bits, silu, to_codes

CONV_TOKENS, CONV_AHEAD, CONV_CHANNELS, CONV_WARPS = 16, 8, 256, 2  # a program
ONE_ROWS, ONE_CHANNELS, ONE_WARPS = 2, 256, 2  # a program, where every sequence has one token


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
    """x on the grids of its channels, ``second`` ones with their own rounding; as it is where inverse is 0."""
    inverse, scale, low, high = grid
    code = to_codes(x, inverse, low, high, ROUNDING if ROUNDING >= 0 else SECOND_ROUNDING)
    if ROUNDING >= 0 and SECOND_ROUNDING >= 0 and ROUNDING != SECOND_ROUNDING:
        code = tl.where(second, to_codes(x, inverse, low, high, SECOND_ROUNDING), code)
    return code if CODES else tl.where(inverse == 0, x, code * scale)


@triton.jit
def _stored(u, kind: tl.constexpr):
    """u as ``kind``; int8 from whole numbers without the conversion, for the reason of ``as_float``."""
    return rounded_bits(u).to(tl.int8) if kind == tl.int8 else u.to(kind)


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
            window = window + (as_float(new[i], NATIVE),)  # type: ignore[assignment]  # noqa: RUF005
            total = window[0] * tap[0]  # type: ignore[misc]
            for k in tl.static_range(1, WIDTH):
                total += window[k] * tap[k]
            u = silu(total * factor_ + bias_, NATIVE)
            if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
                u = _landed(u, grid, channel >= SPLIT, FIRST_ROUNDING, REST_ROUNDING, CODES)
            at = (row.to(tl.int64) * L + start + i) * C + place
            tl.store(out + at, _stored(u, out.dtype.element_ty), mask=live & (channel * 0 + (start + i) < L))
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


@triton.jit
def _one_kernel(entered, ring, taps, factor, bias, inverse, scale, low, high, position, out, ROWS, N_IN,
                START: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
                WIDTH: tl.constexpr, FIRST_ROUNDING: tl.constexpr, REST_ROUNDING: tl.constexpr, CODES: tl.constexpr,
                FORMAT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BC channels of BR sequences of one token: tables are read once, the newest input takes the oldest one's slot."""
    place = tl.program_id(0) * BC + tl.arange(0, BC)
    channel = unpermuted(place, FORMAT)  # stores stay whole
    live = place < C
    now = tl.load(position)
    first = tl.program_id(1) * BR
    tap = ()
    for k in tl.static_range(WIDTH):
        tap = tap + (tl.load(taps + k * C + channel, mask=live, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    factor_ = tl.load(factor + channel, mask=live, other=0.0)
    bias_ = tl.load(bias + channel, mask=live, other=0.0)
    if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
        grid = (
            tl.load(inverse + channel, mask=live, other=0.0), tl.load(scale + channel, mask=live, other=0.0),
            tl.load(low + channel, mask=live, other=0.0), tl.load(high + channel, mask=live, other=0.0),
        )  # fmt: skip
    given = ()
    for i in tl.static_range(BR):
        row = (first + i).to(tl.int64)
        inside = live & (channel * 0 + (first + i) < ROWS)
        window = ()
        for k in tl.static_range(WIDTH - 1):
            slot = ((now + 1 + k) % WIDTH * ROWS + row) * C
            window = window + (tl.load(ring + slot + channel, mask=inside, other=0),)  # type: ignore[assignment]  # noqa: RUF005
        newest = tl.load(entered + row * N_IN + START + channel, mask=inside, other=0)
        given = given + (window + (newest,),)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(BR):
        row = (first + i).to(tl.int64)
        inside = live & (channel * 0 + (first + i) < ROWS)
        total = given[i][0].to(tl.float32) * tap[0]  # type: ignore[misc]
        for k in tl.static_range(1, WIDTH):
            total += given[i][k].to(tl.float32) * tap[k]
        u = silu(total * factor_ + bias_, NATIVE)
        if FIRST_ROUNDING >= 0 or REST_ROUNDING >= 0:
            u = _landed(u, grid, channel >= SPLIT, FIRST_ROUNDING, REST_ROUNDING, CODES)
        tl.store(out + row * C + place, _stored(u, out.dtype.element_ty), mask=inside)
        slot = (now % WIDTH * ROWS + row) * C
        tl.store(ring + slot + channel, given[i][WIDTH - 1].to(ring.dtype.element_ty), mask=inside)


def conv_rows(entered: Tensor, start: int, ring: Tensor, conv: ConvolutionPlan, split: int, sequences: Sequences,
              out: Tensor, codes: bool, format: int) -> None:  # fmt: skip
    """Depthwise causal convolution and SiLU, landed. ``entered`` (B L, N): channels from ``start``, int8 or float.

    ``ring`` (K, B, C) holds what came before and then the last K inputs. ``out`` (B L, C): ``codes`` (in any type), or
    values, in the column order of ``format``. Channels below ``split`` round as u does, the others as B and C do.
    Where there is one place a sequence, every sequence has a token.
    """
    length, channels = sequences.length, out.shape[1]
    tables = (conv.taps, conv.factor, conv.bias, conv.inverse, conv.scale, conv.low, conv.high)
    shared: dict[str, Any] = {
        "START": start, "C": channels, "SPLIT": split, "WIDTH": conv.taps.shape[0], "FIRST_ROUNDING": conv.rounding,
        "REST_ROUNDING": conv.rounding_bc, "CODES": codes, "FORMAT": format, "NATIVE": not INTERPRETED,
    }  # fmt: skip
    if length == 1:
        _one_kernel[(triton.cdiv(channels, ONE_CHANNELS), triton.cdiv(sequences.batch, ONE_ROWS))](
            entered, ring, *tables, sequences.position, out, sequences.batch, entered.shape[1], BR=ONE_ROWS,
            BC=ONE_CHANNELS, num_warps=ONE_WARPS, **shared,
        )  # fmt: skip
        return
    tokens = min(CONV_TOKENS, triton.next_power_of_2(length))
    grid = (triton.cdiv(channels, CONV_CHANNELS), triton.cdiv(length, tokens), sequences.batch)
    _conv_kernel[grid](
        entered, ring, *tables, sequences.lengths, sequences.position, out, length, entered.shape[1], BT=tokens,
        AHEAD=min(CONV_AHEAD, tokens), BC=CONV_CHANNELS, num_warps=CONV_WARPS, **shared,
    )  # fmt: skip
