# mypy: allow-untyped-defs
"""The ends of a decode step: rows of the embedding for ids, and the likeliest next ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from squamata.kernels.gpu.math import let_next_start, wait_for_previous
from squamata.kernels.gpu.norm import _launch

GREEDY_PART = 1024  # logits a program


@triton.jit
def _embed_kernel(ids, table, scale, out, D, CODES: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr):
    """CODES: 0 float table, 8 int8, 4 int4 (canonical nibbles); ``scale``: float32, one a row of the table."""
    row = tl.program_id(0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.load(ids + row).to(tl.int64)
    column = tl.arange(0, BD)
    mask = column < D
    if CODES == 4:
        packed = tl.load(table + token * (D // 2) + column // 2, mask=mask, other=0).to(tl.int32)
        value = (((packed >> (4 * (column % 2))) & 15) ^ 8) - 8
    else:
        value = tl.load(table + token * D + column, mask=mask, other=0)
    value = value.to(tl.float32)
    if CODES > 0:
        value = value * tl.load(scale + token)
    tl.store(out + row * D + column, value, mask=mask)


def embed(ids: Tensor, table: Tensor, scale: Tensor | None, out: Tensor, pdl: bool) -> None:
    """Rows of the embedding, dequantized: ids int64 (rows,) -> float32 (rows, D)."""
    rows, width = out.shape
    kinds = {torch.int8: 8, torch.uint8: 4}
    _embed_kernel[(rows,)](
        ids, table, scale if scale is not None else out, out, width, CODES=kinds.get(table.dtype, 0),
        BD=triton.next_power_of_2(width), PDL=pdl, num_warps=4, **_launch(pdl),
    )  # fmt: skip


@triton.jit
def _best_kernel(logits, best, where, V, PARTS: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr):
    part = tl.program_id(0)
    row = tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    column = part * BV + tl.arange(0, BV)
    value = tl.load(logits + row * V + column, mask=column < V, other=-float("inf"))
    tl.store(best + row * PARTS + part, tl.max(value, axis=0))
    # of logits that are not numbers any index may come out: one beyond the table would be read as memory
    tl.store(where + row * PARTS + part, tl.minimum(part * BV + tl.argmax(value, axis=0), V - 1))


@triton.jit
def _pick_kernel(best, where, ids, position, steps, advance, PARTS: tl.constexpr, BP: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    part = tl.arange(0, BP)
    value = tl.load(best + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    winner = tl.minimum(tl.argmax(value, axis=0), PARTS - 1)
    tl.store(ids + row, tl.load(where + row * PARTS + winner).to(tl.int64))
    if row == 0:
        tl.store(position, tl.load(position) + advance)
        if steps is not None:
            tl.store(steps, tl.load(steps) + 1)


def greedy(logits: Tensor, scratch: tuple[Tensor, Tensor], ids: Tensor, position: Tensor, pdl: bool,
           advance: int = 1, steps: Tensor | None = None) -> None:  # fmt: skip
    """ids[row] = first index of the largest logit; position += advance. ``scratch``: float32, int32 (rows, parts).

    ``steps``: int64 (1,), += 1.
    """
    rows, vocabulary = logits.shape
    parts = scratch[0].shape[1]
    _best_kernel[(parts, rows)](
        logits, *scratch, vocabulary, PARTS=parts, BV=GREEDY_PART, PDL=pdl, num_warps=4, **_launch(pdl)
    )
    _pick_kernel[(rows,)](
        *scratch, ids, position, steps, advance, PARTS=parts, BP=triton.next_power_of_2(parts), PDL=pdl, num_warps=1,
        **_launch(pdl),
    )  # fmt: skip


def greedy_scratch(rows: int, vocabulary: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Memory for ``greedy``."""
    shape = (rows, triton.cdiv(vocabulary, GREEDY_PART))
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)
