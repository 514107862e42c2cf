"""Number formats beside the uniform grid, as tables: a sign and a magnitude m, whose value is

    fine[m] * scale + coarse[m] * second

``second`` is another number that every group has, or there is none. All are for tensors that are dequantized before
they are used: a product needs one step size. ``bits`` is what an element takes in storage, flags and sign included,
so the control of equal storage is the uniform grid with as many bits.

With b bits, n = 2^(b-3) and s the scale (n = 64 with 9 bits, where s is the step of int8 for the same threshold):

dual-scale (b >= 3)         a value of b - 1 bits and a flag: steps s up to top = 2^(b-2) - 1, or steps ``coarse`` up to
                            top times. W4A5-SE of Quamba-SE is b = 5. Its design divides the threshold by 15, which
                            leaves no sign; here top = 7, both signs.
dynamic-outlier (b >= 3)    the same, ``coarse`` taken from the token at run time: max |x| / top (Quamba-SE's mode
                            5-3: b = 9)
soft-edge (b >= 5)          n steps of s/4 up to 16 s, then of s up to 143 s, then n - 1 of 4 s up to 395 s (b = 9; n/4,
                            9n/4 - 1 and 25n/4 - 5 in general): three segments (arXiv 2601.09451; its fork's mode 5-7)
half-scale (b >= 4)         2n steps of s/2 up to n s, then of s up to (2n - 1) s (6-3)
quarter-scale (b >= 4)      2n steps of s/4 up to n/2 s, then of s up to (2n - 1) s (5-4)
quarter-log2 (b = 5 .. 7)   steps of s/4 up to 8 s, then 8 s + 2^k s/4, k = 0 .. 30 (b = 7; up to 2^(b-4) s and
                            k <= 2^(b-2) - 2 in general). The fork (5-6) rounds log2 down and counts 256 exponents;
                            here the nearer power is taken, and the exponents are those that the bits leave.
outlier-piecewise (b >= 5)  steps s up to 2^(b-1) - 8 (120 with 8 bits), then 7 steps ``tail``
log2 (b = 2 .. 6)           s 2^(m - top), m = 1 .. top = 2^(b-1) - 1, and 0
ltsq (b = 2 .. 5)           1 - 2^-m, m = 0 .. 2^b - 1, at most 24: the logarithm of what is missing to 1, for the
                            scan's decay exp(dt A) (QMamba, arXiv 2501.13624). No sign, no scale; m is rounded, not the
                            value. 5 bits hold every level that float32 tells from 1, so more bits would add nothing.
ltsq-fine (b = 5 .. 8)      1 - 2^(-m 2^(4-b)), m = 0 .. 2^b - 1: ltsq's range of 4 bits, where a further bit halves the
                            step of the logarithm instead of doubling its range. Ours: what QMamba's leaves out.
fixed (b = 2 .. 12)         m 2^-b, m = 0 .. 2^b - 1: a fixed-point number below 1, by which integers are multiplied in
                            a product and a shift. No sign, no scale. SSDi8's gate between chunks is b = 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

TAIL = 7  # levels of outlier-piecewise above the threshold
EXPONENTS = 24  # 1 - 2^-24 is the float32 before 1

Levels = tuple[float, ...]
Knots = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Format:
    """A number format: functions of its bits, of which it can have ``fewest`` to ``most``.

    ``fine``, ``coarse``: the factors of every magnitude. ``span``: threshold / scale, where the threshold is the value
    that a scale strategy wants represented (a format with a tail represents larger ones too). ``second``: name of the
    second number in a checkpoint. ``live``: the second number is not stored but taken from every token. ``absolute``:
    the levels are the values themselves, never negative: no sign is stored, and the scale is 1.
    """

    fewest: int
    most: int
    fine: Callable[[int], Levels]
    span: Callable[[int], float]
    coarse: Callable[[int], Levels] | None = None
    second: str | None = None
    live: bool = False
    absolute: bool = False


def _through(knots: Knots) -> Levels:
    """Levels that rise linearly from one knot (magnitude, level) to the next."""
    levels = [0.0]
    for (first, low), (last, high) in pairwise(knots):
        levels += [low + (high - low) * step / (last - first) for step in range(1, last - first + 1)]
    return tuple(levels)


def _soft_edge(bits: int) -> Levels:
    n = 2 ** (bits - 3)
    middle = n / 4 + 2 * n - 1
    return _through(((0, 0.0), (n, n / 4), (3 * n - 1, middle), (4 * n - 2, middle + 4 * (n - 1))))


def _half_scale(bits: int) -> Levels:
    n = 2 ** (bits - 3)
    return _through(((0, 0.0), (2 * n, n), (3 * n - 1, 2 * n - 1)))


def _quarter_scale(bits: int) -> Levels:
    n = 2 ** (bits - 3)
    return _through(((0, 0.0), (2 * n, n / 2), (2 * n + 3 * n // 2 - 1, 2 * n - 1)))


def _quarter_log2(bits: int) -> Levels:
    steps = 2 ** (bits - 2)
    return (*(m / 4 for m in range(steps + 1)), *((steps + 2.0**k) / 4 for k in range(steps - 1)))


def _log2(bits: int) -> Levels:
    top = 2 ** (bits - 1) - 1
    return (0.0, *(2.0 ** (m - top) for m in range(1, top + 1)))


def _complement(bits: int, finest: int) -> Levels:
    """1 - 2^-q for q = 0, 1/finest, 2/finest ..., as many as the bits and float32 hold."""
    return tuple(1.0 - 2.0 ** (-m / finest) for m in range(min(2**bits, EXPONENTS * finest + 1)))


def _fixed(bits: int) -> Levels:
    return tuple(m / 2**bits for m in range(2**bits))


def _dual_top(bits: int) -> int:
    return 2 ** (bits - 2) - 1


def _knee(bits: int) -> int:
    return 2 ** (bits - 1) - 1 - TAIL


def _piecewise_fine(bits: int) -> Levels:
    knee = _knee(bits)
    return (*map(float, range(knee + 1)), *(float(knee),) * TAIL)


def _piecewise_coarse(bits: int) -> Levels:
    return (*(0.0,) * (_knee(bits) + 1), *map(float, range(1, TAIL + 1)))


def _dual_fine(bits: int) -> Levels:
    top = _dual_top(bits)
    return (*map(float, range(top + 1)), *(0.0,) * top)


def _dual_coarse(bits: int) -> Levels:
    top = _dual_top(bits)
    return (*(0.0,) * (top + 1), *map(float, range(1, top + 1)))


FORMATS: dict[str, Format] = {
    "dual-scale": Format(3, 9, _dual_fine, _dual_top, _dual_coarse, second="coarse"),
    "dynamic-outlier": Format(3, 9, _dual_fine, _dual_top, _dual_coarse, live=True),
    "soft-edge": Format(5, 9, _soft_edge, lambda bits: 2 ** (bits - 2) - 1),
    "half-scale": Format(4, 9, _half_scale, lambda bits: 2 ** (bits - 2) - 1),
    "quarter-scale": Format(4, 9, _quarter_scale, lambda bits: 2 ** (bits - 2) - 1),
    "quarter-log2": Format(5, 7, _quarter_log2, lambda bits: 2**bits - 1),
    "outlier-piecewise": Format(5, 9, _piecewise_fine, _knee, _piecewise_coarse, second="tail"),
    "log2": Format(2, 6, _log2, lambda bits: 1.0),
    "ltsq": Format(2, 5, lambda bits: _complement(bits, 1), lambda bits: 1.0, absolute=True),
    "ltsq-fine": Format(5, 8, lambda bits: _complement(bits, 2 ** (bits - 4)), lambda bits: 1.0, absolute=True),
    "fixed": Format(2, 12, _fixed, lambda bits: 1.0, absolute=True),
}


@cache
def levels(codec: str, bits: int) -> tuple[Levels, Levels | None]:
    """``fine`` and ``coarse`` of every magnitude of a format."""
    form = FORMATS[codec]
    return form.fine(bits), None if form.coarse is None else form.coarse(bits)
