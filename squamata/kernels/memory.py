"""Arrays at plain addresses: lets compiled code take a table of int64 instead of unboxing one object an array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


def address(array: NDArray | None) -> int:
    """Address of the first element of a C-contiguous array; 0 for None. The caller keeps the array alive."""
    if array is None:
        return 0
    if not array.flags.c_contiguous:
        raise ValueError("compiled code needs a C-contiguous array")
    return array.ctypes.data


@intrinsic
def _pointer(_typing, where):  # type: ignore[no-untyped-def]
    """int64 address -> void pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@njit(cache=True)
def view_float32(where, count):  # type: ignore[no-untyped-def]
    """float32 (count,) at an address."""
    return carray(_pointer(where), (count,), np.float32)


@njit(cache=True)
def view_int32(where, count):  # type: ignore[no-untyped-def]
    """int32 (count,) at an address."""
    return carray(_pointer(where), (count,), np.int32)


@njit(cache=True)
def view_int8(where, count):  # type: ignore[no-untyped-def]
    """int8 (count,) at an address."""
    return carray(_pointer(where), (count,), np.int8)
