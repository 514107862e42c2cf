# mypy: allow-untyped-defs
"""One token through convolution and scan, state in int8, float16, bfloat16 or float32."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu_formats import read_flagged
from squamata.kernels.gpu_math import let_next_start, silu, softplus, to_codes, wait_for_previous
from squamata.kernels.gpu_norm import _SMALLEST_SCALE, _launch

SSD_WARPS = 4


@dataclass(frozen=True)
class ConvolutionPlan:
    """Depthwise convolution over C channels that read a ring of inputs, and the sites of its outputs.

    ``taps``: float32 (K, C), integers if the inputs are codes. All float32 (C,): ``factor`` (scale of input times
    weight), ``bias``, ``inverse`` (0: the output stays float), ``scale``, ``low``, ``high``. Roundings of u, and of
    B and C: -1 where all stay float. ``all_codes``: every output has a grid; ``uniform``: B's channels share one
    scale, and so do C's.
    """

    taps: Tensor
    factor: Tensor
    bias: Tensor
    inverse: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    rounding: int
    rounding_bc: int = -1
    all_codes: bool = False
    uniform: bool = False


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
def _history(ring, taps, tables, channel, mask, now, row, rows, C, WIDTH: tl.constexpr, ROUNDING: tl.constexpr):
    """What a convolution needs besides its newest input: nothing here waits for this token's in_proj."""
    factor, bias, inverse, scale, low, high = tables
    total = tl.zeros(channel.shape, tl.float32)
    for k in tl.static_range(WIDTH - 1):
        slot = (now + 1 + k) % WIDTH
        x = tl.load(ring + (slot * rows + row) * C + channel, mask=mask, other=0).to(tl.float32)
        total += x * tl.load(taps + k * C + channel, mask=mask, other=0.0)
    newest = tl.load(taps + (WIDTH - 1) * C + channel, mask=mask, other=0.0)
    affine = (tl.load(factor + channel, mask=mask, other=0.0), tl.load(bias + channel, mask=mask, other=0.0))
    if ROUNDING >= 0:
        grid = (
            tl.load(inverse + channel, mask=mask, other=0.0), tl.load(scale + channel, mask=mask, other=0.0),
            tl.load(low + channel, mask=mask, other=0.0), tl.load(high + channel, mask=mask, other=0.0),
        )  # fmt: skip
    else:
        grid = affine + affine
    return (total, newest) + affine + grid  # noqa: RUF005


@triton.jit
def _convolve(ring, history, channel, mask, now, row, rows, C, WIDTH: tl.constexpr, ROUNDING: tl.constexpr,
              CODES: tl.constexpr):  # fmt: skip
    """SiLU(sum_k x[t - K + 1 + k] tap[k] * factor + bias) for some channels, landed; CODES: not dequantized."""
    total, newest, factor, bias, inverse, scale, low, high = history
    x = tl.load(ring + ((now % WIDTH) * rows + row) * C + channel, mask=mask, other=0).to(tl.float32)
    u = silu((total + x * newest) * factor + bias)
    if ROUNDING >= 0:
        landed = to_codes(u, inverse, low, high, ROUNDING)
        u = tl.where(inverse == 0, u, landed if CODES else landed * scale)
    return u


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
            magnitude = tl.max(tl.where(mask, tl.abs(s), 0.0), axis=1)[:, None]
            scale = tl.maximum(tl.div_rn(magnitude, span), _SMALLEST_SCALE)
            tl.store(state_scale + scale_place, scale, mask=live)
            inverse = tl.div_rn(1.0, scale)
        else:
            inverse = tl.load(state_inverse + scale_place, mask=live, other=0.0)
        tl.store(state + place, to_codes(s, inverse, low, high, ROUNDING).to(tl.int8), mask=mask)
    else:
        tl.store(state + place, s.to(state.dtype.element_ty), mask=mask)


