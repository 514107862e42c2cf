# mypy: allow-untyped-defs
"""Mamba-1's scan over many tokens of B sequences, from the decoder's state to the decoder's state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.gemm import permuted
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import small_to_float
from squamata.kernels.gpu.scan import InputPlan, StatePlan, _load_state, _store_state
from squamata.kernels.gpu.sequence import Sequences

SCAN_TOKENS, SCAN_CHANNELS = 16, 128 if INTERPRETED else 8  # loaded together; channels a program


@triton.jit
def _tokens(u_at, dt_at, bc_at, at, start, last, channel, E: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """u, dt (channels) and B, C (N) of tokens at ... at + T - 1; dt, which moves the state, of start ... last - 1."""
    loaded = ()
    for i in tl.static_range(T):
        time = channel * 0 + (at + i)
        moves = (channel < E) & (time >= start) & (time < last)
        u = tl.load(u_at + at * E + i * E, mask=channel < E, other=0)
        delta = tl.load(dt_at + at * E + i * E, mask=moves, other=0.0)
        bc = bc_at + at * (2 * N) + i * (2 * N)
        loaded = loaded + ((u, delta, tl.load(bc), tl.load(bc + N)),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit
def _as_float(x, NATIVE: tl.constexpr):
    """int8 codes or floats as float32. Conversions of integers would share a unit with the exponential."""
    if x.dtype == tl.int8 and NATIVE:
        x = small_to_float(x.to(tl.int32))
    return x.to(tl.float32)


@triton.jit
def _selective_kernel(u, u_scale, dt, bc, A, skip, state, state_scale, state_inverse, state_low, state_high,
                      state_span, lengths, out, L, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
                      T: tl.constexpr, FORMAT: tl.constexpr, CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                      ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr,
                      NATIVE: tl.constexpr):  # fmt: skip
    """BE channels of one sequence, token by token, T loaded together (Gu and Dao 2023, algorithm 2)."""
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
    bc_at, out_at = bc + base * (2 * N) + n, out + base * E + channel[:, None]
    for start in range(0, L, T):
        at = tl.minimum(start, L - T)  # the last tokens once more, instead of places that do not exist
        given = _tokens(u_at, dt_at, bc_at, at, start, last, channel, E, N, T)
        y = tl.zeros((BE, N), tl.float32)  # of T tokens, whose places are the states'
        for i in tl.static_range(T):
            x, delta = _as_float(given[i][0], NATIVE) * unit, given[i][1].to(tl.float32)
            s = tl.exp2(delta[:, None] * rate) * s + (delta * x)[:, None] * given[i][2][None, :]
            out_i = tl.sum(s * given[i][3][None, :], axis=1) + through * x
            y = tl.where(n[None, :] == i, out_i[:, None], y)
        if out.dtype.element_ty == tl.float16:
            y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        written = mask & ((n < T) & (at + n >= start))[None, :]
        tl.store(out_at + (at + n)[None, :] * E, y.to(out.dtype.element_ty), mask=written)
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
        N=states, BE=SCAN_CHANNELS, T=min(SCAN_TOKENS, states, sequences.length), FORMAT=format,
        CODES=u.dtype == torch.int8, QUANTIZED=grid is not None, ALONG=grid.along_states if grid else False,
        DYNAMIC=grid is not None and grid.span > 0, STATE_ROUNDING=grid.rounding if grid else 0,
        NATIVE=not INTERPRETED, num_warps=1,
        maxnreg=255,  # with fewer registers the assembler moves every load to its use, each with the whole latency
    )  # fmt: skip
