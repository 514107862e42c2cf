"""Float32 primitives for numba loops, written so that LLVM vectorizes the loop that calls them.

Numba has no vector mathematics library: ``math.exp`` in a loop is one scalar call an element. Each function here is
straight-line code without branches (selects only), so sixteen of them run at once where the CPU has AVX-512.
All take and return float32 and refuse float64, which would slip in unnoticed.

Multiplication and addition are never contracted; fused multiply-add is used only inside ``exp`` and ``log``, where
it is written out. Hence values that land on a quantization grid agree bit by bit with a torch reference.

The ``emit_*`` functions build LLVM IR and accept a scalar or a vector of float; kernels that emit whole loops
(``gemv``, ``scan``) share them with the scalar functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

import squamata.kernels.compilation  # noqa: F401  before anything is compiled

FLOAT = ir.FloatType()
INT32 = ir.IntType(32)

_LOG2_E = 1.0 / math.log(2.0)
_LN2_HIGH = 0.693359375  # nine bits: n * _LN2_HIGH is exact for every exponent n
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which is then the low bits of the sum
_LARGEST_EXPONENT = 88.72283  # exp of it is the largest float32
_SMALLEST_EXPONENT = -103.98
# (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, Chebyshev interpolation
_EXP_POLYNOMIAL = (0.5, 0.16666573286056519, 0.04166645556688309, 0.008363776840269566, 0.0013934544986113906)
# (2 atanh(s) / s - 2) / s^2 as a polynomial of s^2, |s| <= 0.1716, Chebyshev interpolation
_LOG_POLYNOMIAL = (0.66666667, 0.4000013, 0.28549913, 0.23354726)
_SQRT_HALF_BITS = 0x3F3504F3
_GOLDEN = 0x9E3779B1 - 2**32  # 2^32 / golden ratio, as int32
_MIX = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)  # of murmur3 (Appleby), as int32


def target_features() -> Mapping[str, bool]:
    """LLVM's names of what the CPU that numba compiles for has: the host, unless NUMBA_CPU_NAME=generic (nothing) or
    NUMBA_CPU_FEATURES say otherwise.
    """
    given = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if given is not None:
        return {name[1:]: name.startswith("+") for name in given.split(",") if name}
    try:
        return llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot name the features of this CPU
        return {}


def has_vnni(features: Mapping[str, bool] | None = None) -> bool:
    """Whether there is the 512-bit int8 dot-product instruction (``vpdpbusd``), by default on the target."""
    features = target_features() if features is None else features
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


def constant(kind: ir.Type, value: float | int) -> ir.Constant:
    """Constant of a scalar type, or the same value in every lane of a vector type."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """``element``, or a vector of it with as many lanes as ``kind``."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def call(builder: ir.IRBuilder, name: str, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic that is overloaded on the type of its (equally typed) arguments."""
    kind = arguments[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    signature = ir.FunctionType(kind, [kind] * len(arguments))
    name = f"llvm.{name}.{suffix}"
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, arguments)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c`` with one rounding."""
    return call(builder, "fma", (a, b, c))


def emit_clamp(builder: ir.IRBuilder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """``min(max(x, low), high)``; NaN stays NaN."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    value: ir.Value = constant(x.type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = emit_fma(builder, value, x, constant(x.type, coefficient))
    return value


def _power_of_two(builder: ir.IRBuilder, exponent: ir.Value, kind: ir.Type) -> ir.Value:
    bits = builder.shl(builder.add(exponent, constant(exponent.type, 127)), constant(exponent.type, 23))
    return builder.bitcast(bits, kind)


def emit_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Exponential, about one unit in the last place; gradual underflow to 0, stops at the largest float32."""
    kind, integer = x.type, like(x.type, INT32)
    x = emit_clamp(builder, x, constant(kind, _SMALLEST_EXPONENT), constant(kind, _LARGEST_EXPONENT))
    shifted = emit_fma(builder, x, constant(kind, _LOG2_E), constant(kind, _ROUNDER))
    n = builder.fsub(shifted, constant(kind, _ROUNDER))
    r = emit_fma(builder, n, constant(kind, -_LN2_HIGH), x)
    r = emit_fma(builder, n, constant(kind, -_LN2_LOW), r)
    tail = emit_fma(builder, builder.fmul(r, r), _polynomial(builder, r, _EXP_POLYNOMIAL), r)
    value = builder.fadd(tail, constant(kind, 1.0))
    exponent = builder.sub(builder.bitcast(shifted, integer), constant(integer, 0x4B400000))
    half = builder.ashr(exponent, constant(integer, 1))  # two factors: 2^128 and 2^-149 are not normal numbers
    value = builder.fmul(value, _power_of_two(builder, half, kind))
    return builder.fmul(value, _power_of_two(builder, builder.sub(exponent, half), kind))


def emit_log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Natural logarithm of a positive normal number, about one unit in the last place."""
    kind, integer = x.type, like(x.type, INT32)
    bits = builder.bitcast(x, integer)
    exponent = builder.ashr(builder.sub(bits, constant(integer, _SQRT_HALF_BITS)), constant(integer, 23))
    mantissa = builder.sub(bits, builder.shl(exponent, constant(integer, 23)))
    f = builder.fsub(builder.bitcast(mantissa, kind), constant(kind, 1.0))  # in [sqrt(1/2) - 1, sqrt(2) - 1)
    s = builder.fdiv(f, builder.fadd(f, constant(kind, 2.0)))
    square = builder.fmul(s, s)
    rest = builder.fmul(square, _polynomial(builder, square, _LOG_POLYNOMIAL))
    n = builder.sitofp(exponent, kind)
    low = emit_fma(builder, n, constant(kind, _LN2_LOW), builder.fneg(builder.fmul(s, builder.fsub(f, rest))))
    return emit_fma(builder, n, constant(kind, _LN2_HIGH), builder.fadd(f, low))


