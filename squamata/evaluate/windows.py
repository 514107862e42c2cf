"""Cutting documents into windows so that every token is predicted exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from squamata.errors import SquamataError
from squamata.text import read_documents

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel

Progress = Callable[[int, int], None]  # (done, in all)

_PADDING = 0  # any valid id: what follows a row's end cannot reach back in a causal model


class Tokenizer(Protocol):
    """What judging needs of a tokenizer. ``begin_id``: put before a document, None if there is no such token."""

    begin_id: int | None

    def encode(self, text: str, begin: bool = True) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class Window:
    """``ids[0]`` is context, every later id is predicted once; ``document`` counts from 0."""

    document: int
    ids: tuple[int, ...]

    @property
    def predicted(self) -> int:
        return len(self.ids) - 1


@dataclass(frozen=True)
class Batch:
    """Windows side by side: ``ids`` and ``targets`` int64 (B, L), ``mask`` bool (B, L) false at padding."""

    windows: tuple[int, ...]  # rows: places in the list of windows
    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor

    @property
    def predicted(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class Corpus:
    """A text cut into windows, with the UTF-8 bytes that the predicted tokens spell."""

    windows: tuple[Window, ...]
    documents: int
    text_bytes: int

    @property
    def tokens(self) -> int:
        return sum(window.predicted for window in self.windows)


def tokenizer_of(model: LanguageModel) -> Tokenizer:
    """The model's tokenizer; SquamataError if it has none."""
    if model.tokenizer is None:
        raise SquamataError("the model has no tokenizer, so it cannot read text: add tokenizer.json to its folder")
    tokenizer: Tokenizer = model.tokenizer
    return tokenizer


def cut(documents: Sequence[str], tokenizer: Tokenizer, window: int, max_tokens: int | None = None) -> Corpus:
    """Tokenize the documents and cut each into windows that predict at most ``window`` tokens.

    A document starts with the tokenizer's begin token (without one, its own first token is context only); a later
    window of a document starts with the last token of the window before. A model sees at most ``window`` tokens at
    once, from a fresh state. ``max_tokens`` keeps the first so many predicted tokens of all.
    SquamataError if fewer than two tokens are predicted.
    """
    if window < 1:
        raise SquamataError(f"a window must hold at least 1 token, not {window}")
    if max_tokens is not None and max_tokens < 2:
        raise SquamataError(f"max-tokens must be at least 2, not {max_tokens}")
    windows: list[Window] = []
    used = text_bytes = kept = 0
    for number, document in enumerate(documents):
        if kept == max_tokens:
            break
        ids = tokenizer.encode(document)
        whole = len(ids)
        ids = ids if max_tokens is None else ids[: max_tokens - kept + 1]
        if len(ids) < 2:
            continue
        windows += windows_of(number, ids, window)
        text_bytes += _spelled_bytes(document, ids, tokenizer, whole=len(ids) == whole)
        kept += len(ids) - 1
        used += 1
    if kept < 2:
        raise SquamataError("the text is shorter than 2 tokens, too short to judge a model by: give a longer one")
    return Corpus(tuple(windows), used, text_bytes)


def windows_of(document: int, ids: Sequence[int], window: int) -> list[Window]:
    """One document's tokens: every one but the first is predicted once, at most ``window`` of them together."""
    return [Window(document, tuple(ids[at : at + window + 1])) for at in range(0, len(ids) - 1, window)]


def corpus_of(
    text: str | Path | Sequence[str], tokenizer: Tokenizer, window: int, max_tokens: int | None = None
) -> Corpus:
    """A ``.txt`` or ``.jsonl`` file, or documents, ``cut``."""
    documents = read_documents(text) if isinstance(text, str | Path) else text
    return cut(documents, tokenizer, window, max_tokens)


def batches(windows: Sequence[Window], rows: Callable[[int], int], mixed_lengths: bool) -> Iterator[Batch]:
    """Group windows, longest first; ``rows`` says how many of a length may share a batch.

    ``mixed_lengths`` pads shorter windows at their end; otherwise only windows of equal length share a batch.
    """
    order = sorted(range(len(windows)), key=lambda place: -windows[place].predicted)
    start = 0
    while start < len(order):
        longest = windows[order[start]].predicted
        group = order[start : start + rows(longest)]
        if not mixed_lengths:
            group = [place for place in group if windows[place].predicted == longest]
        yield _batch(group, windows)
        start += len(group)


def _batch(group: Sequence[int], windows: Sequence[Window]) -> Batch:
    longest = windows[group[0]].predicted
    padded = [windows[place].ids + (_PADDING,) * (longest - windows[place].predicted) for place in group]
    lengths = torch.tensor([windows[place].predicted for place in group])
    ids = torch.tensor(padded, dtype=torch.int64)  # (B, L + 1)
    mask = torch.arange(longest) < lengths[:, None]
    return Batch(tuple(group), ids[:, :-1], ids[:, 1:], mask)


def _spelled_bytes(document: str, ids: Sequence[int], tokenizer: Tokenizer, whole: bool) -> int:
    """UTF-8 bytes of the predicted tokens; a character that the cut leaves incomplete is not counted."""
    has_begin = tokenizer.begin_id is not None
    context = "" if has_begin else tokenizer.decode(ids[:1])
    spelled = document if whole else tokenizer.decode(ids[has_begin:]).rstrip("\N{REPLACEMENT CHARACTER}")
    return len(spelled.encode()) - len(context.encode())
