# mypy: allow-untyped-defs
"""Reading for the sake of the first-level cache."""

from __future__ import annotations

import triton
import triton.language as tl

# The assembler drops reads that nothing depends on, whatever they would leave in a cache. So something does: a hint
# that is given if the word is one among four thousand million.
_USED = tl.constexpr("{.reg .pred one; setp.eq.b32 one, $1, 0x7fc0dead; @one prefetch.global.L2 [$2]; mov.b32 $0, 0;}")


@triton.jit
def _read(words, mask):
    """Read 32-bit words for nothing but their place in the first-level cache."""
    read = tl.load(words, mask=mask).to(tl.int32, bitcast=True)
    where = words.to(tl.int64)
    tl.inline_asm_elementwise(_USED, "=r,r,l", [read, where], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def into_cache(x, LENGTH: tl.constexpr, units, UNITS: tl.constexpr):
    """Read an activation row (32-bit words) and its ``units`` as a whole into the first-level cache.

    The products then read it four words at a time, the same in every lane: such reads would each wait for the second
    level, one sector after the other.
    """
    BLOCK: tl.constexpr = 1024
    for start in tl.static_range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _read(x + at, at < LENGTH)
    for start in tl.static_range(0, UNITS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _read(units + at, at < UNITS)
    tl.debug_barrier()
