# mypy: allow-untyped-defs
"""What the Triton kernels share: rounding onto a site, the activation functions, byte products, grid dependencies.

``NATIVE`` is false where a kernel runs in Triton's interpreter, which has no PTX: the same numbers come from plain
operations then.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One thread of a program looks, at what the second level of cache holds, until the counter has come so far.
_UNTIL_COUNTED = tl.constexpr(
    "{.reg .pred other, early; .reg .u32 thread; .reg .s64 seen; mov.u32 thread, %tid.x;"
    " setp.ne.u32 other, thread, 0; @other bra counted;"
    " again: ld.acquire.gpu.global.s64 seen, [$1]; setp.lt.s64 early, seen, $2; @early bra again;"
    " counted: mov.u32 $0, 0;}"
)

ROUNDINGS = {"half-even": 0, "half-away": 1, "truncate": 2, "stochastic": 3}
STOCHASTIC = tl.constexpr(3)

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, ties to even
_MAGIC_BITS = tl.constexpr(0x4B400000)
_TO_TOP = tl.constexpr(tuple(f"prmt.b32 $0, $1, 0, 0x{place}444;" for place in range(3)))  # a byte, zeros below it


@triton.jit
def to_codes(x, inverse, low, high, ROUNDING: tl.constexpr):
    """clamp(round(x * inverse), low, high) in float32, as ``site.encode`` defines it (bounds are integers)."""
    scaled = tl.minimum(tl.maximum(x * inverse, low), high)
    if ROUNDING == 0:
        rounded = (scaled + _MAGIC) - _MAGIC
    else:
        magnitude = tl.floor(tl.abs(scaled) + (0.5 if ROUNDING == 1 else 0.0))
        rounded = tl.where(scaled < 0, -magnitude, magnitude)
    return rounded


@triton.jit
def to_stochastic(x, inverse, low, high, place):
    """clamp(floor(x * inverse + r), low, high) in float32, r uniform in [0, 1): up with the fraction's probability.

    r is Philox of the bits of x and of its ``place``, so that the same run gives the same codes.
    """
    bits = x.to(tl.int32, bitcast=True) ^ (place.to(tl.int32) * -1640531535)  # 2^32 / golden ratio
    return tl.minimum(tl.maximum(tl.floor(x * inverse + tl.rand(0, bits)), low), high)


@triton.jit
def to_int8(x, inverse, low, high, ROUNDING: tl.constexpr):
    """The same as int8."""
    if ROUNDING == 0:
        scaled = tl.minimum(tl.maximum(x * inverse, low), high)
        codes = (scaled + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)  # the lowest byte of the rounded sum
    else:
        codes = to_codes(x, inverse, low, high, ROUNDING).to(tl.int8)
    return codes


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate where exp(x) is small; x itself above 20, as torch does."""
    e = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + e
    small = one_more == 1.0
    accurate = tl.log(one_more) * (e / tl.where(small, 1.0, one_more - 1.0))
    return tl.where(x > 20.0, x, tl.where(small, e, accurate))


@triton.jit
def dot4(a, b, accumulator, NATIVE: tl.constexpr):
    """accumulator + the dot product of four int8 in each int32 of ``a`` and ``b``."""
    if NATIVE:
        accumulator = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            accumulator += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return accumulator


@triton.jit
def dot_float(a, b, accumulator, NATIVE: tl.constexpr):
    """accumulator + a b in float32; float32 operands are not shortened. The interpreter cannot multiply bfloat16."""
    if NATIVE:
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def small_to_float(x):
    """int32 of magnitude below 2^22 as float32, by addition: integer conversions run at a quarter of the rate."""
    return (x + _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC


@triton.jit
def nibble_to_float(words, place: tl.constexpr):
    """Code at nibble ``place``, stored as code + 8, as float32."""
    bits = ((words >> (4 * place)) & 15) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def byte_to_float(words, place: tl.constexpr, NATIVE: tl.constexpr):
    """2^24 times the int8 at byte ``place``, as float32: converting bytes themselves runs at an eighth of the rate."""
    if NATIVE and place < 3:
        SELECT: tl.constexpr = _TO_TOP[place]
        top = tl.inline_asm_elementwise(SELECT, "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        top = (words << (24 - 8 * place)) & -0x1000000
    return top.to(tl.float32)


@triton.jit
def rounded_bits(x):
    """Bits whose lowest byte is x rounded, ties to even; x an int8 but for its fraction."""
    return (x + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def pack_bytes(parts, NATIVE: tl.constexpr):
    """The lowest bytes of four words in one, the first lowest."""
    a, b, c, d = parts
    if NATIVE:
        word = tl.inline_asm_elementwise(
            "{.reg .b32 low, high; prmt.b32 low, $1, $2, 0x0040; prmt.b32 high, $3, $4, 0x0040;"
            " prmt.b32 $0, low, high, 0x5410;}",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)
    return word


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernels before this one have finished and their writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel's programs start, so that they can load what does not depend on this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wanted_programs(after):
    """What the counter of ``after`` (``gpu.gemv.Count``) comes to in this token: known before."""
    wanted = 0
    if after is not None:
        wanted = (tl.load(after[1]) + 1) * after[2]
    return wanted


@triton.jit
def wait_for_programs(after, wanted, PDL: tl.constexpr, NATIVE: tl.constexpr):
    """Wait until the counter of ``after`` has come to ``wanted``; what the programs wrote that it counts is visible.

    ``after`` None: wait for all of the kernel before (``kernels.decode.triton`` says why either is right).
    """
    if after is None:
        wait_for_previous(PDL)
    elif NATIVE:
        tl.inline_asm_elementwise(
            _UNTIL_COUNTED, "=r,l,l", [after[0].to(tl.int64), wanted], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()
    else:
        assert tl.load(after[0]) >= wanted, "programs are missing, and kernels run one after the other here"


@triton.jit
def count_program(counter):
    """Count this program at ``counter`` (None: do not), after all that it has written."""
    if counter is not None:
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release")
