"""Source: a foreign float checkpoint under our names, checked when it is opened and read a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch

from squamata.errors import SquamataError
from squamata.load.hub import resolve
from squamata.load.layouts import foreign_name, foreign_shape, normalise, read_own_config
from squamata.load.megatron import MegatronFile, find_megatron_file, megatron_config, megatron_name
from squamata.load.quamba import is_quamba_checkpoint
from squamata.load.tensor_files import TensorFile, find_tensors, read_json
from squamata.models.config import ModelConfig, parameter_shapes

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS_AT_A_TIME = 2**24


class TensorSource(Protocol):
    """Float tensors under our names, read a layer at a time."""

    @property
    def config(self) -> ModelConfig: ...

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Place:
    """Where one of our tensors is: the file, and its name there."""

    file: TensorFile
    name: str


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its configuration, and its tensors under the names of ``parameter_shapes``.

    No tensor is read until it is asked for, so a large model can be read a layer at a time.
    """

    folder: Path
    config: ModelConfig
    places: Mapping[str, Place]
    layout: str = ""

    def names(self) -> list[str]:
        """Our names of all tensors, in file order of our own format."""
        return list(self.places)

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, size in bytes and time of change (ns) of every file: equal if nobody has touched the checkpoint, from
        whatever folder and through whatever link it is named.
        """
        named = {place.file.path for place in self.places.values()} | {self.folder / "config.json"}
        files = sorted(path.resolve() for path in named)
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Tensors whose name starts with ``prefix`` (``layers.7.``), shapes as ``parameter_shapes``, dtypes as stored.

        They may be views of the mapped file: read them, copy them, do not write into them. SquamataError if a file
        has become unreadable or a tensor holds NaN or infinity or is not a float.
        """
        wanted: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            if name.startswith(prefix):
                wanted.setdefault(place.file.path, []).append(name)
        found: dict[str, torch.Tensor] = {}
        for names in wanted.values():
            file = self.places[names[0]].file
            stored = file.read(self.places[name].name for name in names)
            found |= {name: self._checked(name, stored[self.places[name].name]) for name in names}
        return {name: found[name] for name in self.places if name in found}

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        place = self.places[name]
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SquamataError(f"{place.file.path}: tensor '{place.name}' is {kind}; give a float checkpoint")
        parts = tensor.flatten().split(_ELEMENTS_AT_A_TIME)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise SquamataError(f"{place.file.path}: tensor '{place.name}' holds NaN or infinity")
        return tensor.squeeze(1) if name.endswith("conv.weight") and tensor.ndim == 3 else tensor


def is_squamata_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of our own format (which the ``save`` room reads)."""
    path = folder / "config.json"
    return path.is_file() and "squamata_format" in read_json(path)


def open_source(path_or_name: str | Path) -> Source:
    """Open a float checkpoint in any known layout and check it without reading tensor data.

    ``path_or_name``: a folder, a hub name ``owner/name``, or ``bundled``. The layouts: state-spaces, Hugging Face,
    Megatron's, and our own where nothing is quantized. SquamataError names the first file or tensor that is missing,
    superfluous, misshapen or damaged, or the option that is not supported.
    """
    folder = resolve(path_or_name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        return _open_megatron(folder)
    if is_squamata_checkpoint(folder):
        config, files = read_own_config(config_file), find_tensors(folder)
        return Source(folder, config, _match(folder, config, files, lambda name: name, own=True), "Squamata")
    if is_quamba_checkpoint(folder):
        raise SquamataError(
            f"{folder}: is a Quamba checkpoint, quantized already; give the float model it was made from"
        )
    described = read_json(config_file)
    config = normalise(described, str(config_file))
    files = find_tensors(folder)
    config = _settle_head(config, files)
    places = _match(folder, config, files, lambda name: foreign_name(name, config, files))
    return Source(folder, config, places, "state-spaces" if "d_model" in described else "Hugging Face")


def _open_megatron(folder: Path) -> Source:
    path = find_megatron_file(folder)
    if path is None:
        raise SquamataError(f"{folder}: no config.json, so this is not a model folder")
    file = MegatronFile(path)
    config, files = megatron_config(file), dict.fromkeys(file.shapes(), cast(TensorFile, file))
    held = file.shapes()
    return Source(folder, config, _match(folder, config, files, lambda name: megatron_name(name, held)), "Megatron")


def _settle_head(config: ModelConfig, files: dict[str, TensorFile]) -> ModelConfig:
    """A stored head of a tied model is left out if it repeats the embedding, and otherwise unties it."""
    head = files.get("lm_head.weight")
    if head is None or not config.tie_embeddings:
        return config
    name = foreign_name("embedding.weight", config, files)
    if name not in files or _same(files[name], name, head, "lm_head.weight"):
        del files["lm_head.weight"]
        return config
    return config.model_copy(update={"tie_embeddings": False})


def _same(file: TensorFile, name: str, other_file: TensorFile, other_name: str) -> bool:
    if file.shapes()[name] != other_file.shapes()[other_name]:
        return False
    return torch.equal(file.read([name])[name], other_file.read([other_name])[other_name])


def _match(
    folder: Path, config: ModelConfig, files: dict[str, TensorFile], named: Callable[[str], str], own: bool = False
) -> dict[str, Place]:
    """Pair our tensors with those of the files; SquamataError at the first that is missing, misshapen or extra.

    ``named``: the name in the files of one of ours. ``own``: shapes are ours too.
    """
    shapes = {file.path: file.shapes() for file in set(files.values())}
    asks = "config.json" if (folder / "config.json").is_file() else "the rest of the file"
    places: dict[str, Place] = {}
    for name, shape in parameter_shapes(config).items():
        theirs, expected = named(name), shape if own else foreign_shape(name, shape)
        if theirs not in files:
            raise SquamataError(f"{folder}: tensor '{theirs}' is missing from the weights ({asks} asks for it)")
        stored = shapes[files[theirs].path][theirs]
        if stored != expected:
            sizes = f"has shape {list(stored)}, {asks} asks for {list(expected)}"
            raise SquamataError(f"{files[theirs].path}: tensor '{theirs}' {sizes}")
        places[name] = Place(files[theirs], theirs)
    extra = sorted(files.keys() - {place.name for place in places.values()})
    if extra:
        raise SquamataError(f"{files[extra[0]].path}: tensor '{extra[0]}' has no place in a model of this {asks}")
    return places
