"""A float model whose logits are kept, because every row of a study and every toggled site is judged beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from squamata.evaluate.measure import at_once
from squamata.evaluate.windows import Corpus, corpus_of, tokenizer_of
from squamata.load.source import open_source
from squamata.models.config import parameter_shapes
from squamata.models.lm import Cache, LanguageModel
from squamata.report.verbs import Verbs
from squamata.run.simulated import placed
from squamata.text import read_documents

CHARACTERS_A_TOKEN = 40  # a document is cut to this many a token that is wanted, before it is tokenised


class Remembering:
    """Stands for a model in ``evaluate(..., against=...)``: a batch that was seen before is not computed again.

    Logits are kept as they are (float32), the first ``budget`` bytes of them: of whole windows, and of single steps by
    all the tokens before them. What is not kept any more is computed, a step by stepping through its tokens again.
    """

    def __init__(self, model: LanguageModel, budget: int | None = None) -> None:
        self._model = model
        self._left = at_once(model).kept if budget is None else budget
        self._kept: dict[str, Tensor] = {}
        self.computed = 0

    def __call__(self, ids: Tensor) -> Tensor:
        return self._recall(_Past(ids.shape[0]).after(ids), lambda: self._model(ids))

    def new_cache(self, batch: int = 1) -> Any:
        return _Past(batch)

    def step(self, ids: Tensor, cache: _Past) -> Tensor:
        return self._recall(cache.after(ids), lambda: cache.catch_up(self._model))

    def _recall(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self.computed += 1
            logits = compute()
            if logits.nbytes > self._left:
                return logits
            self._left -= logits.nbytes
            self._kept[key] = logits
        return self._kept[key]

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


class _Past:
    """The tokens that some sequences have taken in, and the model's cache of as many of them as it has seen."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._digest = hashlib.sha256()
        self._unseen: list[Tensor] = []
        self._cache: Cache | None = None

    def after(self, ids: Tensor) -> str:
        """Take in tokens (B,) or (B, L); a name for all that were taken in, in whatever shapes."""
        self._unseen.append(ids)
        self._digest.update(f"{tuple(ids.shape)}".encode() + ids.contiguous().numpy().tobytes())
        return self._digest.hexdigest()

    def catch_up(self, model: LanguageModel) -> Tensor:
        """Logits (B, V) after the last token; the model steps through those that it has not seen."""
        cache = self._cache = self._cache or model.new_cache(self._batch)
        *before, last = self._unseen
        self._unseen = []
        for ids in before:
            model.step(ids, cache)
        return model.step(last, cache)


class References:
    """The float models of a worker: the last one used, with its logits and the texts as it reads them."""

    def __init__(self) -> None:
        self._place: tuple[str, str] | None = None
        self._model: LanguageModel | None = None
        self._corpora: dict[tuple[str, int, int | None], Corpus] = {}

    def get(self, path: str, verbs: Verbs, device: str = "cpu") -> LanguageModel:
        if self._place != (path, device) or self._model is None:
            self._model = None  # before the next is read
            self._corpora = {}
            self._model = remembering(placed(verbs.load(path), device))
            self._place = (path, device)
        return self._model

    def corpus(self, text: str, window: int, max_tokens: int | None) -> Corpus:
        """The beginning of a text, cut for the last model used."""
        assert self._model is not None
        key = (text, window, max_tokens)
        if key not in self._corpora:
            tokenizer = tokenizer_of(self._model)
            self._corpora[key] = corpus_of(beginning(text, max_tokens), tokenizer, window, max_tokens)
        return self._corpora[key]


def remembering(model: LanguageModel) -> LanguageModel:
    """The model, its logits kept; it only looks like one, so it is for ``against=`` alone."""
    return cast(LanguageModel, Remembering(model))


def parameter_count(path: str) -> int:
    """Parameters of the float model at this path; what transforms add and a tied head are not counted."""
    return sum(map(prod, parameter_shapes(open_source(path).config).values()))


def beginning(text: str | Path | Sequence[str], max_tokens: int | None) -> list[str]:
    """The documents of a text, without what ``max_tokens`` cannot reach: long documents are slow to tokenise."""
    documents = read_documents(text) if isinstance(text, str | Path) else list(text)
    if max_tokens is None:
        return documents
    return [document[: (max_tokens + 1) * CHARACTERS_A_TOKEN] for document in documents]
