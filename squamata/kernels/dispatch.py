"""Which sibling computes an op: an explicit ``backend=``, else the context, else cpu or ref, the first to accept it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from squamata.errors import SquamataError, nearest
from squamata.kernels.site import observed

BACKENDS = ("triton", "cpu", "ref")
UNASKED = ("cpu", "ref")  # in order of preference; ref accepts every call. Triton's are for who asks for them
_NEEDS = {"triton": "triton", "cpu": "numba"}
_chosen: ContextVar[str | None] = ContextVar("backend", default=None)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Prefer one backend within the block; calls it does not accept go to the reference.

    SquamataError for a name that no backend has, or one whose library is not installed.
    """
    if name is not None:
        check_backend(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_backend() -> str | None:
    """The backend that the surrounding ``use_backend`` prefers."""
    return _chosen.get()


@cache
def installed(backend: str) -> bool:
    """True if the library that a backend is written in is there."""
    needs = _NEEDS.get(backend)
    return needs is None or importlib.util.find_spec(needs) is not None


def check_backend(name: str) -> None:
    """SquamataError unless a backend that was asked for by name can be used at all."""
    if name not in BACKENDS:
        raise SquamataError(f"no backend named '{name}'{nearest(name, BACKENDS)}")
    if not installed(name):
        raise SquamataError(f"backend '{name}' needs the library '{_NEEDS[name]}', which is not installed: install it")


@cache
def sibling(package: str, backend: str) -> ModuleType | None:
    """The module that implements an op for a backend, or None if there is none or its library is missing."""
    if importlib.util.find_spec(f"{package}.{backend}") is None or not installed(backend):
        return None
    return importlib.import_module(f"{package}.{backend}")


def operation(contract: Callable[P, R]) -> Callable[P, R]:
    """Make a contract (signature and docstring, no body) call its siblings.

    A sibling module has ``run`` with the contract's signature and, except ref, ``accepts`` that says whether it can
    take these arguments. An explicit ``backend=`` raises SquamataError as ``use_backend`` does.
    """
    return _dispatched(contract, coarse=False)


def coarse_operation(contract: Callable[P, R]) -> Callable[P, R]:
    """The same for an op that is composed of others: with an observed site among its arguments it goes to the
    reference, because the others land on every site in turn and a fused sibling does not.
    """
    return _dispatched(contract, coarse=True)


def _dispatched(contract: Callable[P, R], coarse: bool) -> Callable[P, R]:
    package = contract.__module__

    @wraps(contract)
    def call(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        if backend is not None:
            check_backend(backend)
        wanted = backend or _chosen.get()
        if coarse and observed((*args, *kwargs.values())):
            wanted = "ref"
        for name in UNASKED if wanted is None else (wanted, "ref"):
            module = sibling(package, name)
            if module is not None and (name == "ref" or module.accepts(*args, **kwargs)):
                return module.run(*args, **kwargs)
        raise SquamataError(f"{package}: no backend accepts this call")

    return call  # type: ignore[return-value]
