# mypy: allow-untyped-defs
"""One token through convolution and scan, state in int8, float16, bfloat16 or float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.dot import load_grid, load_weights, row_product
from squamata.kernels.gpu.formats import read_flagged
from squamata.kernels.gpu.gemv import INTERPRETED, Blocks, Count, Product
from squamata.kernels.gpu.math import (
    STOCHASTIC,
    let_next_start,
    softplus,
    to_codes,
    to_int8,
    to_stochastic,
    wait_for_previous,
    wait_for_programs,
    wanted_programs,
)
from squamata.kernels.gpu.norm import _SMALLEST_SCALE, _land_halves, _launch

SSD_WARPS = 4


@dataclass(frozen=True)
class StatePlan:
    """Grid of an integer state; ``scale``, ``inverse`` float32 (channels, 1 or N). Not used for a float state.

    ``span`` above 0: every channel's scale is taken from its N states at every token (absmax / span), and ``scale``
    (B, channels) is part of the state.
    """

    scale: Tensor
    inverse: Tensor
    low: float
    high: float
    rounding: int
    along_states: bool
    span: float = 0.0


@dataclass(frozen=True)
class InputPlan:
    """How a float32 or int8 input that in_proj left is read: ``scale`` float32, one a channel.

    ``coarse``: the scale of flagged codes, if the input is packed in 4 + 1 bits (uint8; only u of Mamba-1).
    """

    codes: bool
    scale: Tensor
    coarse: Tensor | None = None


@triton.jit
def _read(codes, values, unit, place, mask, CODES: tl.constexpr):
    """Float values of an input: int8 codes times ``unit``, or float32."""
    if CODES:
        x = tl.load(codes + place, mask=mask, other=0).to(tl.float32) * unit
    else:
        x = tl.load(values + place, mask=mask, other=0.0)
    return x


@triton.jit
def _load_state(state, place, mask, scale, QUANTIZED: tl.constexpr):
    s = tl.load(state + place, mask=mask, other=0).to(tl.float32)
    return s * scale if QUANTIZED else s


@triton.jit
def _store_state(state, place, mask, s, state_scale, state_inverse, scale_place, live, low, high, span,
                 QUANTIZED: tl.constexpr, DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    """Land s (channels, N) on the grid of the state, or take a new scale for every channel first."""
    if QUANTIZED:
        if DYNAMIC:
            magnitude = tl.max(tl.abs(s), axis=1)[:, None]  # zeros where there is no state
            scale = tl.maximum(magnitude / span, _SMALLEST_SCALE)
            tl.store(state_scale + scale_place, scale, mask=live)
            inverse = 1.0 / scale
        else:
            inverse = tl.load(state_inverse + scale_place, mask=live, other=0.0)
        if ROUNDING == STOCHASTIC:
            codes = to_stochastic(s, inverse, low, high, place).to(tl.int8)
        else:
            codes = to_int8(s, inverse, low, high, ROUNDING)
        tl.store(state + place, codes, mask=mask)
    else:
        tl.store(state + place, s.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _load_grid(grid, scale_place, live, QUANTIZED: tl.constexpr):
    return tl.load(grid[0] + scale_place, mask=live, other=0.0) if QUANTIZED else 1.0


@triton.jit
def _land_block(y, scale, out, row, at, channel, live, E: tl.constexpr, CHANNELS: tl.constexpr):
    """Leave y, the channels of one block, in 16 bits."""
    largest = tl.max(tl.where(live, tl.abs(y), 0.0), axis=0)
    _land_halves(y, largest, out, scale, row * (E // CHANNELS) + at, row * (2 * E) + channel, live, E)


@triton.jit
def _ssd_kernel(mixed, entered, head_tables, grid, state, after, blocks, out, N_OUT, dt_limit,
                DT_START: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr,
                BP: tl.constexpr, BN: tl.constexpr, DT_CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                ALONG: tl.constexpr, DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr, BLOCKS: tl.constexpr,
                HALVES: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence: update the state, skip; with ``blocks`` gate and land them."""
    dt_scale, dt_bias, A, skip = head_tables
    at = tl.program_id(0)
    row = tl.program_id(1)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)  # of E
    n = tl.arange(0, BN)
    inside = n < N
    every = (channel >= 0)[:, None]
    mask = every & inside[None, :]
    place = (row.to(tl.int64) * (H * P) + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * (H * P)
    s = _load_state(state, place, mask, _load_grid(grid, scale_place, every, QUANTIZED), QUANTIZED)
    decay_rate, shift, through = tl.load(A + head), tl.load(dt_bias + head), tl.load(skip + head)
    dt_unit = tl.load(dt_scale + head)
    gain = tl.load(blocks[1] + channel) if BLOCKS else 1.0
    wait_for_programs(after, wanted_programs(after), PDL, NATIVE)  # not for the state, which the last step wrote
    let_next_start(PDL)  # not earlier: programs of the product after next would take places (measured)
    dt = _read(entered[0], entered[1], dt_unit, row * N_OUT + DT_START + head, head >= 0, DT_CODES)
    mixed_row = mixed + row * (H * P + 2 * GROUPS * N)
    b_channel = H * P + (head * GROUPS // H) * N + n
    u = tl.load(mixed_row + channel)
    B = tl.load(mixed_row + b_channel, mask=inside, other=0.0)
    C = tl.load(mixed_row + GROUPS * N + b_channel, mask=inside, other=0.0)
    dt = softplus(dt + shift)
    dt = tl.minimum(tl.maximum(dt, dt_limit[0]), dt_limit[1])
    s = tl.exp(dt * decay_rate) * s + (dt * u)[:, None] * B[None, :]
    y = tl.sum(s * C[None, :], axis=1) + through * u
    if not BLOCKS:
        tl.store(out + row * (H * P) + channel, y)
    _store_state(state, place, mask, s, grid[0], grid[1], scale_place, every, grid[2], grid[3], grid[4], QUANTIZED,
                 DYNAMIC, ROUNDING)  # fmt: skip
    if after is not None:
        wait_for_previous(PDL)  # for z; and so that whoever waits for this kernel has waited for the one before
    if BLOCKS:
        if blocks[0] is not None:
            y *= tl.load(blocks[0] + row * (H * P) + channel)
        if blocks[2] is not None:
            tl.store(blocks[2] + row * (H * P // BP) + at, tl.sum(y * y, axis=0))
        y *= gain
        if HALVES:
            _land_block(y, blocks[3], out, row, at, channel, channel >= 0, H * P, BP)
        else:
            tl.store(out + row * (H * P) + channel, y)


def ssd_step(mixed: Tensor, entered: tuple[Tensor, Tensor], dt: InputPlan, tables: tuple[Tensor, Tensor, Tensor],
             state: Tensor, grid: StatePlan | None, out: Tensor, dt_start: int,
             groups: int, limit: tuple[float, float], channels: int, pdl: bool, after: Count | None = None,
             blocks: Blocks | None = None) -> None:  # fmt: skip
    """Mamba-2: out (B, E) = scan + skip; ``state`` (B, H, P, N) is updated. ``blocks``: gated and landed so in ``out``.

    ``mixed``: float32 (B, E + 2 G N), u, B and C; ``entered``: codes and values of rows of in_proj, of dt from
    ``dt_start``; ``tables``: dt_bias, A and skip (H,). They are there when ``after`` (None: what came before) has come.
    """
    rows, heads, head_dim, states = state.shape
    _ssd_kernel[(heads * head_dim // channels, rows)](
        mixed, entered, (dt.scale, *tables), _grid(grid, mixed), state, *_optional(after, blocks), out,
        entered[0].shape[1], limit, DT_START=dt_start, H=heads, P=head_dim, N=states, GROUPS=groups, BP=channels,
        BN=triton.next_power_of_2(states), DT_CODES=dt.codes, **_grid_cut(grid), BLOCKS=blocks is not None,
        HALVES=blocks is not None and blocks.scale is not None, NATIVE=not INTERPRETED, PDL=pdl,
        num_warps=SSD_WARPS, **_launch(pdl),
    )  # fmt: skip


def _optional(after: Count | None, blocks: Blocks | None) -> tuple[Any, Any]:
    """As kernels take them."""
    return None if after is None else after.operands, None if blocks is None else blocks.operands


def _grid(grid: StatePlan | None, filler: Tensor) -> tuple[Tensor, Tensor, float, float, float]:
    if grid is None:
        return filler, filler, 0.0, 0.0, 0.0
    return grid.scale, grid.inverse, grid.low, grid.high, grid.span


def _grid_cut(grid: StatePlan | None) -> dict[str, Any]:
    """What a kernel is compiled for, of the state's grid."""
    along, dynamic, rounding = (grid.along_states, grid.span > 0, grid.rounding) if grid else (False, False, 0)
    return {"QUANTIZED": grid is not None, "ALONG": along, "DYNAMIC": dynamic, "ROUNDING": rounding}


@triton.jit
def _land_dt(y, landing, n, CUT: tl.constexpr):
    inverse, low, high, scale = landing
    if CUT.any_codes:
        y = tl.where(inverse == 0, y, to_codes(y, inverse, low, high, CUT.rounding) * scale)
    return y


@triton.jit
def _selective_kernel(dt_product, u_rows, gate, low, channel_tables, b_scale, grid, state, block_scale, out, N_LOW,
                      B_START: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
                      U_CODES: tl.constexpr, U_FLAGGED: tl.constexpr, B_CODES: tl.constexpr,
                      QUANTIZED: tl.constexpr, ALONG: tl.constexpr, DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr,
                      HALVES: tl.constexpr, CUT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A tile of channels of one sequence: dt by its product, the state (Gu and Dao 2023, algorithm 2), skip, gate;
    HALVES: landed in 16 bits, a tile a block."""
    u_scale, u_coarse, dt_bias, A, skip = channel_tables
    tile = tl.program_id(0)
    channel = tile * CUT.tile_rows + tl.arange(0, CUT.tile_rows)
    row = tl.program_id(1)
    n = tl.arange(0, BN)
    live = channel < E
    inside = n < N
    mask = live[:, None] & inside[None, :]
    place = (row.to(tl.int64) * E + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * E
    weights = load_weights(dt_product, tile, CUT)
    dt_grid = load_grid(dt_product, channel, CUT)
    decay_rate = tl.load(A + channel[:, None] * N + n[None, :], mask=mask, other=0.0)
    s = _load_state(state, place, mask, _load_grid(grid, scale_place, live[:, None], QUANTIZED), QUANTIZED)
    shift = tl.load(dt_bias + channel, mask=live, other=0.0)
    through = tl.load(skip + channel, mask=live, other=0.0)
    u_unit = tl.load(u_scale + channel, mask=live, other=0.0)
    b_unit, c_unit = tl.load(b_scale + n, mask=inside, other=0.0), tl.load(b_scale + N + n, mask=inside, other=0.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    if U_FLAGGED:
        u = read_flagged(u_rows, row, E, channel, live, u_unit, tl.load(u_coarse + channel, mask=live, other=0.0))
    else:
        u = _read(u_rows, u_rows, u_unit, row * E + channel, live, U_CODES)
    B = _read(low[0], low[1], b_unit, row * N_LOW + B_START + n, inside, B_CODES)
    C = _read(low[0], low[1], c_unit, row * N_LOW + B_START + N + n, inside, B_CODES)
    gated = tl.load(gate + row * E + channel, mask=live, other=0.0)
    dt = softplus(_land_dt(row_product(dt_product, weights, row, False, CUT), dt_grid, channel, CUT) + shift)
    s = tl.exp(dt[:, None] * decay_rate) * s + (dt * u)[:, None] * B[None, :]
    _store_state(state, place, mask, s, grid[0], grid[1], scale_place, live[:, None], grid[2], grid[3], grid[4],
                 QUANTIZED, DYNAMIC, ROUNDING)  # fmt: skip
    y = tl.sum(s * C[None, :], axis=1) + through * u
    if HALVES:
        _land_block(y * gated, block_scale, out, row, tile, channel, live, E, CUT.tile_rows)
    else:
        tl.store(out + row * E + channel, y * gated, mask=live)


def selective_step(u: Tensor, gate: Tensor, dt: Product, low: tuple[Tensor, Tensor], inputs: dict[str, InputPlan],
                   tables: tuple[Tensor, Tensor, Tensor], state: Tensor, grid: StatePlan | None, out: Tensor,
                   b_start: int, pdl: bool, blocks: Blocks | None = None) -> None:  # fmt: skip
    """Mamba-1: out (B, E) = (scan + skip) * gate; ``state`` (B, E, N) is updated. ``blocks``: landed so in ``out``.

    ``dt``: its product, which takes ``low`` (codes and values; B and C from ``b_start``); ``inputs``: u and BC (scales
    of B, then of C); ``tables``: dt_bias (E,), A (E, N) and skip (E,).
    """
    rows, channels, states = state.shape
    coarse = inputs["u"].coarse
    units = (inputs["u"].scale, tables[0] if coarse is None else coarse)
    _selective_kernel[(dt.tiles, rows)](
        dt.operands, u, gate, low, (*units, *tables), inputs["BC"].scale, _grid(grid, gate), state,
        None if blocks is None else blocks.scale, out, low[0].shape[1], B_START=b_start, E=channels, N=states,
        BN=triton.next_power_of_2(states),
        U_CODES=inputs["u"].codes, U_FLAGGED=coarse is not None, B_CODES=inputs["BC"].codes, **_grid_cut(grid),
        HALVES=blocks is not None and blocks.scale is not None, CUT=dt.cut, PDL=pdl, num_warps=dt.warps, **_launch(pdl),
    )  # fmt: skip
