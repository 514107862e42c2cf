# mypy: allow-untyped-defs
"""float32 kernels for many tokens, whose every result can be observed: convolution with SiLU, and Mamba-2's scan.

What calibration runs on a GPU. The kernels that generate text land inside (``gpu.sequence``); these leave float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from squamata.kernels.gpu.math import silu, softplus

CHUNK = 32  # tokens of the scan that run together
CONV_TOKENS, CONV_CHANNELS, CONV_WARPS = 16, 128, 4
SCAN_CHANNELS, SCAN_WARPS, SCAN_STAGES = 64, 4, 2  # channels of a head that a program takes
PRECISION = "tf32x3"  # three products of tensor cores each, float32's error


@triton.jit
def _conv_kernel(x, state, weight, bias, out, L, C, batch_stride, token_stride, first, channels, K: tl.constexpr,
                 BIAS: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """``first``: of ``channels`` of the state and the weight, where those of x (B, L, C) begin."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BL + tl.arange(0, BL)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    live = channel < C
    mask = (token < L)[:, None] & live[None, :]
    total = tl.zeros([BL, BC], tl.float32)
    for tap in tl.static_range(K):
        at = token - (K - 1) + tap
        value = tl.load(x + batch * batch_stride + at[:, None].to(tl.int64) * token_stride + channel[None, :],
                        mask=mask & (at >= 0)[:, None], other=0.0)  # fmt: skip
        before = state + ((batch * channels + first + channel[None, :]) * (K - 1) + (at[:, None] + K - 1))
        value += tl.load(before, mask=mask & (at < 0)[:, None], other=0.0)
        total += value * tl.load(weight + (first + channel) * K + tap, mask=live, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + first + channel, mask=live, other=0.0)[None, :]
    tl.store(out + (batch * L + token[:, None]) * C + channel[None, :], silu(total), mask=mask)


def convolve(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
    """SiLU of the causal convolution of x (B, L, C), channels ``first`` on of ``weight`` (E, K), ``bias`` and the
    inputs before, ``state`` (B, E, K - 1), which stays as it is."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, channels = x.shape
    out = torch.empty(batch, length, channels, device=x.device)
    grid = (triton.cdiv(length, CONV_TOKENS), triton.cdiv(channels, CONV_CHANNELS), batch)
    _conv_kernel[grid](
        x, state, weight, weight if bias is None else bias, out, length, channels, x.stride(0), x.stride(1), first,
        weight.shape[0], K=weight.shape[1], BIAS=bias is not None, BL=CONV_TOKENS, BC=CONV_CHANNELS,
        num_warps=CONV_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _scan_kernel(u, dt, A, B, C, scores, D, dt_bias, before, after, y, L, least, most, u_batch, u_token, dt_batch,
                 dt_token, b_batch, b_token, c_batch, c_token, H, PER_GROUP, P: tl.constexpr, N: tl.constexpr,
                 BP: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BP channels of one head of one sequence, chunk by chunk; their state is (N, BP) meanwhile. ``scores``: C B^T of
    every chunk, (B, chunks, G, BL, BL), which the heads of a group share.
    """
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    group = head // PER_GROUP
    l, p, n = tl.arange(0, BL), tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)
    own = (batch * H + head) * (P * N) + p[None, :] * N + n[:, None]
    own_mask = (p < P)[None, :] & (n < N)[:, None]
    state = tl.load(before + own, mask=own_mask, other=0.0)
    rate, skip, shift = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    for start in range(0, L, BL):
        t = (start + l).to(tl.int64)
        live = t < L
        step = softplus(tl.load(dt + batch * dt_batch + t * dt_token + head, mask=live, other=0.0) + shift)
        step = tl.where(live, tl.minimum(tl.maximum(step, least), most), 0.0)
        decay = tl.cumsum((step * rate).to(tl.float64), axis=0)
        last = tl.sum(tl.where(l == BL - 1, decay, 0.0), axis=0)
        b_at = batch * b_batch + t[:, None] * b_token + group * N + n[None, :]
        c_at = batch * c_batch + t[:, None] * c_token + group * N + n[None, :]
        mask = live[:, None] & (n < N)[None, :]
        keys, reads = tl.load(B + b_at, mask=mask, other=0.0), tl.load(C + c_at, mask=mask, other=0.0)
        u_mask = live[:, None] & (p < P)[None, :]
        value = tl.load(u + batch * u_batch + t[:, None] * u_token + head * P + p[None, :], mask=u_mask, other=0.0)
        chunk = (batch * tl.cdiv(L, BL) + start // BL) * (H // PER_GROUP) + group
        pair = tl.load(scores + (chunk * BL + l[:, None]) * BL + l[None, :])
        between = tl.exp(tl.minimum(decay[:, None] - decay[None, :], 0.0).to(tl.float32))
        pair = tl.where(l[:, None] >= l[None, :], pair * between, 0.0)
        weighted = value * step[:, None]
        out = tl.dot(reads, state, input_precision=PRECISION) * tl.exp(decay.to(tl.float32))[:, None]
        out += tl.dot(pair, weighted, input_precision=PRECISION) + skip * value
        tl.store(y + (batch * L + t[:, None]) * (H * P) + head * P + p[None, :], out, mask=u_mask)
        weighted = weighted * tl.exp((last - decay).to(tl.float32))[:, None]
        state = state * tl.exp(last.to(tl.float32)) + tl.dot(tl.trans(keys), weighted, input_precision=PRECISION)
    tl.store(after + own, state, mask=own_mask)


def scan_heads(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor,
    limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ssd_scan`` in float32; the heads and groups are those of ``state`` (B, H, P, N) and B (B, L, G N)."""
    u, dt, B, C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, dt, B, C))
    batch, heads, channels, width = state.shape
    per_group = heads * width // B.shape[-1]
    y, after = torch.empty(u.shape, device=u.device), torch.empty_like(state)
    least, most = (min(max(bound, -3e38), 3e38) for bound in limit)
    strides = (stride for x in (u, dt, B, C) for stride in x.stride()[:2])
    at_once = max(16, min(SCAN_CHANNELS, triton.next_power_of_2(channels)))
    _scan_kernel[(triton.cdiv(channels, at_once), heads, batch)](
        u, dt, A, B, C, _scores(B, C, width), D, dt_bias, state.contiguous(), after, y, u.shape[1], least, most,
        *strides, heads, per_group, P=channels, N=width, BP=at_once, BN=max(16, triton.next_power_of_2(width)),
        BL=CHUNK, PRECISION=PRECISION, num_warps=SCAN_WARPS, num_stages=SCAN_STAGES,
    )  # fmt: skip
    return y, after


def _scores(B: Tensor, C: Tensor, width: int) -> Tensor:
    """C B^T of every chunk (B, chunks, G, l, l), zero beyond the last token."""
    missing = -B.shape[1] % CHUNK
    keys, reads = (pad(x, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK)).unflatten(-1, (-1, width)) for x in (B, C))
    return reads.transpose(2, 3) @ keys.permute(0, 1, 3, 4, 2)
