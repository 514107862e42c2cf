"""The whole story on one screen: load -> transform -> observe -> quantize -> save, a layer at a time.

Memory is bounded by the embedding table, one layer, the calibration stream (samples x length x d_model x 8 bytes) and
one shard, however many layers the model has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from squamata import __version__, scales, transform
from squamata.calibrate import learn
from squamata.calibrate.observe import Stream, attach, observe_head, run_layer, scales_of, watch_layer
from squamata.calibrate.tokens import CalibrationSet, sample
from squamata.errors import SquamataError
from squamata.evaluate.perplexity import Evaluation
from squamata.evaluate.perplexity import evaluate as judge
from squamata.kernels import ops
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Mode
from squamata.load.hub import resolve
from squamata.load.random_model import random_tensors
from squamata.load.source import is_squamata_checkpoint, open_source
from squamata.load.tokenizer import Tokenizer, check_fits
from squamata.memory import peak_rss_bytes
from squamata.models.checkpoint import Checkpoint, under
from squamata.models.config import ModelConfig, shape
from squamata.models.lm import LanguageModel, build_block, model_layouts
from squamata.quantize import check as check_weight_quantizer
from squamata.quantize import quantize_tensors
from squamata.run.generate import generate
from squamata.run.model import Model
from squamata.save.format import describe
from squamata.save.read import read_checkpoint
from squamata.save.write import CheckpointWriter
from squamata.scales.statistics import Statistics
from squamata.spec.recipe import Recipe

__all__ = ["Quantization", "evaluate", "generate", "load", "quantize"]

Progress = Callable[[int, int], None]  # steps done, steps in all


class TensorSource(Protocol):
    """Float tensors under our names, read a layer at a time."""

    @property
    def config(self) -> ModelConfig: ...

    def tensors(self, prefix: str = "") -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Quantization:
    """What ``quantize`` did. Sizes in bytes, time in seconds."""

    recipe: str
    architecture: str
    out: str
    bytes_float: int
    bytes_quantized: int
    seconds: float
    peak_rss_bytes: int
    calibration: dict[str, Any] = field(default_factory=dict)


def quantize(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantization:
    """Quantize a float checkpoint by a recipe and write the result to the folder ``out``.

    ``source``: a folder, a hub name or ``bundled``. ``calibration``: a .txt or .jsonl file, needed if the recipe has
    static activation scales; ``samples`` documents of ``length`` tokens (the recipe's numbers unless given).
    Raises SquamataError for anything the caller can put right; then nothing is written.
    """
    started = time.perf_counter()
    opened = open_source(source)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe = recipe.with_calibration(samples=samples, length=length)
    check(recipe, opened.config)
    with CheckpointWriter(Path(out), opened.config, force) as writer:
        drawn = _draw(opened.folder, opened.config, recipe, calibration, seed)
        parts = QuantizedParts(opened, recipe, drawn.batches() if drawn else [])
        for tensors in parts.each(progress):
            writer.add(tensors)
        record = {"seed": seed, "squamata_version": __version__, "calibration": drawn.record() if drawn else {}}
        writer.publish(describe(parts.config, recipe.to_mapping(), record), opened.folder)
    return Quantization(
        recipe=recipe.name,
        architecture=parts.config.architecture,
        out=str(out),
        bytes_float=parts.bytes_read,
        bytes_quantized=writer.bytes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        calibration=drawn.record() if drawn else {},
    )


def load(path: str | Path, mode: Mode = "integer") -> Model:
    """Load any checkpoint, float or quantized: ``model(ids)`` with ids int64 (B, L) gives logits (B, L, V)."""
    folder = resolve(path)
    if is_squamata_checkpoint(folder):
        checkpoint = read_checkpoint(folder)
    else:
        source = open_source(path)
        checkpoint = Checkpoint(source.config, source.tensors(), Recipe.read("float"), folder=source.folder)
    tokenizer = Tokenizer.read(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None:
        check_fits(tokenizer, checkpoint.config)
    return Model(checkpoint, mode, tokenizer=tokenizer)


def evaluate(
    model: LanguageModel | str | Path,
    text: str | Path | Sequence[str],
    against: LanguageModel | str | Path | None = None,
    window: int = 2048,
    max_tokens: int | None = None,
    mode: str = "parallel",
    batch: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a model, or the checkpoint at a path, on a text: see ``squamata.evaluate.perplexity.evaluate``."""
    first = load(model) if isinstance(model, str | Path) else model
    second = load(against) if isinstance(against, str | Path) else against
    return judge(first, text, second, window, max_tokens, mode, batch, progress)


def check(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse a recipe that cannot be carried out on this model, before any work is done."""
    for kind in set(config.blocks) - set(recipe.architectures):
        raise SquamataError(f"recipe {recipe.name} is for {', '.join(recipe.architectures)}, not {kind}")
    for site, spec in recipe.resolve(config.blocks).items():
        scales.check(spec, site)
    transform.check(recipe)
    check_weight_quantizer(recipe)
    learn.check(recipe)


class QuantizedParts:
    """The quantized model as it becomes ready: embedding, every layer, head. ``each`` walks once."""

    def __init__(self, source: TensorSource, recipe: Recipe, batches: list[Tensor]) -> None:
        self.source = source
        self.recipe = recipe
        self.batches = batches
        self.specs = recipe.resolve(source.config.blocks)
        untie = self.specs.get("head.weight") != self.specs.get("embedding.weight")
        tied = source.config.tie_embeddings and not untie
        self.config = source.config.model_copy(update={"tie_embeddings": tied})
        self.layouts = model_layouts(source.config)
        self.bytes_read = 0

    def each(self, progress: Progress | None = None) -> Iterator[Mapping[str, Value]]:
        steps = self.config.n_layers + 1
        embedding = self._read("embedding.weight")
        table = embedding["embedding.weight"]
        yield self._quantize(embedding)
        stream: Stream = [(ops.embedding(ids, table, torch.float32), None) for ids in self.batches]
        for layer in range(self.config.n_layers):
            yield from self._layer(layer, stream)
            if progress:
                progress(layer + 1, steps)
        final = self._read("final_norm.weight")
        yield final
        yield observe_head(self.config, final["final_norm.weight"], stream, self.specs)
        if not self.config.tie_embeddings:
            stored = self._read("head.weight")
            yield self._quantize(stored or {"head.weight": table})
        if progress:
            progress(steps, steps)

    def _layer(self, layer: int, stream: Stream) -> Iterator[Mapping[str, Value]]:
        prefix = f"layers.{layer}."
        kind, read = self.config.blocks[layer], under(prefix, self._read(prefix))
        observed = self._observed(layer, read, stream)
        tensors = transform.apply(self.recipe, self.config, kind, read, observed)
        maps = self._take_maps(prefix, tensors)
        quantized = self._quantize({prefix + name: tensor for name, tensor in tensors.items()})
        if stream:
            block = build_block(self.config, layer, tensors, site_tensors=maps)
            statistics = attach(block.sites.values(), self.specs)
            entering = list(stream) if self.recipe.tune else []
            run_layer(block, stream)
            found = scales_of(statistics, self.specs)
            if entering:
                parts = (under(prefix, part) for part in (quantized, self.specs, found))
                found |= learn.tune(self.recipe, block, build_block(self.config, layer, *parts, "simulate"), entering)
            yield found
        yield quantized

    def _observed(self, layer: int, tensors: Mapping[str, Tensor], stream: Stream) -> dict[str, Statistics]:
        """What the recipe's transforms need to know of a layer as it is, by site (``mixer.u``)."""
        prefix = f"layers.{layer}."
        needed = transform.needs(self.recipe, self.config.blocks[layer])
        if not needed:
            return {}
        block = build_block(self.config, layer, tensors)
        statistics = attach(block.sites.values(), {prefix + site: spec for site, spec in needed.items()})
        watch_layer(block, stream)
        return under(prefix, statistics)

    def _take_maps(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the index maps that transforms left out of the tensors; those of sites that the recipe makes ragged."""
        maps = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".index")}
        sites = {name: self.specs.get(prefix + name.removesuffix(".index")) for name in maps}
        return {name: maps[name] for name, spec in sites.items() if spec is not None and spec.granularity.ragged}

    def _read(self, prefix: str) -> dict[str, Tensor]:
        tensors = self.source.tensors(prefix)
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _quantize(self, tensors: Mapping[str, Tensor]) -> dict[str, Value]:
        return quantize_tensors(self.recipe, tensors, self.specs, self.layouts)


@dataclass(frozen=True)
class RandomSource:
    """Random float tensors of a shape, made a layer at a time."""

    config: ModelConfig

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        return random_tensors(self.config, prefix=prefix)


def random_model(shape_name: str, recipe_name: str, progress: Progress | None = None) -> Model:
    """A published shape with random weights, quantized in memory with scales from 2 x 64 random tokens."""
    config, recipe = shape(shape_name), Recipe.read(recipe_name)
    check(recipe, config)
    ids = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    parts = QuantizedParts(RandomSource(config), recipe, [ids] if calibrated_sites(recipe, config) else [])
    everything = {name: value for some in parts.each(progress) for name, value in some.items()}
    sites = {name: value for name, value in everything.items() if name.endswith((".scale", ".zero", ".index"))}
    tensors = {name: value for name, value in everything.items() if name not in sites}
    site_tensors = {name: value for name, value in sites.items() if isinstance(value, Tensor)}
    return Model(Checkpoint(parts.config, tensors, recipe, site_tensors))


def calibrated_sites(recipe: Recipe, config: ModelConfig) -> list[str]:
    """Sites whose values must be seen beforehand: those with a static scale, and those that transforms look at."""
    looked_at = [
        f"layers.{layer}.{site}" for layer, kind in enumerate(config.blocks) for site in transform.needs(recipe, kind)
    ]
    return [*recipe.static_sites(config.blocks), *looked_at]


def _draw(
    folder: Path, config: ModelConfig, recipe: Recipe, calibration: str | Path | None, seed: int
) -> CalibrationSet | None:
    """The calibration sample, or None for a recipe that needs none."""
    needed = calibrated_sites(recipe, config)
    if not needed:
        return None
    if calibration is None:
        raise SquamataError(
            f"recipe {recipe.name} must see values beforehand ({needed[0]} ...): give a text with --calibration FILE"
        )
    tokenizer = Tokenizer.read(folder)
    check_fits(tokenizer, config)
    fingerprint = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return sample(Path(calibration), tokenizer, recipe.calibration, seed, fingerprint)
