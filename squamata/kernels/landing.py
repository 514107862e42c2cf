"""What the CPU kernels share: reading a value row by row, and landing a row of float32 on a site.

Kernels see a value as a :class:`Source` and a site as a :class:`Target`, plain tuples of arrays whose types never
vary, so that every kernel is compiled once whatever is quantized. Rows are tokens, B x L of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

import squamata.kernels.threads  # noqa: F401  starts numba's before a kernel does
from squamata.kernels import simd
from squamata.kernels.compilation import announce_compilation
from squamata.kernels.flagged import packed_rows, read_packed_row
from squamata.kernels.grid import SMALLEST_SCALE
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Site

FLOAT, ROUNDINGS = -1, {"half-even": 0, "half-away": 1, "truncate": 2}
_LEAST_SCALE = np.float32(SMALLEST_SCALE)
_NO_CODES, _NO_VALUES = np.empty((0, 0), np.int8), np.empty((0, 0), np.float32)
_NOTHING, _NO_BYTES = np.empty(0, np.float32), np.empty((0, 0), np.uint8)


announce_compilation()


class Source(NamedTuple):
    """A value of rows x features: int8 codes and their scale, one a feature; or ``flagged`` codes (see ``packing``)
    with the scales of either flag; or float32 values.
    """

    codes: NDArray[np.int8]
    values: NDArray[np.float32]
    scale: NDArray[np.float32]
    flagged: NDArray[np.uint8]
    coarse: NDArray[np.float32]


class Target(NamedTuple):
    """Where rows land. ``rounding``: FLOAT (values), or how codes are rounded.

    ``inverse``: reciprocal scale, one a feature; empty if the scale is taken from each row and left in ``scales``.
    """

    rounding: int
    low: np.float32
    high: np.float32
    span: np.float32
    inverse: NDArray[np.float32]
    scales: NDArray[np.float32]
    codes: NDArray[np.int8]
    values: NDArray[np.float32]


def array(x: Tensor) -> NDArray:
    """The tensor as a C-contiguous array, without copying if it is contiguous."""
    return x.detach().contiguous().numpy()


def vector(x: Tensor, size: int) -> NDArray[np.float32]:
    """A scale (one number, or one a feature) as float32 (size,)."""
    return array(x.float().reshape(-1).expand(size))


def plain(x: Tensor | None) -> bool:
    """True if kernels can read this tensor: float32, on the CPU, and no gradient is wanted."""
    return x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and not needs_gradient(x))


def needs_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def readable(value: Value) -> bool:
    """True if kernels can read this value, if need be after dequantizing it."""
    if isinstance(value, Tensor):
        return plain(value)
    return not value.simulated and value.data.device.type == "cpu" and not needs_gradient(value.scale)


def uniform(value: QTensor) -> bool:
    """True if value = code * scale with int8 codes."""
    return value.second is None and value.data.dtype == torch.int8 and value.spec.linear_grid


def source(value: Value) -> Source:
    """A value (..., features) as kernels read it; scales that vary along other axes are applied here."""
    features = value.shape[-1]
    if isinstance(value, QTensor):
        per_feature = value.scale.ndim == 0 or value.scale.shape == (features,)
        if per_feature and uniform(value):
            codes = array(value.data).reshape(-1, features)
            return Source(codes, _NO_VALUES, vector(value.scale, features), _NO_BYTES, _NOTHING)
        if per_feature and value.spec.flagged and value.length is not None and value.second is not None:
            packed = array(value.data).reshape(-1, value.data.shape[-1])
            scales = (vector(part, features) for part in (value.scale, value.second))
            return Source(_NO_CODES, _NO_VALUES, next(scales), packed, next(scales))
    return Source(_NO_CODES, array(as_float(value)).reshape(-1, features), _NOTHING, _NO_BYTES, _NOTHING)


@dataclass
class Landing:
    """Uninitialised room for a kernel's output (..., features), and what it is worth once written."""

    site: Site | None
    target: Target
    data: Tensor
    scale: Tensor | None = None

    def value(self) -> Value:
        """Call after the kernel has run."""
        if self.scale is not None:
            assert self.site is not None and self.site.spec is not None
            return QTensor(self.data, self.scale, self.site.spec)
        if self.site is None:
            return self.data
        return _packed(self.site, self.data) if _packs(self.site) else self.site.land(self.data)


def _packs(site: Site) -> bool:
    """True if this site's rows are packed and every feature has one grid, so that a kernel can write them."""
    if not (site.mode == "integer" and site.observer is None and site.spec is not None and site.spec.flagged):
        return False
    return site.layout.flat


