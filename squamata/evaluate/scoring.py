"""Log-likelihood of continuations: what every task with given answers is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from squamata.errors import SquamataError
from squamata.evaluate.measure import HOST, measure
from squamata.evaluate.windows import Progress, Tokenizer, Window, batches
from squamata.text import read_rows

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


@dataclass(frozen=True)
class Score:
    """``nats``: -log p(continuation | context). ``greedy``: greedy decoding would have given every token of it."""

    nats: float
    greedy: bool


@dataclass(frozen=True)
class Request:
    """``ids`` of begin token, context and continuation; the last ``scored`` of them are the continuation."""

    ids: tuple[int, ...]
    scored: int


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokenize context and continuation as one text, the boundary where the context alone would end.

    Spaces at the end of the context count as part of the continuation, because byte-level tokens begin with them.
    """
    trimmed = context.rstrip()
    ids = tokenizer.encode(context + continuation)
    before = len(tokenizer.encode(trimmed))
    if before == 0:
        raise SquamataError("the tokenizer has no begin token, so a continuation of an empty context has no likelihood")
    if len(ids) <= before:
        raise SquamataError(f"the continuation '{continuation}' has no tokens of its own: give one that is not blank")
    return Request(tuple(ids), len(ids) - before)


def score(model: LanguageModel, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
    """Score every request, in the order given. Sequences run padded at their end, longest first."""
    windows = [Window(number, item.ids) for number, item in enumerate(requests)]
    scores: dict[int, Score] = {}
    vocabulary = model.config.vocab_size
    for batch in batches(windows, lambda length: HOST.rows(length, vocabulary), mixed_lengths=True):
        with torch.no_grad():
            logits = model(batch.ids).cpu()  # (B, L, V)
        for row, number in enumerate(batch.windows):
            end = windows[number].predicted
            answer = slice(end - requests[number].scored, end)
            scores[number] = _score_row(logits[row, answer], batch.targets[row, answer])
        if progress is not None:
            progress(len(scores), len(requests))
    return [scores[number] for number in range(len(requests))]


def _score_row(logits: torch.Tensor, targets: torch.Tensor) -> Score:
    nats = float(measure(logits, targets).nats.sum())
    return Score(nats, bool((logits.argmax(-1) == targets).all()))


def read_examples(path: str | Path, fields: dict[str, type], limit: int | None) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a task's JSONL file."""
    if limit is not None and limit < 1:
        raise SquamataError(f"limit must be at least 1, not {limit}")
    return read_rows(path, fields)[:limit]
