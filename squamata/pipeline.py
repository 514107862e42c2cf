"""What users call: quantize, load, evaluate. ``parts.py`` is how a model is quantized, a layer at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch

from squamata import __version__, scales, transform
from squamata.calibrate import whole
from squamata.calibrate.correct import check_correction
from squamata.calibrate.tokens import CalibrationSet, sample
from squamata.errors import SquamataError
from squamata.evaluate.perplexity import Evaluation
from squamata.evaluate.perplexity import evaluate as judge
from squamata.evaluate.windows import Corpus
from squamata.kernels.site import Mode
from squamata.load.hub import calibration_of, resolve
from squamata.load.quamba import is_quamba_checkpoint, read_quamba
from squamata.load.random_model import RandomSource
from squamata.load.source import is_squamata_checkpoint, open_source
from squamata.load.tokenizer import Tokenizer, check_fits
from squamata.memory import peak_rss_bytes
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig, shape
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts, calibrated_sites
from squamata.quantize import check as check_weight_quantizer
from squamata.quantize import needs_gradients, needs_inputs
from squamata.run.device import DeviceModel
from squamata.run.generate import Generation, Piece
from squamata.run.generate import generate as continued
from squamata.run.model import Model
from squamata.save.format import describe
from squamata.save.read import read_checkpoint
from squamata.save.write import CheckpointWriter, check_target
from squamata.spec.recipe import Recipe

__all__ = ["Quantization", "evaluate", "generate", "load", "quantize"]

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Quantization:
    """What ``quantize`` did. Sizes in bytes, time in seconds; ``parts_resumed``: how many of embedding, layers and head
    a killed call had finished.
    """

    recipe: str
    architecture: str
    out: str
    bytes_float: int
    bytes_quantized: int
    seconds: float
    peak_rss_bytes: int
    calibration: dict[str, Any] = field(default_factory=dict)
    parts_resumed: int = 0


def quantize(
    source: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    calibration: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    force: bool = False,
    resume: bool | None = None,
    progress: Progress | None = None,
    embedding: str | None = None,
    head: str | None = None,
    device: str = "cpu",
    recoverable: bool = True,
) -> Quantization:
    """Quantize a float checkpoint by a recipe and write the result to the folder ``out``.

    ``source``: a folder, a hub name or ``bundled``. ``calibration``: a .txt or .jsonl file, needed if the recipe has
    static activation scales or a weight quantizer that sees inputs or gradients (``bundled`` has a text of its own);
    ``samples`` documents of ``length`` tokens are drawn with ``seed`` (the recipe's numbers unless given). ``force``:
    replace a checkpoint that is at ``out``. ``resume``: what becomes of the layers that a killed call for the same
    ``out`` finished. True: go on after them, if its arguments were the same (so is the result, byte for byte); False:
    throw them away; None: refuse, so that they are not lost. ``embedding``, ``head``: float, int8 or int4 for these two
    tables, not what the recipe says. ``device``: where it is computed, *cpu* or *cuda*. ``recoverable``: leave what
    ``resume`` needs after a layer. ``progress`` is told after every step how many are done, and of how many.
    SquamataError for anything the caller can put right; then ``out`` is as it was.
    """
    started = time.perf_counter()
    check_target(out := Path(out), force, resume)
    opened = open_source(source)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe = recipe.with_calibration(samples=samples, length=length).with_tables(embedding, head)
    check(recipe, opened.config)
    _check_resume(recipe, opened.config, resume)
    drawn = _draw(opened.folder, opened.config, recipe, calibration_of(source, calibration), seed)
    seen = drawn.record() if drawn else {}
    record = {"seed": seed, "squamata_version": __version__, "calibration": seen}
    parts = QuantizedParts(opened, recipe, drawn.batches() if drawn else [], device, progress)
    description = describe(parts.config, recipe.to_mapping(), record)
    work = hashlib.sha256(repr((description, opened.fingerprint(), device)).encode()).hexdigest()
    with CheckpointWriter(out, opened.config, force, work=work, resume=resume) as writer:
        parts.restore(resumed := writer.parts.count, writer.parts.state())
        sizes = writer.parts.record.get("bytes_float", 0)
        for number in range(resumed, parts.count):
            tensors = parts.make(number)
            writer.add(tensors, parts.streams() if recoverable else None, {"bytes_float": sizes + parts.bytes_read})
            parts.tell(number + 1)
        writer.publish(description, opened.folder)
    return Quantization(
        recipe=recipe.name,
        architecture=parts.config.architecture,
        out=str(out),
        bytes_float=writer.parts.record["bytes_float"],
        bytes_quantized=writer.bytes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        calibration=seen,
        parts_resumed=resumed,
    )


def load(path: str | Path, mode: Mode = "integer") -> Model:
    """Load any checkpoint, float or quantized: ``model(ids)`` with ids int64 (B, L) gives logits float32 (B, L, V).

    ``path``: a folder, a hub name or ``bundled``. ``mode``: *integer*, the kernels; *simulate*, the same numbers
    rounded in float; *float*, nothing rounded at the sites; *observe*, statistics taken. SquamataError names the first
    thing that is wrong with the files.
    """
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
    """Judge a model, or the checkpoint at a path, on a text: perplexity, bits per byte, and beside another model KL and
    top-1 agreement, with 95 % intervals over documents.

    ``text``: a .txt or .jsonl file, or a list of documents, of which the first ``max_tokens`` tokens are read in
    windows of ``window``, each from a fresh state: in one pass (``mode`` *parallel*) or token by token (*recurrent*).
    ``batch``: windows at a time, as many as memory allows unless given. SquamataError for what cannot be judged.
    """
    second = None if against is None else _loaded(against)
    return judge(_loaded(model), text, second, window, max_tokens, mode, batch, progress)


def generate(
    model: LanguageModel | DeviceModel | str | Path,
    prompt: str | Sequence[int],
    on_piece: Callable[[Piece], None] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Generation:
    """Continue a prompt (text, or token ids used as they are) by a model, or by the checkpoint at a path.

    ``on_piece`` is called with every piece of text as it comes. ``device``: *cpu* or *cuda*. ``options``:
    ``max_new_tokens`` 128, ``temperature`` 0 (the likeliest token), ``top_k`` 0 and ``top_p`` 1 (from all),
    ``repetition_penalty`` 1 (none), ``seed`` 0, ``stop`` (), a tuple of strings before which the text ends.
    """
    return continued(_loaded(model), prompt, on_piece, device, **options)


@overload
def _loaded(model: LanguageModel | str | Path) -> LanguageModel: ...


@overload
def _loaded(model: LanguageModel | DeviceModel | str | Path) -> LanguageModel | DeviceModel: ...


def _loaded(model: LanguageModel | DeviceModel | str | Path) -> LanguageModel | DeviceModel:
    return load(model) if isinstance(model, str | Path) else model


def check(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse a recipe that cannot be carried out on this model, before any work is done."""
    recipe.check_architectures(config.blocks)
    specs = recipe.resolve(config.blocks)
    for site, spec in specs.items():
        scales.check(spec, site)
    transform.check(recipe, specs.values())
    check_weight_quantizer(recipe, specs.values())
    check_correction(recipe)
    whole.check(recipe, config)


def _check_resume(recipe: Recipe, config: ModelConfig, resume: bool | None) -> None:
    if resume and (what := whole.needed(recipe, recipe.resolve(config.blocks))):
        raise SquamataError(f"{what} needs the whole model, so nothing is left to resume from: leave --resume out")


def random_model(shape_name: str, recipe: str | Recipe, progress: Progress | None = None) -> Model:
    """A published shape with random weights, quantized in memory with scales from 2 x 64 random tokens."""
    config, recipe = shape(shape_name), recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    check(recipe, config)
    ids = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    parts = QuantizedParts(RandomSource(config), recipe, [ids], progress=progress)
    return Model(Checkpoint.of_parts(parts.config, recipe, parts.each()))


def _must_see(recipe: Recipe, config: ModelConfig) -> str:
    """The first thing that calibration text is needed for; empty if nothing is."""
    sites = calibrated_sites(recipe, config)
    if sites:
        return f"values at {sites[0]}"
    if recipe.correct is not None:
        return f"every layer's output, for {recipe.correct.name}"
    if needs_gradients(recipe):
        return f"gradients of weights, for {recipe.weights.name}"
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