def _packed(site: Site, x: Tensor) -> QTensor:
    grid, spec = site.expanded(), site.spec
    assert spec is not None
    return QTensor(packed_rows(x, grid, ROUNDINGS[spec.rounding]), grid.scale, spec, grid.second, x.shape[-1])


def landing(site: Site | None, *shape: int, per_token: bool = False) -> Landing:
    """Room for an output of this shape on a site (None: float32).

    ``per_token``: the kernel can take the scale of a row from the row itself, because it holds a whole one.
    """
    features = shape[-1]
    spec = None if site is None else site.spec
    fused = site is not None and site.static
    dynamic = per_token and site is not None and _per_token(site)
    if site is None or spec is None or not (fused or dynamic):
        data = torch.empty(shape, dtype=torch.float32)
        zero = np.float32(0)
        target = Target(FLOAT, zero, zero, zero, _NOTHING, _NOTHING, _NO_CODES, data.numpy().reshape(-1, features))
        return Landing(site, target, data)
    data = torch.empty(shape, dtype=torch.int8)
    if fused:
        scale, inverse, _ = site.expanded()
        inverses, scales = vector(inverse, features), _NOTHING
    else:
        scale = torch.empty((*shape[:-1], 1), dtype=torch.float32)
        inverses, scales = _NOTHING, scale.numpy().reshape(-1)
    low, high = (np.float32(code) for code in spec.code_range)
    codes = data.numpy().reshape(-1, features)
    rounding = ROUNDINGS[spec.rounding]
    return Landing(
        site, Target(rounding, low, high, np.float32(spec.span), inverses, scales, codes, _NO_VALUES), data, scale
    )


def _per_token(site: Site) -> bool:
    spec = site.spec
    if spec is None or site.observer is not None or not (site.mode == "integer" and spec.dynamic and spec.symmetric):
        return False
    return spec.linear_grid and spec.granularity.axes == ("token",) and spec.granularity.group is None


@njit(cache=True, nogil=True)
def read_row(origin, row, first, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the features ``first`` .. of a row of a Source, dequantized."""
    # slices, not sums of indices: numba would test each for being negative, and the loop would not vectorize
    last = first + out.size
    if origin.codes.size:
        codes, scale = origin.codes[row, first:last], origin.scale[first:last]
        for c in range(out.size):
            out[c] = types.float32(codes[c]) * scale[c]
    elif origin.flagged.size:
        read_packed_row(origin.flagged, row, first, origin.scale, origin.coarse, out)
    else:
        values = origin.values[row, first:last]
        for c in range(out.size):
            out[c] = values[c]


@njit(cache=True, nogil=True)
def write_row(target, row, first, x):  # type: ignore[no-untyped-def]
    """Land ``x`` as the features ``first`` .. of a row of a Target with a scale a feature."""
    last = first + x.size
    rounding, low, high = target.rounding, target.low, target.high
    if rounding == FLOAT:
        values = target.values[row, first:last]
        for c in range(x.size):
            values[c] = x[c]
        return
    codes, inverse = target.codes[row, first:last], target.inverse[first:last]
    if rounding == 0:
        for c in range(x.size):
            code = simd.rint(x[c] * inverse[c])
            codes[c] = types.int8(types.int32(simd.clamp(code, low, high)))
    elif rounding == 1:
        for c in range(x.size):
            code = simd.round_away(x[c] * inverse[c])
            codes[c] = types.int8(types.int32(simd.clamp(code, low, high)))
    else:
        for c in range(x.size):
            code = simd.truncate(x[c] * inverse[c])
            codes[c] = types.int8(types.int32(simd.clamp(code, low, high)))


@njit(cache=True, nogil=True)
def write_whole_row(target, row, x):  # type: ignore[no-untyped-def]
    """Land a whole row; on a dynamic site by its own scale, largest magnitude / span."""
    if target.scales.size == 0:
        write_row(target, row, 0, x)
        return
    largest = types.float32(0.0)
    for c in range(x.size):
        magnitude = abs(x[c])
        largest = magnitude if magnitude > largest else largest
    scale = max(simd.divide(largest, target.span), _LEAST_SCALE)
    target.scales[row] = scale
    inverse = simd.divide(types.float32(1.0), scale)
    codes = target.codes[row]
    for c in range(x.size):
        scaled = x[c] * inverse
        if target.rounding == 0:
            scaled = simd.rint(scaled)
        elif target.rounding == 1:
            scaled = simd.round_away(scaled)
        else:
            scaled = simd.truncate(scaled)
        codes[c] = types.int8(types.int32(simd.clamp(scaled, target.low, target.high)))
