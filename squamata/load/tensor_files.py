"""Tensors in files: names and shapes first, data only when asked for, and never code from a pickle."""

from __future__ import annotations

import json
import pickle
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from squamata.errors import SquamataError

_INDEXED = (("model.safetensors", "safetensors"), ("pytorch_model.bin", "pickle"))


class TensorFile(Protocol):
    """One file of named tensors."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, read without the tensors' data; SquamataError if the file is damaged."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, in the dtype of the file."""
        ...


class SafetensorsFile:
    """A ``.safetensors`` file. Tensors are views of the mapped file, so a shard is not read as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(self.path, error) from None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(self.path, error) from None


class PickleFile:
    """A ``pytorch_model.bin``: its pickle may build tensors and containers and nothing else.

    A zip is mapped anew at every ``read``, so that what was read before goes when its tensors go; an older form, which
    has to be read as a whole, is read once and kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, torch.Tensor] | None = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, checked to be plain ones."""
        content = unpickle(self.path)
        if not isinstance(content, Mapping):
            raise SquamataError(f"{self.path}: holds a {type(content).__name__}, not named tensors")
        for name, tensor in content.items():
            if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided):
                raise SquamataError(f"{self.path}: '{name}' is not a plain tensor; expected named tensors only")
        return dict(content)

    def _loaded(self) -> dict[str, torch.Tensor]:
        if self._kept is not None:
            return self._kept
        tensors = self._tensors()
        if not zipfile.is_zipfile(self.path):
            self._kept = tensors
        return tensors

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._loaded().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = self._loaded()
        try:
            return {name: tensors[name].detach().contiguous() for name in names}
        except KeyError as error:
            raise SquamataError(f"{self.path}: tensor {error} is gone; the file was changed meanwhile") from None


def unpickle(path: Path) -> Any:
    """``torch.load`` limited to tensors, numbers and containers; the data of a zip (since 2020) stay on disk."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise SquamataError(
            f"{path}: refused, because it holds more than tensors (reading it would run code) or is damaged; "
            f"use a safetensors file instead"
        ) from None
    except Exception as error:  # a hostile or damaged pickle can make the reader fail in any way
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> SquamataError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    reason = textwrap.shorten(first, 120, placeholder=" ...")
    return SquamataError(f"{path}: truncated or damaged ({reason}); copy or download it again")


def find_tensors(folder: Path) -> dict[str, TensorFile]:
    """Name -> file of every tensor of a checkpoint folder: safetensors before pickle, sharded before single.

    Every file is opened and its names and shapes are read, but no tensor. SquamataError names the first problem.
    """
    for name, kind in _INDEXED:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(index, kind)
        if (folder / name).is_file():
            file = _file(folder / name, kind)
            return dict.fromkeys(file.shapes(), file)
    raise SquamataError(f"{folder}: no weights; expected {' or '.join(name for name, _ in _INDEXED)} or their shards")


def _file(path: Path, kind: str) -> TensorFile:
    return SafetensorsFile(path) if kind == "safetensors" else PickleFile(path)


def _sharded(index: Path, kind: str) -> dict[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise SquamataError(f"{index}: has no 'weight_map' from tensor names to files")
    files: dict[str, TensorFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise SquamataError(f"{path}: this shard is missing, though {index.name} lists it")
        files[shard] = _file(path, kind)
        held = files[shard].shapes()
        absent = next((name for name, place in weight_map.items() if place == shard and name not in held), None)
        if absent is not None:
            raise SquamataError(f"{path}: tensor '{absent}' is missing, though {index.name} lists it there")
    return {name: files[shard] for name, shard in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; SquamataError in one line otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SquamataError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise SquamataError(f"{path}: not a readable JSON file ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise SquamataError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
