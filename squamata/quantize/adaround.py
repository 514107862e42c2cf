"""AdaRound: learn for every weight whether to round up or down (Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.quantize.rtn import pack, round_to_nearest
from squamata.spec.quant import QuantSpec

ZETA, GAMMA = 1.1, -0.1  # how far the rectified sigmoid is stretched, so that it reaches 0 and 1
BETA = (20.0, 2.0)  # exponent of the regulariser, first and last
WARM = 0.2  # share of the steps without it
AT_ONCE = 2**22  # weights that are learned at a time

Steps = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]


class SecondMoments(Protocol):
    """What was seen of a weight's inputs: ``gram`` = sum of x x^T, float (K, K), over ``count`` vectors."""

    @property
    def gram(self) -> Tensor: ...

    @property
    def count(self) -> int: ...


def adaround(
    weight: Tensor,
    spec: QuantSpec,
    layout: Layout,
    statistics: SecondMoments | None,
    steps: Steps = 1000,
    learning_rate: Positive = 0.01,
    regulariser: Positive = 30.0,
) -> QTensor:
    """Codes clip(floor(W / s) + h, n, p), h in {0, 1}, that make ||W X - W' X||^2 small, every row by itself.

    Minimises tr((W' - W) X X^T (W' - W)^T) + regulariser sum(1 - |2 h(V) - 1|^beta) over V by Adam, with the rectified
    sigmoid h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) (equations 21 to 25), beta falling linearly and the
    first fifth of the steps without the regulariser. The unit of a row's error is a K-th of what rounding to nearest
    leaves, so that the regulariser means the same everywhere. Scales are those of rounding to nearest; a row that has
    become worse keeps its nearest codes. Deterministic. Time: steps x N x K^2. Memory beside weight and Gram matrix:
    about ten float32 tensors of ``AT_ONCE`` elements. SquamataError without statistics.
    """
    if statistics is None or statistics.count == 0:
        raise SquamataError("adaround must see what the weight multiplies: give a text with --calibration FILE")
    gram = (statistics.gram / statistics.count).float()
    nearest = round_to_nearest(weight, spec, layout)
    scale, zero = _per_row(nearest.scale, weight, spec), _per_row(nearest.second, weight, spec)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in torch.arange(len(weight)).split(max(1, AT_ONCE // weight.shape[1])):
        step, point = scale[rows], zero[rows]
        low, high = (limit - point for limit in spec.code_range)
        part = _Rows(weight[rows].float() / step, step, low, high, gram)
        chosen = part.better(part.learn(steps, learning_rate, regulariser), nearest.codes()[rows].float())
        codes[rows] = (chosen + point).to(torch.int8)
    return pack(QTensor(codes, nearest.scale, spec, nearest.second))


def _per_row(part: Tensor | None, weight: Tensor, spec: QuantSpec) -> Tensor:
    """A scale or zero point for every row: (N, 1) or (N, K)."""
    if part is None:
        return torch.zeros(len(weight), 1)
    element = QTensor(weight, part, spec).element_scale()
    return element.reshape(1, 1).expand(len(weight), 1) if element.ndim == 0 else element


@dataclass
class _Rows:
    """Some rows of a weight. ``target``: W / s (n, K); ``low``, ``high``: codes less the zero point."""

    target: Tensor
    step: Tensor
    low: Tensor
    high: Tensor
    gram: Tensor

    def error(self, codes: Tensor) -> Tensor:
        """Mean squared error of every row's outputs (n,), for codes less the zero point."""
        difference = (codes - self.target) * self.step
        return ((difference @ self.gram) * difference).sum(1)

    def better(self, codes: Tensor, nearest: Tensor) -> Tensor:
        """Of two sets of codes, row by row, those with the smaller error."""
        return torch.where((self.error(codes) < self.error(nearest))[:, None], codes, nearest)

    @torch.enable_grad()
    def learn(self, steps: int, learning_rate: float, regulariser: float) -> Tensor:
        """Codes less the zero point, rounded the way that the optimised h says."""
        below = self.target.floor()
        unit = self.error(self.target.round().clamp(self.low, self.high)) / self.target.shape[1]
        unit = unit.clamp_min(1e-30)
        place = (self.target - below - GAMMA) / (ZETA - GAMMA)
        V = torch.logit(place).requires_grad_()
        optimizer = torch.optim.Adam([V], lr=learning_rate)
        warm = int(WARM * steps)
        for number in range(steps):
            h = self._soft(V)
            loss = (self.error((below + h).clamp(self.low, self.high)) / unit).sum()
            if number >= warm:
                beta = BETA[0] + (BETA[1] - BETA[0]) * (number - warm) / (steps - warm)
                loss = loss + regulariser * (1 - (2 * h - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return (below + (self._soft(V.detach()) >= 0.5)).clamp(self.low, self.high)

    @staticmethod
    def _soft(V: Tensor) -> Tensor:
        return (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