def emit_log1p(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``log(1 + x)`` for x >= 0, accurate also where 1 + x rounds to 1."""
    one = constant(x.type, 1.0)
    total = builder.fadd(one, x)
    lost = builder.fsub(x, builder.fsub(total, one))
    return builder.fadd(emit_log(builder, total), builder.fdiv(lost, total))


def emit_round_away(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``copysign(floor(|x| + 1/2), x)``, as the reference rounds (just below one half it rounds up)."""
    magnitude = builder.fadd(call(builder, "fabs", (x,)), constant(x.type, 0.5))
    return call(builder, "copysign", (call(builder, "floor", (magnitude,)), x))


def emit_sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``1 / (1 + exp(-x))``."""
    one = constant(x.type, 1.0)
    return builder.fdiv(one, builder.fadd(one, emit_exp(builder, builder.fneg(x))))


def emit_uniform(builder: ir.IRBuilder, counter: ir.Value) -> ir.Value:
    """A number in [0, 1) of 24 bits for every int32 counter: murmur3's finalizer of a Weyl sequence."""
    kind, mixed = counter.type, builder.mul(counter, constant(counter.type, _GOLDEN))
    for shift, factor in ((16, _MIX[0]), (13, _MIX[1]), (16, 1)):
        mixed = builder.xor(mixed, builder.lshr(mixed, constant(kind, shift)))
        mixed = builder.mul(mixed, constant(kind, factor)) if factor != 1 else mixed
    return builder.fmul(
        builder.sitofp(builder.lshr(mixed, constant(kind, 8)), like(kind, FLOAT)), constant(like(kind, FLOAT), 2.0**-24)
    )


def emit_silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``x / (1 + exp(-x))``."""
    return builder.fdiv(x, builder.fadd(constant(x.type, 1.0), emit_exp(builder, builder.fneg(x))))


def emit_softplus(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """``log(1 + exp(x))``, and x itself above 20."""
    large = builder.fcmp_ordered(">", x, constant(x.type, 20.0))
    return builder.select(large, x, emit_log1p(builder, emit_exp(builder, x)))


def _float_function(emit: Callable[..., ir.Value], arity: int) -> Any:
    """Numba intrinsic of ``arity`` float32 arguments and a float32 result, from a function that emits its IR."""

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return emit(builder, *arguments)

    def accept(*arguments: types.Type) -> Any:
        if any(argument != types.float32 for argument in arguments):
            return None
        return types.float32(*[types.float32] * arity), codegen

    if arity == 1:
        return intrinsic(lambda _typing, x: accept(x))
    if arity == 2:
        return intrinsic(lambda _typing, x, y: accept(x, y))
    return intrinsic(lambda _typing, x, y, z: accept(x, y, z))


rint = _float_function(lambda builder, x: call(builder, "rint", (x,)), 1)
"""Nearest integer, ties to even."""
round_away = _float_function(emit_round_away, 1)
"""Nearest integer, ties away from zero: ``copysign(floor(|x| + 1/2), x)``."""
floor = _float_function(lambda builder, x: call(builder, "floor", (x,)), 1)
"""Integer part, downwards."""
truncate = _float_function(lambda builder, x: call(builder, "trunc", (x,)), 1)
"""Integer part, towards zero."""
sqrt = _float_function(lambda builder, x: call(builder, "sqrt", (x,)), 1)
"""Square root, correctly rounded."""
fma = _float_function(emit_fma, 3)
"""``x * y + z`` with one rounding."""
clamp = _float_function(emit_clamp, 3)
"""``min(max(x, y), z)``; NaN stays NaN."""
divide = _float_function(lambda builder, x, y: builder.fdiv(x, y), 2)
"""``x / y`` without the test for zero that Python's division carries, which would keep a loop from vectorizing."""
exp = _float_function(emit_exp, 1)
"""See :func:`emit_exp`."""
log = _float_function(emit_log, 1)
"""See :func:`emit_log`."""
log1p = _float_function(emit_log1p, 1)
"""See :func:`emit_log1p`."""
sigmoid = _float_function(emit_sigmoid, 1)
"""``1 / (1 + exp(-x))``."""
silu = _float_function(emit_silu, 1)
"""``x / (1 + exp(-x))``."""
softplus = _float_function(emit_softplus, 1)
"""``log(1 + exp(x))``, and x itself above 20."""


@intrinsic
def noise(_typing, counter):  # type: ignore[no-untyped-def]
    """Uniform float32 in [0, 1) of an int64 counter, of which 32 bits count; see :func:`emit_uniform`."""
    if counter != types.int64:
        return None

    def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        return emit_uniform(builder, builder.trunc(arguments[0], INT32))

    return types.float32(types.int64), codegen


@intrinsic
def float_bits(_typing, x):  # type: ignore[no-untyped-def]
    """Bits of a float32 as int32."""
    if x != types.float32:
        return None
    return types.int32(types.float32), lambda _context, builder, _signature, args: builder.bitcast(args[0], INT32)


@intrinsic
def bits_float(_typing, bits):  # type: ignore[no-untyped-def]
    """The float32 that has these int32 bits."""
    if bits != types.int32:
        return None
    return types.float32(types.int32), lambda _context, builder, _signature, args: builder.bitcast(args[0], FLOAT)
