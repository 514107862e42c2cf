"""GPTQ: round a column, and let the columns not yet rounded make up for its error (arXiv 2210.17323, algorithm 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.grid import Grid
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import encode
from squamata.quantize.rtn import columns_apart, find_scales, joined, of_columns, pack, round_to_nearest
from squamata.scales.gram import Gram
from squamata.spec.quant import QuantSpec

Damping = Annotated[float, Field(gt=0, lt=1)]
Block = Annotated[int, Field(ge=1)]
ATTEMPTS = 8  # at a factorisation, each with twice the damping
MOST_AT_ONCE = 128  # columns that one kernel takes


def gptq(
    weight: Tensor,
    spec: QuantSpec,
    layout: Layout,
    statistics: Gram | None,
    damping: Damping = 0.01,
    block: Block = 128,
    act_order: bool = False,
) -> QTensor:
    """Codes that minimise ||W X - W' X||^2 greedily, a column at a time, with X X^T from ``statistics``.

    ``damping``: fraction of the mean of its diagonal that is added to it. ``block``: columns between two updates of
    all that follow. Scales of groups are found when their first column is due, from the weights as they are then;
    with ``act_order`` (columns by falling diagonal) and at other granularities all are found beforehand. Deterministic.
    Columns that are kept come last, make up for the errors of all others, and are rounded to nearest (as in Atom).
    Memory: the weight and its codes in float32, and three float64 matrices (K, K).
    """
    if statistics is None or statistics.count == 0:
        raise SquamataError("gptq must see what the weight multiplies: give a text with --calibration FILE")
    columns = weight.float().T.contiguous()  # (K, N): the loop below reads and writes whole columns
    gram = statistics.gram
    rest, kept = columns_apart(weight, spec)
    order = torch.arange(len(columns))
    if act_order:
        order[: rest.shape[1]] = torch.argsort(gram.diagonal()[: rest.shape[1]], descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damping).float()
    group = 0 if act_order else spec.granularity.group or 0
    grid = _Scales(rest, spec.of_rest, of_columns(layout, rest), in_turn=group > 0)
    codes = torch.empty(rest.T.shape, dtype=torch.int8)
    columns = columns[order]
    fused = _fused(weight, spec)
    step = min(group or block, MOST_AT_ONCE) if fused else -(-block // group) * group if group else block
    for start in range(0, len(codes), step):
        span = slice(start, min(start + step, len(codes)))
        rounded = _at_once if fused else _one_by_one
        codes[order[span]], errors = rounded(columns[start:], factor[span, span], grid, order[span], start)
        columns[span.stop :].addmm_(factor[span, span.stop :].T, errors, alpha=-1)
    found = QTensor(codes.T.contiguous(), *grid.parts())
    if not spec.kept_channels:
        return pack(found)
    made_up = columns[len(codes) :].T.contiguous()
    return joined([found, round_to_nearest(made_up, spec.of_kept, of_columns(layout, kept))], spec)


def _fused(weight: Tensor, spec: QuantSpec) -> bool:
    """True where one kernel takes a whole block of columns, which rounds only to integers."""
    return weight.is_cuda and spec.linear_grid


def _one_by_one(columns: Tensor, factor: Tensor, grid: _Scales, places: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Codes and errors (C, N) of a block; ``columns``: it and all that follow, from ``start`` on, (C ..., N);
    ``places``: where its columns are in the weight.
    """
    block = columns[: len(places)]
    codes, errors = torch.empty(block.shape, dtype=torch.int8), torch.empty(block.shape)
    for number, place in enumerate(places.tolist()):
        grid.fit(columns[number:], start + number)
        rounded = grid.round(block[number], place)
        codes[number] = rounded.data
        errors[number] = (block[number] - rounded.dequantize()) / factor[number, number]
        block[number + 1 :].addr_(factor[number, number + 1 :], errors[number], alpha=-1)
    return codes, errors


def _at_once(columns: Tensor, factor: Tensor, grid: _Scales, places: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The same on a GPU, of a block that lies within one group if groups are found in turn."""
    from squamata.kernels.gpu.columns import round_columns  # needs triton

    grid.fit(columns, start)
    scale, zero = grid.of_columns(places, columns.shape[1])
    return round_columns(columns[: len(places)], factor, scale, zero, grid.spec)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U, float64, with U^T U = (gram + damping mean(diag) I)^-1.

    An input that was always zero counts as independent of the others. SquamataError if the matrix cannot be made
    positive definite.
    """
    diagonal = gram.diagonal()
    matrix = gram + torch.diag((diagonal == 0).double())
    for attempt in range(ATTEMPTS):
        damped = matrix + torch.eye(len(gram), dtype=torch.float64) * (damping * 2**attempt * float(diagonal.mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    raise SquamataError("gptq: the inputs' second moments are not positive definite; raise 'damping'")


class _Scales:
    """The scales of one weight, known beforehand or found group by group (``in_turn``)."""

    def __init__(self, weight: Tensor, spec: QuantSpec, layout: Layout, in_turn: bool) -> None:
        self.spec, self.layout, self.in_turn = spec, layout, in_turn
        self.group = spec.granularity.group
        partition = Partition(spec.granularity, layout)
        if in_turn:
            self.scale = torch.empty(partition.shape())
            self.second = None if spec.symmetric else torch.empty(partition.shape())
        else:
            scale, second = find_scales(weight, spec, layout)
            self.scale, self.second = partition.expand(scale), None if second is None else partition.expand(second)

    def fit(self, columns: Tensor, place: int) -> None:
        """If a group begins at ``place``, and its turn has come: its scales, from the columns from there on, (C, N)."""
        if not self.in_turn or self.group is None or place % self.group:
            return
        part, group = columns[: min(self.group, self.layout.sizes[-1] - place)].T, place // self.group
        layout = replace(self.layout, sizes=tuple(part.shape), segments=())
        scale, second = find_scales(part, self.spec, layout)
        self.scale[:, group] = scale[:, 0]
        if self.second is not None and second is not None:
            self.second[:, group] = second[:, 0]

    def round(self, column: Tensor, place: int) -> QTensor:
        """One column (N,) on its grid."""
        scale = self._of_column(self.scale, place)
        second = None if self.second is None else self._of_column(self.second, place)
        return encode(column, Grid.of(scale, second), self.spec)

    def of_columns(self, places: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """Scale and second number of every element of some columns, (C, N) each."""
        return self._spread(self.scale, places, rows), (
            None if self.second is None else self._spread(self.second, places, rows)
        )

    def _spread(self, part: Tensor, places: Tensor, rows: int) -> Tensor:
        if self.group:
            return part.T[places // self.group]
        return part.reshape(1, -1).expand(len(places), rows)

    def _of_column(self, part: Tensor, place: int) -> Tensor:
        if self.group:
            return part[:, place // self.group]
        return part[:, 0] if part.ndim else part

    def parts(self) -> tuple[Tensor, QuantSpec, Tensor | None]:
        """Scale, spec and second number of the whole weight, as a QTensor takes them."""
        return self.scale, self.spec, self.second
