"""What a scale costs: the error of every group under a grid, and the information that its codes lose."""

from __future__ import annotations

import torch
from torch import Tensor

from squamata.kernels.codec import CODECS, Grid
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec

AT_ONCE = 2**22  # elements that are encoded at a time


def mean_error(
    statistics: Statistics, scale: Tensor, zero: Tensor | None, spec: QuantSpec, power: float = 2.0
) -> Tensor:
    """Mean |x - Q(x)|^power of every group, float64 (groups,), for a scale and zero point in stored form.

    Exact where the sample holds all values. Otherwise the histogram's, exact for values spread evenly within each bin;
    for codecs whose steps are not uniform the sample's.
    """
    assert statistics.histogram is not None and statistics.sample is not None
    scales, zeros = scale.reshape(-1, 1), _column(second_number(statistics, scale, zero, spec), scale)
    errors, start = [], 0
    for number, values in enumerate(statistics.sample.values):
        rows = slice(start, start + len(values))
        if statistics.sample.complete(number) or not spec.linear_grid:
            errors.append(_of_values(values, scales[rows], zeros[rows], spec, power))
        else:
            edges, counts = statistics.histogram.edges()[rows], statistics.histogram.counts[rows]
            errors.append(histogram_error(edges, counts, scales[rows], zeros[rows], spec, power))
        start = rows.stop
    return torch.cat(errors)


def second_number(statistics: Statistics, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor | None:
    """What the codec makes of the range that a strategy chose: the zero point, or what it fits to scale and largest |x|
    (the range is then the threshold of its fine grid).
    """
    fit = CODECS[spec.codec].fit
    if fit is None:
        return zero
    low, high = statistics.magnitude()
    return fit(scale, torch.maximum(low.abs(), high.abs()), spec)


def _column(second: Tensor | None, scale: Tensor) -> Tensor:
    """A second number as (groups, 1), zeros for none."""
    return (torch.zeros_like(scale) if second is None else second).reshape(-1, 1)


def _grid(x: Tensor, scale: Tensor, second: Tensor, spec: QuantSpec) -> Grid:
    """The grid of rows of values; what the codec takes from every token it takes from the row."""
    grid = Grid.of(scale, None if spec.second is None else second)
    live = CODECS[spec.codec].live
    return grid if live is None else live(x, grid, spec)


def _of_values(values: Tensor, scale: Tensor, second: Tensor, spec: QuantSpec, power: float) -> Tensor:
    """Mean |x - Q(x)|^power of the rows of values (groups, members), through the codec."""
    codec, errors = CODECS[spec.codec], []
    size = max(1, AT_ONCE // max(1, values.shape[1]))
    for x, step, point in zip(values.split(size), scale.split(size), second.split(size), strict=True):
        grid = _grid(x, step, point, spec)
        codes = codec.encode(x, grid, spec)
        codes = codes - point if spec.linear_grid else codes
        decoded = codec.decode(codes, step, grid.second, spec, torch.float32)
        errors.append((x - decoded).abs().pow(power).mean(1, dtype=torch.float64))
    return torch.cat(errors)


def histogram_error(
    edges: Tensor, counts: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, power: float
) -> Tensor:
    """Mean |x - Q(x)|^power for a density that is constant within each bin, uniform grid; float64 (groups,).

    ``edges`` (groups, bins + 1), ``counts`` (groups, bins), ``scale`` and ``zero`` (groups, 1). In steps of the scale
    the integral of |t - round(t)|^p from 0 to t is k c + sign(r) |r|^(p+1) / (p+1) with k = round(t), r = t - k and c
    the integral over a whole step; with k clamped to the codes this is the integral of the clipping error as well.
    """
    step = scale.double()
    places = edges / step + zero.double()  # in codes
    codes = (torch.trunc(edges / step) if spec.rounding == "truncate" else torch.round(edges / step)) + zero.double()
    codes = codes.clamp(*spec.code_range)
    whole = (1.0 if spec.rounding == "truncate" else 2.0**-power) / (power + 1)
    rest = places - codes
    integral = codes * whole + torch.sign(rest) * rest.abs().pow(power + 1) / (power + 1)
    inside = (integral.diff(dim=1) / places.diff(dim=1)) * counts
    return inside.sum(1) / counts.sum(1).clamp_min(1) * step[:, 0].pow(power)


def information_lost(statistics: Statistics, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """KL(P || Q) in nats of every group, float64 (groups,), for a scale and zero point in stored form.

    P: the histogram. Q: what is left of it in the codes, the mass of every code spread evenly over those occupied bins
    that round to it, clipped ones included. Zero when every occupied bin has a code of its own.
    """
    assert statistics.histogram is not None
    counts = statistics.histogram.counts.double()
    second = _column(second_number(statistics, scale, zero, spec), scale)
    centres = statistics.histogram.centres().float()
    encoded = CODECS[spec.codec].encode(centres, _grid(centres, scale.reshape(-1, 1), second, spec), spec)
    smallest = encoded.amin()
    codes = (encoded - smallest).long()
    size = int(codes.max()) + 1
    nothing = torch.zeros(len(counts), size, dtype=torch.float64)
    mass = nothing.scatter_add(1, codes, counts)
    bins = nothing.scatter_add(1, codes, (counts > 0).double())
    spread = (mass / bins.clamp_min(1)).gather(1, codes)
    surprise = torch.where(counts > 0, counts * torch.log(counts / spread), 0.0)
    return surprise.sum(1) / counts.sum(1).clamp_min(1)
