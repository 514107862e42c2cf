"""The whole story on one screen: load -> transform -> observe -> quantize -> save, a layer at a time.

Memory is bounded by the embedding table, one layer, the calibration stream (samples x length x d_model x 8 bytes) and
one shard, however many layers the model has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from squamata import __version__, scales, transform
from squamata.calibrate import learn
from squamata.calibrate.observe import (
    Stream,
    attach,
    attach_grams,
    run_layer,
    scales_of,
    watch_head,
    watch_layer,
)
from squamata.calibrate.tokens import CalibrationSet, sample
from squamata.errors import SquamataError
from squamata.evaluate.perplexity import Evaluation
from squamata.evaluate.perplexity import evaluate as judge
from squamata.evaluate.windows import Corpus
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Mode, Site
from squamata.load.hub import resolve
from squamata.load.quamba import is_quamba_checkpoint, read_quamba
from squamata.load.random_model import random_tensors
from squamata.load.source import is_squamata_checkpoint, open_source
from squamata.load.tokenizer import Tokenizer, check_fits
from squamata.memory import peak_rss_bytes
from squamata.models.checkpoint import Checkpoint, under
from squamata.models.config import ModelConfig, shape
from squamata.models.lm import LanguageModel, build_block, head_site, model_layouts
from squamata.quantize import check as check_weight_quantizer
from squamata.quantize import needs_inputs, quantize_tensors
from squamata.run.device import check_device
from squamata.run.generate import generate
from squamata.run.model import Model
from squamata.save.format import describe
from squamata.save.read import read_checkpoint
from squamata.save.write import CheckpointWriter
from squamata.scales.gram import Gram
from squamata.scales.statistics import Statistics
from squamata.spec.quant import SITE_PARTS
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites

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
    resume: bool = False,
    progress: Progress | None = None,
    embedding: str | None = None,
    head: str | None = None,
    device: str = "cpu",
    recoverable: bool = True,
) -> Quantization:
    """Quantize a float checkpoint by a recipe and write the result to the folder ``out``.

    ``source``: a folder, a hub name or ``bundled``. ``calibration``: a .txt or .jsonl file, needed if the recipe has
    static activation scales or a weight quantizer that sees its inputs; ``samples`` documents of ``length`` tokens (the
    recipe's numbers unless given). ``resume``: go on after the last layer that a killed call with the same arguments
    finished. ``embedding``, ``head``: float, int8 or int4 for these two tables instead of what the recipe says.
    ``device``: where it is computed, ``cpu`` or ``cuda``. ``recoverable``: leave what ``resume`` needs after a layer.
    Raises SquamataError for anything the caller can put right; then nothing is written.
    """
    started = time.perf_counter()
    opened = open_source(source)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe = recipe.with_calibration(samples=samples, length=length).with_tables(embedding, head)
    check(recipe, opened.config)
    drawn = _draw(opened.folder, opened.config, recipe, calibration, seed)
    record = {"seed": seed, "squamata_version": __version__, "calibration": drawn.record() if drawn else {}}
    parts = QuantizedParts(opened, recipe, drawn.batches() if drawn else [], device)
    description = describe(parts.config, recipe.to_mapping(), record)
    work = hashlib.sha256(repr((description, opened.fingerprint(), device)).encode()).hexdigest()
    with CheckpointWriter(Path(out), opened.config, force, work=work, resume=resume) as writer:
        parts.restore(writer.parts.count, writer.parts.state())
        sizes = writer.parts.record.get("bytes_float", 0)
        for number in range(writer.parts.count, parts.count):
            tensors = parts.make(number)
            state = parts.streams() if recoverable else {}
            writer.add(tensors, state, {"bytes_float": sizes + parts.bytes_read})
            if progress:
                progress(number + 1, parts.count)
        writer.publish(description, opened.folder)
    return Quantization(
        recipe=recipe.name,
        architecture=parts.config.architecture,
        out=str(out),
        bytes_float=writer.parts.record["bytes_float"],
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
    elif is_quamba_checkpoint(folder):
        checkpoint = read_quamba(folder)
    else:
        source = open_source(path)
        checkpoint = Checkpoint(source.config, source.tensors(), Recipe.read("float"), folder=source.folder)
    tokenizer = Tokenizer.read(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None:
        check_fits(tokenizer, checkpoint.config)
    return Model(checkpoint, mode, tokenizer=tokenizer)


def evaluate(
    model: LanguageModel | str | Path,
    text: str | Path | Sequence[str] | Corpus,
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
    """The quantized model in parts, made in order: the embedding, every layer, then final norm and head.

    ``seen``: the calibration stream through the float model, which gives the sites' scales. ``rounded``: the same
    through the layers as they are quantized, which a weight quantizer that sees its inputs works with. Both, and one
    layer at a time, are on ``device``.
    """

    def __init__(self, source: TensorSource, recipe: Recipe, batches: list[Tensor], device: str = "cpu") -> None:
        self.source = source
        self.recipe = recipe
        check_device(device)
        self.device = torch.device(device)
        self.batches = [ids.to(self.device) for ids in batches]
        self.specs = recipe.resolve(source.config.blocks)
        self.sites = all_sites(source.config.blocks)
        differ = self.specs.get("head.weight") != self.specs.get("embedding.weight")
        self.shares_table = source.config.tie_embeddings
        tied = self.shares_table and not differ and not transform.unties(recipe)
        self.config = source.config.model_copy(update={"tie_embeddings": tied})
        self.layouts = model_layouts(source.config)
        self.bytes_read = 0
        self.seen: Stream = []
        self.rounded: Stream = []

    @property
    def count(self) -> int:
        return self.config.n_layers + 2

    def make(self, number: int) -> dict[str, Value]:
        """Part ``number``; all before it must have been made here, or restored."""
        if self.device.type == "cpu":
            return self._part(number)
        with self.device, use_backend("ref"):  # tensors are made there; the context costs every call a little
            return self._part(number)

    def _part(self, number: int) -> dict[str, Value]:
        if number == 0:
            return self._embedding()
        return self._layer(number - 1) if number <= self.config.n_layers else self._end()

    def each(self, progress: Progress | None = None) -> Iterator[dict[str, Value]]:
        """Every part in order."""
        for number in range(self.count):
            yield self.make(number)
            if progress:
                progress(number + 1, self.count)

    def streams(self) -> dict[str, Tensor]:
        """What the next part needs of those before it."""
        named = {"seen": self.seen, "rounded": self.rounded}
        return {f"{name}.{batch}": h for name, stream in named.items() for batch, h in enumerate(stream)}

    def restore(self, finished: int, streams: Mapping[str, Tensor]) -> None:
        """Go on after ``finished`` parts, with the streams that they left."""
        for name, stream in (("seen", self.seen), ("rounded", self.rounded)):
            inside = under(f"{name}.", streams) if finished else {}
            stream += [inside[str(batch)].to(self.device) for batch in range(len(inside))]

    def _embedding(self) -> dict[str, Value]:
        tensors = transform.apply_ends(self.recipe, self.config, self._read("embedding.weight"))
        quantized = self._quantize(tensors)
        if calibrated_sites(self.recipe, self.config):
            self.seen = [ops.embedding(ids, tensors["embedding.weight"], torch.float32) for ids in self.batches]
        if needs_inputs(self.recipe):
            self.rounded = [ops.embedding(ids, quantized["embedding.weight"], torch.float32) for ids in self.batches]
        return quantized

    def _layer(self, layer: int) -> dict[str, Value]:
        prefix = f"layers.{layer}."
        kind, read = self.config.blocks[layer], under(prefix, self._read(prefix))
        observed = self._observed(layer, read)
        tensors = transform.apply(self.recipe, self.config, kind, read, observed)
        maps = self._take_maps(prefix, tensors)
        scales_found: dict[str, Tensor] = {}
        if self.seen:
            block = build_block(self.config, layer, tensors, site_tensors=maps)
            statistics = attach(block.sites.values(), self.specs)
            entering = list(self.seen) if self.recipe.tune else []
            run_layer(block, self.seen)
            scales_found = scales_of(statistics, self.specs)
        grams = self._grams(layer, tensors)
        quantized = self._quantize({prefix + name: tensor for name, tensor in tensors.items()}, grams)
        if self.seen and self.recipe.tune:
            specs, start = under(prefix, self.specs), under(prefix, scales_found)
            student = build_block(self.config, layer, under(prefix, quantized), specs, start, "simulate")
            scales_found |= learn.tune(self.recipe, block, student, entering)
        if self.rounded:
            run_layer(build_block(self.config, layer, under(prefix, quantized)), self.rounded)
        return {**scales_found, **quantized}

    def _end(self) -> dict[str, Value]:
        tensors = self._read("final_norm.weight")
        if not self.config.tie_embeddings:
            name = "embedding.weight" if self.shares_table else "head.weight"
            tensors["head.weight"] = self._read(name, again=self.shares_table)[name]
        tensors = transform.apply_ends(self.recipe, self.config, tensors)
        site = head_site(self.config)
        statistics = attach([site], self.specs)
        watch_head(self.config, tensors["final_norm.weight"], self.seen, site)
        scales_found = scales_of(statistics, self.specs)
        grams: dict[str, Gram] = {}
        if "head.weight" in tensors:
            grams = self._watched_grams([site], tensors)
            watch_head(self.config, tensors["final_norm.weight"], self.rounded, site)
        return {**scales_found, **self._quantize(tensors, grams)}

    def _observed(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Statistics]:
        """What the recipe's transforms need to know of a layer as it is, by site (``mixer.u``)."""
        prefix = f"layers.{layer}."
        needed = transform.needs(self.recipe, self.config.blocks[layer])
        if not needed:
            return {}
        block = build_block(self.config, layer, tensors)
        wanted = {prefix + site: spec for site, spec in needed.items()}
        statistics = attach(block.sites.values(), wanted, transform.Observed)
        watch_layer(block, self.seen)
        return under(prefix, statistics)

    def _grams(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Gram]:
        """What the layer's weights multiply when all layers before it are quantized."""
        if not self.rounded:
            return {}
        block = build_block(self.config, layer, tensors)
        prefix = f"layers.{layer}."
        grams = self._watched_grams(block.sites.values(), {prefix + name: tensors[name] for name in tensors})
        watch_layer(block, self.rounded)
        return grams

    def _watched_grams(self, sites: Iterable[Site], tensors: Mapping[str, Tensor]) -> dict[str, Gram]:
        """Observers for the inputs of those of the weights that the recipe quantizes."""
        weights = [name for name in tensors if name in self.specs] if self.rounded else []
        return attach_grams(sites, {name: self._input_of(name) for name in weights})

    def _input_of(self, weight: str) -> str:
        """Full name of the site that a weight reads; empty if it reads none."""
        reads = self.sites[weight].reads
        return weight[: weight.index("mixer.")] + reads if reads.startswith("mixer.") else reads

    def _take_maps(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the index maps that transforms left out of the tensors; those of sites that the recipe makes ragged."""
        maps = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".index")}
        sites = {name: self.specs.get(prefix + name.removesuffix(".index")) for name in maps}
        return {name: maps[name] for name, spec in sites.items() if spec is not None and spec.granularity.ragged}

    def _read(self, prefix: str, again: bool = False) -> dict[str, Tensor]:
        with torch.device("cpu"):
            read = self.source.tensors(prefix)
        tensors = {name: tensor.to(self.device) for name, tensor in read.items()}
        self.bytes_read += 0 if again else sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _quantize(self, tensors: Mapping[str, Tensor], grams: Mapping[str, Gram] | None = None) -> dict[str, Value]:
        return quantize_tensors(self.recipe, tensors, self.specs, self.layouts, grams)


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
    parts = QuantizedParts(RandomSource(config), recipe, [ids])
    everything = {name: value for some in parts.each(progress) for name, value in some.items()}
    sites = {name: value for name, value in everything.items() if name.rpartition(".")[2] in SITE_PARTS}
    tensors = {name: value for name, value in everything.items() if name not in sites}
    site_tensors = {name: value for name, value in sites.items() if isinstance(value, Tensor)}
    return Model(Checkpoint(parts.config, tensors, recipe, site_tensors))


def calibrated_sites(recipe: Recipe, config: ModelConfig) -> list[str]:
    """Sites whose values must be seen beforehand: those with a static scale, and those that transforms look at."""
    looked_at = [
        f"layers.{layer}.{site}" for layer, kind in enumerate(config.blocks) for site in transform.needs(recipe, kind)
    ]
    return [*recipe.static_sites(config.blocks), *looked_at]


def _must_see(recipe: Recipe, config: ModelConfig) -> str:
    """The first thing that calibration text is needed for; empty if nothing is."""
    sites = calibrated_sites(recipe, config)
    if sites:
        return f"values at {sites[0]}"
    return f"the inputs of weights, for {recipe.weights.name}" if needs_inputs(recipe) else ""


def _draw(
    folder: Path, config: ModelConfig, recipe: Recipe, calibration: str | Path | None, seed: int
) -> CalibrationSet | None:
    """The calibration sample, or None for a recipe that needs none."""
    needed = _must_see(recipe, config)
    if not needed:
        return None
    if calibration is None:
        raise SquamataError(f"recipe {recipe.name} must see {needed} beforehand: give a text with --calibration FILE")
    tokenizer = Tokenizer.read(folder)
    check_fits(tokenizer, config)
    fingerprint = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return sample(Path(calibration), tokenizer, recipe.calibration, seed, fingerprint)
