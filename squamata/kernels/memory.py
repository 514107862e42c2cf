"""Arrays at plain addresses: lets compiled code take a table of int64 instead of unboxing one object an array."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

import squamata.kernels.compilation  # noqa: F401  before anything is compiled


def address(array: NDArray | None) -> int:
    """Address of the first element of a C-contiguous array; 0 for None. The caller keeps the array alive."""
    if array is None:
        return 0
    if not array.flags.c_contiguous:
        raise ValueError("compiled code needs a C-contiguous array")
    return array.ctypes.data


@intrinsic
def pointer(_typing, where):  # type: ignore[no-untyped-def]
    """int64 address -> void pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def call_address(_typing, where, arguments):  # type: ignore[no-untyped-def]
    """Call the C function ``void(...)`` at an address with a tuple of numbers.

    Numba compiles a function again into every one that calls it; a call through an address is compiled once, and
    the cache on disk stays valid when the address changes.
    """
    if not isinstance(arguments, types.BaseTuple):
        return None

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in arguments]  # type: ignore[attr-defined]
        function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        builder.call(function, [builder.extract_value(values[1], i) for i in range(len(kinds))])
        return context.get_dummy_value()

    return types.none(types.int64, arguments), codegen


@intrinsic
def record_address(_typing, record):  # type: ignore[no-untyped-def]
    """Address of a record."""
    if not isinstance(record, types.Record):
        return None

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.ptrtoint(values[0], ir.IntType(64))

    return types.int64(record), codegen


@njit(cache=True)
def view_float32(where, count):  # type: ignore[no-untyped-def]
    """float32 (count,) at an address."""
    return carray(pointer(where), (count,), np.float32)


@njit(cache=True)
def slice_float32(where, start, stop):  # type: ignore[no-untyped-def]
    """float32 elements start..stop of an array at an address.

    A loop over it from 0 vectorizes; one from ``start`` would test every index for being negative.
    """
    return carray(pointer(where + 4 * start), (stop - start,), np.float32)


@njit(cache=True)
def view_int32(where, count):  # type: ignore[no-untyped-def]
    """int32 (count,) at an address."""
    return carray(pointer(where), (count,), np.int32)


@njit(cache=True)
def view_int8(where, count):  # type: ignore[no-untyped-def]
    """int8 (count,) at an address."""
    return carray(pointer(where), (count,), np.int8)
