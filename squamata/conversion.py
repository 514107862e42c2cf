"""The other way in: a model of another layout becomes a checkpoint of ours, with the same numbers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squamata import __version__
from squamata.errors import SquamataError
from squamata.kernels.qtensor import Value
from squamata.load.hub import resolve
from squamata.load.quamba import is_quamba_checkpoint, read_quamba
from squamata.load.sentencepiece import find_sentencepiece_model, write_tokenizer
from squamata.load.source import Source, is_squamata_checkpoint, open_source
from squamata.memory import peak_rss_bytes
from squamata.models.config import ModelConfig
from squamata.save.format import describe
from squamata.save.write import CheckpointWriter, check_target
from squamata.spec.recipe import Recipe


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did. Sizes in bytes, time in seconds; ``tokenizer``: what became of it."""

    layout: str
    recipe: str
    architecture: str
    out: str
    bytes: int
    tokenizer: str
    seconds: float
    peak_rss_bytes: int


def convert(
    source: str | Path, out: str | Path, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> Conversion:
    """Write a model of another layout as a checkpoint of ours: the same numbers under our names, a layer at a time.

    ``source``: a float model (state-spaces, Hugging Face, NVIDIA's Megatron) or a checkpoint of Quamba's. What is float
    stays float, and ``quantize`` takes it. Raises SquamataError for anything the caller can put right.
    """
    started = time.perf_counter()
    folder = resolve(source)
    if is_squamata_checkpoint(folder):
        raise SquamataError(f"{folder}: is a Squamata checkpoint already: there is nothing to convert")
    check_target(Path(out), force)
    parts = _quamba_parts(folder) if is_quamba_checkpoint(folder) else _float_parts(open_source(source))
    layout, config, recipe, record, steps, tensors = parts
    with CheckpointWriter(Path(out), config, force) as writer, tempfile.TemporaryDirectory() as made:
        tokenizer_folder, tokenizer = _tokenizer_of(folder, Path(made))
        for done, some in enumerate(tensors, 1):
            writer.add(some)
            if progress:
                progress(done, steps)
        writer.publish(describe(config, recipe.to_mapping(), record), tokenizer_folder)
    seconds = time.perf_counter() - started
    peak = peak_rss_bytes()
    return Conversion(layout, recipe.name, config.architecture, str(out), writer.bytes, tokenizer, seconds, peak)


Parts = tuple[str, ModelConfig, Recipe, dict[str, Any], int, Iterator[Mapping[str, Value]]]


def _float_parts(opened: Source) -> Parts:
    """Layout, configuration, recipe, record, steps, and the tensors of each step."""
    layers = [f"layers.{layer}." for layer in range(opened.config.n_layers)]
    prefixes = ["embedding.", *layers, "final_norm.", "head."]
    record = {"squamata_version": __version__, "converted_from": opened.layout}
    tensors = (opened.tensors(prefix) for prefix in prefixes)
    return opened.layout, opened.config, Recipe.read("float"), record, len(prefixes), tensors


def _quamba_parts(folder: Path) -> Parts:
    checkpoint = read_quamba(folder)
    record = {"squamata_version": __version__} | checkpoint.provenance
    both = iter((checkpoint.tensors, checkpoint.site_tensors))
    return "Quamba", checkpoint.config, checkpoint.recipe, record, 2, both


def _tokenizer_of(folder: Path, made: Path) -> tuple[Path, str]:
    """The folder whose tokenizer the checkpoint gets, and a word on it; a SentencePiece model is converted."""
    if (folder / "tokenizer.json").is_file():
        return folder, "copied"
    model = find_sentencepiece_model(folder)
    if model is None:
        return folder, "none found"
    try:
        write_tokenizer(model, made)
    except SquamataError as problem:
        return folder, f"none: {problem}"
    return made, f"converted from {model.name}"
