# mypy: allow-untyped-defs
"""One token of many sequences through Mamba-2's scan: what bounds it is the state, read and written once."""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.conv import ConvolutionPlan
from squamata.kernels.gpu.gemv import INTERPRETED
from squamata.kernels.gpu.math import byte_to_float, dot4, pack_bytes, rounded_bits, softplus
from squamata.kernels.gpu.norm import _SMALLEST_SCALE
from squamata.kernels.gpu.scan import InputPlan, StatePlan, _store_state

CHANNELS, WARPS = 32, 2  # of a head, a program
PACKED_CHANNELS, PACKED_WARPS, PACKED_BLOCKS = 64, 2, 20  # where four codes are one word; blocks a program
_LEAST_RATIO = tl.constexpr(2.0**-40)
_BYTE_AT_TOP = tl.constexpr(2.0**-24)  # undoes ``byte_to_float``


@triton.jit
def _time_step(dt, tables, head, row, limit, N_IN, START: tl.constexpr, CODES: tl.constexpr):
    """dt and decay of one head; ``dt``: codes and values of in_proj's rows; ``tables``: scale, bias, A of heads."""
    codes, values = dt
    unit, bias, A = tables
    if CODES:
        step = tl.load(codes + row * N_IN + START + head).to(tl.float32) * tl.load(unit + head)
    else:
        step = tl.load(values + row * N_IN + START + head).to(tl.float32)
    step = tl.minimum(tl.maximum(softplus(step + tl.load(bias + head)), limit[0]), limit[1])
    return step, tl.exp(step * tl.load(A + head))


