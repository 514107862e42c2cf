"""Squamata: quantize Mamba-family language models, run them fast on any machine, and study what that costs.

``squamata.quantize``, ``squamata.load``, ``squamata.evaluate`` and ``squamata.generate`` are the verbs of the command
line with the same names and defaults; each is also the name of a room (a subpackage), so the package keeps those
names for the functions, and what is in a room is imported as ``from squamata.load.hub import resolve``. The verbs are
imported on first use: ``squamata.kernels`` needs torch and pydantic only.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_VERBS = ("quantize", "load", "evaluate", "generate", "convert")


class _Package(ModuleType):
    """Keeps the verbs' names for functions: importing a room of the same name does not take them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'squamata' has no attribute '{name}'")
    from squamata import conversion, pipeline

    return getattr(conversion if name == "convert" else pipeline, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS})


sys.modules[__name__].__class__ = _Package
