"""Perplexity of a model on a text, and how far it is from another model: the numbers behind ``squamata evaluate``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from squamata.errors import SquamataError, nearest
from squamata.evaluate.measure import AtOnce, Measured, at_once, measure
from squamata.evaluate.positions import BLOCK, Cells, Span, cell_places, spans
from squamata.evaluate.result import Result
from squamata.evaluate.uncertainty import FEWEST_UNITS, Interval, ratio_interval
from squamata.evaluate.windows import Batch, Corpus, Progress, batches, corpus_of, tokenizer_of
from squamata.kernels.grid import seeded

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


@dataclass(frozen=True)
class UnitSums:
    """Sums over each resampling unit, float64 (n,): a document, or a window if the text has few documents."""

    kind: str  # documents | windows
    tokens: np.ndarray
    nats: np.ndarray
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation(Result):
    """A model on a text: ``perplexity`` and ``nats_per_token`` are of a token, ``bits_per_byte`` of a UTF-8 byte.

    ``kl`` (nats a token, KL(reference || model)) and ``top1_agreement`` are None without a reference. ``*_ci``:
    bootstrap 95 % intervals over documents, or over windows if there are fewer than six; None for a single unit.
    ``by_position``: the same by distance from the start of a window.
    """

    perplexity: float
    perplexity_ci: Interval | None
    bits_per_byte: float
    nats_per_token: float
    tokens: int
    kl: float | None
    kl_ci: Interval | None
    top1_agreement: float | None
    top1_agreement_ci: Interval | None
    mode: str
    window: int
    seconds: float
    documents: int
    by_position: tuple[Span, ...]
    sums: UnitSums = field(repr=False, compare=False)


def evaluate(
    model: LanguageModel,
    text: str | Path | Sequence[str] | Corpus,
    against: LanguageModel | None = None,
    window: int = 2048,
    max_tokens: int | None = None,
    mode: str = "parallel",
    batch: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a model on a text: a ``.txt`` or ``.jsonl`` file, a list of documents, or a corpus that is ``cut`` already.

    Windows of ``window`` tokens do not overlap, and each starts from a fresh state. ``mode``: ``parallel`` runs a
    window in one forward pass, ``recurrent`` token by token through the (quantized) state. ``batch``: windows side by
    side; by default as many as memory for their logits allows. The reference runs in the same mode. SquamataError for
    a bad file, a text of fewer than two tokens, models of different vocabularies, and logits that are not finite.
    A state that is rounded stochastically is judged with torch's generator at seed 0, which is put back afterwards.
    """
    runner = _runner(mode, model.config.vocab_size, batch, at_once(model))
    if against is not None and against.config.vocab_size != model.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {against.config.vocab_size}"
        raise SquamataError(f"the two models have vocabularies of {sizes} tokens: compare models that share one")
    started = time.perf_counter()
    corpus = text if isinstance(text, Corpus) else corpus_of(text, tokenizer_of(model), window, max_tokens)
    if corpus.text_bytes <= 0:
        raise SquamataError(f"the {corpus.tokens} tokens to judge by spell not one whole character: judge more of them")
    with seeded(0):
        cells = _cells(corpus, _measurements(corpus, model, against, runner, progress))
    return _summarize(corpus, cells, mode, window, time.perf_counter() - started)


@dataclass(frozen=True)
class _Runner:
    """How a mode gets logits: pieces (B, l, V) of consecutive positions, in batches of so many rows."""

    pieces: Callable[[LanguageModel, torch.Tensor], Iterator[torch.Tensor]]
    rows: Callable[[int], int]
    mixed_lengths: bool


def _runner(mode: str, vocabulary: int, batch: int | None, some: AtOnce) -> _Runner:
    if batch is not None and batch < 1:
        raise SquamataError(f"batch must be at least 1, not {batch}")
    if mode == "parallel":
        return _Runner(_one_pass, lambda length: batch or some.rows(length, vocabulary), mixed_lengths=False)
    if mode == "recurrent":
        stepping = partial(_step_by_step, steps=some.steps)
        return _Runner(stepping, lambda length: batch or some.sequences, mixed_lengths=True)
    raise SquamataError(f"no evaluation mode '{mode}'{nearest(mode, ('parallel', 'recurrent'))}")