@triton.jit
def _token_kernel(u, u_scale, dt, tables, skip, state, grid, out, limit, N_IN, DT_START: tl.constexpr,
                  H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, BP: tl.constexpr,
                  CODES: tl.constexpr, DT_CODES: tl.constexpr, QUANTIZED: tl.constexpr, ALONG: tl.constexpr,
                  DYNAMIC: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence, a state of any kind."""
    state_scale, state_inverse, state_low, state_high, state_span = grid
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
    step, decay = _time_step(dt, tables, head, row, limit, N_IN, DT_START, DT_CODES)
    if QUANTIZED:
        decay = decay * tl.load(state_scale + scale_place)
    s = s * decay + (step * x)[:, None] * B[None, :]
    y = tl.sum(s * C_[None, :], axis=1) + tl.load(skip + head) * x
    tl.store(out + row * (H * P) + channel, y.to(out.dtype.element_ty))
    _store_state(state, place, place >= 0, s, state_scale, state_inverse, scale_place, (channel >= 0)[:, None],
                 state_low, state_high, state_span, QUANTIZED, DYNAMIC, ROUNDING)  # fmt: skip


@triton.jit
def _packed_kernel(u, u_scale, dt, tables, skip, words, scales, span_inverse, out, limit, N_IN, DT_START: tl.constexpr,
                   H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, BP: tl.constexpr,
                   BLOCKS: tl.constexpr, DT_CODES: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """BLOCKS times BP channels of one group of one sequence: int8 states with a scale a channel, four to a word.

    y = C (a s + b B) = a (C s) + b (C B), so that old codes meet the codes of C four at a time. The new state over b is
    (a / b) s + B: one operation an element, with a ratio that a b near zero cannot make infinite. A block's state is
    on its way while the one before is worked on.
    """
    C: tl.constexpr = H * P + 2 * GROUPS * N
    W: tl.constexpr = N // 4
    at, row = tl.program_id(0) * BLOCKS, tl.program_id(1).to(tl.int64)
    group = H * P + ((at * BP // P) * GROUPS // H) * N
    token = u + row * C
    at_b = token + group + 4 * tl.arange(0, W)
    channel = at * BP + tl.arange(0, BP)
    first = words + row * (H * P * W) + channel[:, None] * W + tl.arange(0, W)[None, :]
    following = tl.load(first)
    B, packed, both = (), (), tl.zeros((W,), tl.float32)
    for j in tl.static_range(4):
        b_code, c_code = tl.load(at_b + j).to(tl.float32), tl.load(at_b + GROUPS * N + j).to(tl.float32)
        B = B + (b_code[None, :],)  # type: ignore[assignment]  # noqa: RUF005
        packed = packed + (rounded_bits(c_code),)  # type: ignore[assignment]  # noqa: RUF005
        both += b_code * c_code
    c_words, met = pack_bytes(packed, NATIVE)[None, :], tl.sum(both, axis=0)
    b_unit, c_unit = tl.load(u_scale + group), tl.load(u_scale + group + GROUPS * N)
    for block in range(BLOCKS):
        s = following
        following = tl.load(first + tl.minimum(block + 1, BLOCKS - 1) * (BP * W))
        head = (at + block) * BP // P
        place = row * (H * P) + channel + block * BP
        x = tl.load(token + channel + block * BP).to(tl.float32) * tl.load(u_scale + channel + block * BP)
        step, decay = _time_step(dt, tables, head, row, limit, N_IN, DT_START, DT_CODES)
        a, b = tl.load(scales + place) * decay, x * (step * b_unit)
        seen = tl.sum(dot4(s, c_words, tl.zeros((BP, W), tl.int32), NATIVE), axis=1).to(tl.float32)
        y = c_unit * (a * seen + b * met) + tl.load(skip + head) * x
        tl.store(out + place, y.to(out.dtype.element_ty))
        size = tl.maximum(tl.maximum(tl.abs(b), a * _LEAST_RATIO), 1e-30)
        unit = tl.where(b < 0, -size, size)
        ratio = (a * _BYTE_AT_TOP / unit)[:, None]
        new = ()
        for j in tl.static_range(4):
            new = new + (byte_to_float(s, j, NATIVE) * ratio + B[j],)  # type: ignore[assignment]  # noqa: RUF005
        one, two, three, four = new  # type: ignore[misc]
        largest = tl.maximum(tl.maximum(tl.abs(one), tl.abs(two)), tl.maximum(tl.abs(three), tl.abs(four)))
        scale = tl.maximum(tl.max(largest, axis=1) * (size * span_inverse), _SMALLEST_SCALE)
        tl.store(scales + place, scale)
        inverse = (unit / scale)[:, None]
        codes = ()
        for j in tl.static_range(4):
            codes = codes + (rounded_bits(new[j] * inverse),)  # type: ignore[assignment]  # noqa: RUF005
        tl.store(first + block * (BP * W), pack_bytes(codes, NATIVE))


def token_rows(u: Tensor, codes: bool, conv: ConvolutionPlan, dt: tuple[Tensor, Tensor], dt_input: InputPlan,
               dt_start: int, parameters: tuple[Tensor, Tensor, Tensor], state: Tensor, grid: StatePlan | None,
               groups: int, limit: tuple[float, float], out: Tensor) -> None:  # fmt: skip
    """Mamba-2's scan with skip for one token a sequence, as ``gpu.sequence.ssd_rows``: out (B, E)."""
    rows, heads, head_dim, states = state.shape
    dt_bias, A, skip = parameters
    shared = {
        "DT_START": dt_start,
        "H": heads,
        "P": head_dim,
        "N": states,
        "GROUPS": groups,
        "DT_CODES": dt_input.codes,
    }
    tables, columns = (dt_input.scale, dt_bias, A), dt[0].shape[1]
    dynamic = grid is not None and grid.span > 0
    if grid is not None and dynamic and codes and grid.rounding == 0 and states % 4 == 0:
        channels = min(PACKED_CHANNELS, head_dim)
        blocks = gcd(heads * head_dim // (groups * channels), PACKED_BLOCKS)
        _packed_kernel[(heads * head_dim // (channels * blocks), rows)](
            u, conv.scale, dt, tables, skip, state.view(torch.int32), grid.scale, 1 / grid.span, out, limit, columns,
            BP=channels, BLOCKS=blocks, NATIVE=not INTERPRETED, num_warps=PACKED_WARPS, **shared,
        )  # fmt: skip
        return
    channels = min(CHANNELS, head_dim)
    grids = (grid.scale, grid.inverse, grid.low, grid.high, grid.span) if grid else (skip, skip, 0.0, 0.0, 0.0)
    _token_kernel[(heads * head_dim // channels, rows)](
        u, conv.scale, dt, tables, skip, state, grids, out, limit, columns, BP=channels, CODES=codes,
        QUANTIZED=grid is not None, ALONG=grid.along_states if grid else False, DYNAMIC=dynamic,
        ROUNDING=grid.rounding if grid else 0, num_warps=WARPS, **shared,
    )  # fmt: skip
