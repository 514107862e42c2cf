# mypy: allow-untyped-defs
"""Many tokens of B sequences at once, and their causal convolution, from the decoder's ring to the decoder's ring.

Sequences of one call have L places; of sequence b the first ``lengths[b]`` hold tokens, which move its state.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemm import unpermuted
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import silu, to_codes

CONV_TOKENS, CONV_AHEAD, CONV_CHANNELS, CONV_WARPS = 16, 8, 256, 2  # a program


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
        FIRST_ROUNDING=conv.rounding, REST_ROUNDING=conv.rounding_bc, CODES=codes, FORMAT=format,
        NATIVE=not INTERPRETED, num_warps=CONV_WARPS,
    )  # fmt: skip