def _one_pass(model: LanguageModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    yield model(ids)


def _step_by_step(model: LanguageModel, ids: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    cache = model.new_cache(batch=len(ids))
    for positions in ids.split(steps, dim=1):
        yield torch.stack([model.step(column, cache) for column in positions.unbind(1)], dim=1)


def _measurements(
    corpus: Corpus, model: LanguageModel, against: LanguageModel | None, runner: _Runner, progress: Progress | None
) -> Iterator[tuple[torch.Tensor, Measured]]:
    """For every piece of logits: the cell (n,) of each predicted token, and its measures."""
    first = torch.from_numpy(cell_places([window.predicted for window in corpus.windows])[0])
    done = 0
    for batch in batches(corpus.windows, runner.rows, runner.mixed_lengths):
        position = 0
        with torch.no_grad():
            references = runner.pieces(against, batch.ids) if against is not None else None
            for logits in runner.pieces(model, batch.ids):
                reference = next(references) if references is not None else None
                here = slice(position, position + logits.shape[1])
                yield _measure_piece(batch, first[list(batch.windows)], here, logits, reference)
                position = here.stop
        done += batch.predicted
        if progress is not None:
            progress(done, corpus.tokens)


def _measure_piece(
    batch: Batch, first: torch.Tensor, here: slice, logits: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, Measured]:
    mask = batch.mask[:, here]
    cells = (first[:, None] + torch.arange(here.start, here.stop) // BLOCK)[mask]
    kept_reference = None if reference is None else _kept(reference, mask)
    measured = measure(_kept(logits, mask), batch.targets[:, here][mask].to(logits.device), kept_reference)
    return cells, measured


def _kept(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, V), no copy when nothing is padding."""
    return logits.flatten(0, 1) if mask.all() else logits[mask.to(logits.device)]


def _cells(corpus: Corpus, measurements: Iterator[tuple[torch.Tensor, Measured]]) -> Cells:
    _, window, block = cell_places([each.predicted for each in corpus.windows])
    totals = torch.zeros(4, len(window), dtype=torch.float64)  # tokens, nats, kl, agrees
    compared = False
    for cells, measured in measurements:
        compared = measured.kl is not None
        columns = (torch.ones_like(measured.nats), measured.nats, measured.kl, measured.agrees)
        for total, values in zip(totals, columns, strict=True):
            if values is not None:
                total.index_add_(0, cells, values.cpu())
    tokens, nats, kl, agrees = totals.numpy()
    return Cells(window, block, tokens, nats, kl if compared else None, agrees if compared else None)


def _unit_sums(corpus: Corpus, cells: Cells) -> UnitSums:
    kind, unit = "windows", cells.window
    if corpus.documents >= FEWEST_UNITS:
        kind = "documents"
        documents = np.array([window.document for window in corpus.windows])
        unit = np.unique(documents, return_inverse=True)[1][cells.window]
    columns = (cells.tokens, cells.nats, cells.kl, cells.agrees)
    tokens, nats, kl, agrees = (None if sums is None else np.bincount(unit, sums) for sums in columns)
    assert tokens is not None and nats is not None
    return UnitSums(kind, tokens, nats, kl, agrees)


def _summarize(corpus: Corpus, cells: Cells, mode: str, window: int, seconds: float) -> Evaluation:
    sums = _unit_sums(corpus, cells)
    nats_per_token = float(sums.nats.sum() / corpus.tokens)
    nats_ci = ratio_interval(sums.nats, sums.tokens)
    kl, kl_ci = _mean_and_interval(sums.kl, sums.tokens)
    agreement, agreement_ci = _mean_and_interval(sums.agrees, sums.tokens)
    return Evaluation(
        perplexity=_exp(nats_per_token),
        perplexity_ci=None if nats_ci is None else (_exp(nats_ci[0]), _exp(nats_ci[1])),
        bits_per_byte=float(sums.nats.sum()) / math.log(2) / corpus.text_bytes,
        nats_per_token=nats_per_token,
        tokens=corpus.tokens,
        kl=kl,
        kl_ci=kl_ci,
        top1_agreement=agreement,
        top1_agreement_ci=agreement_ci,
        mode=mode,
        window=window,
        seconds=seconds,
        documents=corpus.documents,
        by_position=spans(cells),
        sums=sums,
    )


def _exp(nats_per_token: float) -> float:
    """Perplexity. SquamataError beyond what a float can hold: no text, only a broken model, is that surprising."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        raise SquamataError(
            f"the model loses {nats_per_token:.0f} nats a token, too many for a perplexity: it is damaged"
        ) from None


def _mean_and_interval(sums: np.ndarray | None, tokens: np.ndarray) -> tuple[float | None, Interval | None]:
    if sums is None:
        return None, None
    return float(sums.sum() / tokens.sum()), ratio_interval(sums, tokens)


@dataclass(frozen=True)
class PairedDifference:
    """How many nats a token (of the text, or of KL) the second model has more than the first, on the same text."""

    nats_per_token: float
    ci: Interval | None
    verdict: str  # better | worse | not significant: the second model, beside the first

    @property
    def perplexity_ratio(self) -> float:
        return math.exp(self.nats_per_token)


def paired_difference(first: Evaluation, second: Evaluation) -> PairedDifference:
    """The second model's nats a token minus the first's, resampling the same units of both.

    Not significant if the 95 % interval holds zero, or if there are fewer than six units. SquamataError if the two
    were not judged on the same units.
    """
    return difference_of_sums(first.sums, second.sums)


def difference_of_sums(first: UnitSums, second: UnitSums, measure: Literal["nats", "kl"] = "nats") -> PairedDifference:
    """The same of the sums that evaluations keep; ``measure`` may be ``kl`` where both were judged beside a model."""
    if not np.array_equal(first.tokens, second.tokens) or first.kind != second.kind:
        raise SquamataError("the two evaluations are of different texts or windows: judge both models on the same ones")
    one, other = getattr(first, measure), getattr(second, measure)
    if one is None or other is None:
        raise SquamataError("the two evaluations have no KL to compare: judge both models --against a third")
    interval = ratio_interval(other - one, first.tokens)
    if interval is None or len(first.tokens) < FEWEST_UNITS or interval[0] <= 0 <= interval[1]:
        verdict = "not significant"
    else:
        verdict = "worse" if interval[0] > 0 else "better"
    return PairedDifference(float((other - one).sum() / first.tokens.sum()), interval, verdict)
