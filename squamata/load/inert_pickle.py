"""Read a ``torch.save`` file that holds more than tensors without running any code of it.

Training checkpoints pickle settings, enumerations and random states beside the weights. Here a name in the pickle
never becomes an import: tensors, ordered dictionaries and ``argparse.Namespace`` are built, and whatever else is named
becomes an ``Inert`` object, which takes every call and keeps nothing.
"""

from __future__ import annotations

import argparse
import pickle
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from squamata.errors import SquamataError
from squamata.load.tensor_files import damaged


class Inert:
    """What an unknown class becomes: whatever the pickle does with it has no effect."""

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None:
        """As of a list."""

    def extend(self, _values: Any) -> None:
        """As of a list."""


_BUILT: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _BUILT.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return Inert if found is None else found


_PICKLE = types.ModuleType("inert pickle")  # what torch.load asks of a pickle module
_PICKLE.Unpickler = _Unpickler  # type: ignore[attr-defined]


def read_inert(path: Path) -> Any:
    """The content of a zip file of ``torch.save``; tensors stay on disk until they are read."""
    try:
        if not zipfile.is_zipfile(path):
            raise SquamataError(
                f"{path}: not a file of torch.save since 2020 (a zip); save it again with a newer torch"
            )
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise SquamataError(f"{path}: refused, because it is a TorchScript program; give a checkpoint")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE, mmap=True)
    except SquamataError:
        raise
    except Exception as error:  # a hostile or damaged pickle can make the reader fail in any way
        raise damaged(path, error) from None
