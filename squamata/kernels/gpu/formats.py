# mypy: allow-untyped-defs
"""Number formats in Triton kernels: packed 4 + 1 bit codes, decoded in registers (layout: ``kernels.packing``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_flagged(rows, row, columns, channel, mask, fine, coarse):
    """Float values of some channels of a packed row; ``fine``, ``coarse``: their steps without and with the flag."""
    values = (columns + 1) // 2
    start = rows + row * (values + (columns + 7) // 8)
    bytes_ = tl.load(start + channel // 2, mask=mask, other=0).to(tl.int32)
    flags = tl.load(start + values + channel // 8, mask=mask, other=0).to(tl.int32)
    nibble = (bytes_ >> (4 * (channel % 2))) & 15
    step = tl.where(((flags >> (channel % 8)) & 1) != 0, coarse, fine)
    return ((nibble ^ 8) - 8).to(tl.float32) * step