@triton.jit
def _ssd_kernel(ring, codes, values, taps, factor, bias, inverse, scale, low, high, dt_scale, z_scale, dt_bias, A, skip,
                state, state_scale, state_inverse, state_low, state_high, state_span, position, out, rows, N_OUT,
                dt_low, dt_high,
                Z_START: tl.constexpr, DT_START: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                GROUPS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, U_ROUNDING: tl.constexpr,
                BC_ROUNDING: tl.constexpr, DT_CODES: tl.constexpr, Z_CODES: tl.constexpr, QUANTIZED: tl.constexpr,
                ALONG: tl.constexpr, DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence: convolve x, B and C, update the state, skip, gate."""
    at = tl.program_id(0)
    row = tl.program_id(1)
    head = at * BP // P
    channel = at * BP + tl.arange(0, BP)  # of E
    n = tl.arange(0, BN)
    C: tl.constexpr = H * P + 2 * GROUPS * N
    inside = n < N
    place = (row.to(tl.int64) * (H * P) + channel)[:, None] * N + n[None, :]
    mask = (channel >= 0)[:, None] & inside[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * (H * P)
    grid_scale = tl.load(state_scale + scale_place) if QUANTIZED else 1.0
    s = _load_state(state, place, mask, grid_scale, QUANTIZED)  # the last step wrote it: long finished
    tables = (factor, bias, inverse, scale, low, high)
    now = tl.load(position)
    every = channel >= 0
    b_channel = H * P + (head * GROUPS // H) * N + n
    u_past = _history(ring, taps, tables, channel, every, now, row, rows, C, WIDTH, U_ROUNDING)
    b_past = _history(ring, taps, tables, b_channel, inside, now, row, rows, C, WIDTH, BC_ROUNDING)
    c_past = _history(ring, taps, tables, b_channel + GROUPS * N, inside, now, row, rows, C, WIDTH, BC_ROUNDING)
    decay_rate, shift, through = tl.load(A + head), tl.load(dt_bias + head), tl.load(skip + head)
    dt_unit = tl.load(dt_scale + head)
    z_unit = tl.load(z_scale + channel)
    wait_for_previous(PDL)
    let_next_start(PDL)  # not earlier: programs of the product after next would take this kernel's places (measured)
    if DT_CODES:
        dt = tl.load(codes + row * N_OUT + DT_START + head).to(tl.float32) * dt_unit
    else:
        dt = tl.load(values + row * N_OUT + DT_START + head)
    z = _read(codes, values, z_unit, row * N_OUT + Z_START + channel, every, Z_CODES)
    u = _convolve(ring, u_past, channel, every, now, row, rows, C, WIDTH, U_ROUNDING, False)
    B = _convolve(ring, b_past, b_channel, inside, now, row, rows, C, WIDTH, BC_ROUNDING, False)
    C_ = _convolve(ring, c_past, b_channel + GROUPS * N, inside, now, row, rows, C, WIDTH, BC_ROUNDING, False)
    dt = softplus(dt + shift)
    dt = tl.minimum(tl.maximum(dt, dt_low), dt_high)
    s = tl.exp(dt * decay_rate) * s + (dt * u)[:, None] * B[None, :]
    _store_state(state, place, mask, s, state_scale, state_inverse, scale_place, (channel >= 0)[:, None], state_low,
                 state_high, state_span, QUANTIZED, DYNAMIC, STATE_ROUNDING)  # fmt: skip
    y = tl.sum(s * C_[None, :], axis=1) + through * u
    tl.store(out + row * (H * P) + channel, y * silu(z), mask=channel >= 0)


def ssd_step(ring: Tensor, codes: Tensor, values: Tensor, conv: ConvolutionPlan, dt: InputPlan, z: InputPlan,
             dt_bias: Tensor, A: Tensor, skip: Tensor, state: Tensor, grid: StatePlan | None, position: Tensor,
             out: Tensor, starts: tuple[int, int], groups: int, limit: tuple[float, float], channels: int,
             pdl: bool) -> None:  # fmt: skip
    """Mamba-2: out (B, E) = (scan + skip) * SiLU(z); ``state`` (B, H, P, N) is updated; ``starts`` of z and dt rows."""
    rows, heads, head_dim, states = state.shape
    filler = conv.factor
    _ssd_kernel[(heads * head_dim // channels, rows)](
        ring, codes, values, conv.taps, conv.factor, conv.bias, conv.inverse, conv.scale, conv.low, conv.high,
        dt.scale, z.scale, dt_bias, A, skip, state, grid.scale if grid else filler, grid.inverse if grid else filler,
        grid.low if grid else 0.0, grid.high if grid else 0.0, grid.span if grid else 0.0, position, out, rows,
        codes.shape[1], *limit,
        Z_START=starts[0], DT_START=starts[1], H=heads, P=head_dim, N=states, GROUPS=groups, BP=channels,
        BN=triton.next_power_of_2(states), WIDTH=conv.taps.shape[0], U_ROUNDING=conv.rounding,
        BC_ROUNDING=conv.rounding_bc, DT_CODES=dt.codes, Z_CODES=z.codes, QUANTIZED=grid is not None,
        ALONG=grid.along_states if grid else False, DYNAMIC=grid is not None and grid.span > 0,
        STATE_ROUNDING=grid.rounding if grid else 0, PDL=pdl,
        num_warps=SSD_WARPS, **_launch(pdl),
    )  # fmt: skip


@triton.jit
def _conv_kernel(ring, taps, factor, bias, inverse, scale, low, high, position, out_codes, out_values, rows,
                 C: tl.constexpr, BC: tl.constexpr, WIDTH: tl.constexpr, ROUNDING: tl.constexpr,
                 TO_CODES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.program_id(1)
    mask = channel < C
    now = tl.load(position)
    tables = (factor, bias, inverse, scale, low, high)
    past = _history(ring, taps, tables, channel, mask, now, row, rows, C, WIDTH, ROUNDING)
    let_next_start(PDL)
    wait_for_previous(PDL)
    u = _convolve(ring, past, channel, mask, now, row, rows, C, WIDTH, ROUNDING, TO_CODES)
    if TO_CODES:
        tl.store(out_codes + row * C + channel, u.to(tl.int8), mask=mask)
    else:
        tl.store(out_values + row * C + channel, u, mask=mask)


def conv_step(ring: Tensor, conv: ConvolutionPlan, position: Tensor, out: Tensor, to_codes_: bool, pdl: bool) -> None:
    """Mamba-1: u (B, E), int8 codes of its site or float32."""
    rows, channels = out.shape
    block = 256
    _conv_kernel[(triton.cdiv(channels, block), rows)](
        ring, conv.taps, conv.factor, conv.bias, conv.inverse, conv.scale, conv.low, conv.high, position, out, out,
        rows, C=channels, BC=block, WIDTH=conv.taps.shape[0], ROUNDING=conv.rounding, TO_CODES=to_codes_, PDL=pdl,
        num_warps=4, **_launch(pdl),
    )  # fmt: skip


@triton.jit
def _selective_kernel(u_codes, u_values, u_scale, u_coarse, z_codes, z_values, z_scale, dt_codes, dt_values, dt_scale,
                      low_codes, low_values, b_scale, dt_bias, A, skip, state, state_scale, state_inverse, state_low,
                      state_high, state_span, out, N_IN, N_LOW,
                      Z_START: tl.constexpr, B_START: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
                      BE: tl.constexpr, BN: tl.constexpr, U_CODES: tl.constexpr, U_FLAGGED: tl.constexpr,
                      Z_CODES: tl.constexpr, DT_CODES: tl.constexpr, B_CODES: tl.constexpr,
                      QUANTIZED: tl.constexpr, ALONG: tl.constexpr,
                      DYNAMIC: tl.constexpr, STATE_ROUNDING: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """BE channels of one sequence: update the state (Gu and Dao 2023, algorithm 2), skip, gate."""
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    row = tl.program_id(1)
    n = tl.arange(0, BN)
    live = channel < E
    mask = live[:, None] & (n < N)[None, :]
    place = (row.to(tl.int64) * E + channel)[:, None] * N + n[None, :]
    scale_place = channel[:, None] * N + n[None, :] if ALONG else channel[:, None]
    if DYNAMIC:
        scale_place += row * E
    decay_rate = tl.load(A + channel[:, None] * N + n[None, :], mask=mask, other=0.0)
    grid_scale = tl.load(state_scale + scale_place, mask=live[:, None], other=0.0) if QUANTIZED else 1.0
    s = _load_state(state, place, mask, grid_scale, QUANTIZED)
    shift = tl.load(dt_bias + channel, mask=live, other=0.0)
    through = tl.load(skip + channel, mask=live, other=0.0)
    u_unit, z_unit = tl.load(u_scale + channel, mask=live, other=0.0), tl.load(z_scale + channel, mask=live, other=0.0)
    dt_unit = tl.load(dt_scale + channel, mask=live, other=0.0)
    b_unit, c_unit = tl.load(b_scale + n, mask=n < N, other=0.0), tl.load(b_scale + N + n, mask=n < N, other=0.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    if U_FLAGGED:
        u = read_flagged(u_codes, row, E, channel, live, u_unit, tl.load(u_coarse + channel, mask=live, other=0.0))
    else:
        u = _read(u_codes, u_values, u_unit, row * E + channel, live, U_CODES)
    z = _read(z_codes, z_values, z_unit, row * N_IN + Z_START + channel, live, Z_CODES)
    dt = softplus(_read(dt_codes, dt_values, dt_unit, row * E + channel, live, DT_CODES) + shift)
    B = _read(low_codes, low_values, b_unit, row * N_LOW + B_START + n, n < N, B_CODES)
    C = _read(low_codes, low_values, c_unit, row * N_LOW + B_START + N + n, n < N, B_CODES)
    s = tl.exp(dt[:, None] * decay_rate) * s + (dt * u)[:, None] * B[None, :]
    _store_state(state, place, mask, s, state_scale, state_inverse, scale_place, live[:, None], state_low, state_high,
                 state_span, QUANTIZED, DYNAMIC, STATE_ROUNDING)  # fmt: skip
    y = tl.sum(s * C[None, :], axis=1) + through * u
    tl.store(out + row * E + channel, y * silu(z), mask=live)


def selective_step(u: Tensor, z: tuple[Tensor, Tensor], dt: tuple[Tensor, Tensor], low: tuple[Tensor, Tensor],
                   inputs: dict[str, InputPlan], dt_bias: Tensor, A: Tensor, skip: Tensor, state: Tensor,
                   grid: StatePlan | None, out: Tensor, starts: tuple[int, int], pdl: bool) -> None:  # fmt: skip
    """Mamba-1: out (B, E) = (scan + skip) * SiLU(z). ``z``, ``dt``, ``low``: buffers of codes and values;
    ``inputs``: u, z, dt and BC (scales of B, then of C); ``starts``: of z, and of B in ``low``."""
    rows, channels, states = state.shape
    filler, coarse = dt_bias, inputs["u"].coarse
    block = 32
    _selective_kernel[(triton.cdiv(channels, block), rows)](
        u, u, inputs["u"].scale, filler if coarse is None else coarse, *z, inputs["z"].scale, *dt, inputs["dt"].scale,
        *low, inputs["BC"].scale, dt_bias, A, skip, state, grid.scale if grid else filler,
        grid.inverse if grid else filler, grid.low if grid else 0.0,
        grid.high if grid else 0.0, grid.span if grid else 0.0, out, z[0].shape[1], low[0].shape[1],
        Z_START=starts[0], B_START=starts[1],
        E=channels, N=states, BE=block, BN=triton.next_power_of_2(states), U_CODES=inputs["u"].codes,
        U_FLAGGED=coarse is not None,
        Z_CODES=inputs["z"].codes, DT_CODES=inputs["dt"].codes, B_CODES=inputs["BC"].codes,
        QUANTIZED=grid is not None, ALONG=grid.along_states if grid else False,
        DYNAMIC=grid is not None and grid.span > 0,
        STATE_ROUNDING=grid.rounding if grid else 0, PDL=pdl, num_warps=2, **_launch(pdl),
    )  # fmt: skip
