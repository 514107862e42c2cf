"""A float model whose logits are kept, because every row of a study and every toggled site is judged beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor

from squamata.models.lm import LanguageModel
from squamata.report.verbs import Verbs
from squamata.text import read_documents

KEPT_BYTES = 2**30
CHARACTERS_A_TOKEN = 40  # a document is cut to this many a token that is wanted, before it is tokenised


class Remembering:
    """Stands for a model in ``evaluate(..., against=...)``: a batch that was seen before is not computed again.

    Logits are kept as they are (float32), the first ``budget`` bytes of them. Everything but whole windows, recurrent
    decoding above all, goes to the model itself.
    """

    def __init__(self, model: LanguageModel, budget: int = KEPT_BYTES) -> None:
        self._model = model
        self._left = budget
        self._kept: dict[str, Tensor] = {}
        self.computed = 0

    def __call__(self, ids: Tensor) -> Tensor:
        key = hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.contiguous().numpy().tobytes()).hexdigest()
        if key not in self._kept:
            self.computed += 1
            logits = self._model(ids)
            if logits.nbytes > self._left:
                return logits
            self._left -= logits.nbytes
            self._kept[key] = logits
        return self._kept[key]

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


class References:
    """The float models of a worker: the last one used, with its logits."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._model: LanguageModel | None = None

    def get(self, path: str, verbs: Verbs) -> LanguageModel:
        if self._path != path or self._model is None:
            self._model = None  # before the next is read
            self._model = remembering(verbs.load(path))
            self._path = path
        return self._model


def remembering(model: LanguageModel) -> LanguageModel:
    """The model, its logits kept; it only looks like one, so it is for ``against=`` alone."""
    return cast(LanguageModel, Remembering(model))


def beginning(text: str | Path | Sequence[str], max_tokens: int | None) -> list[str]:
    """The documents of a text, without what ``max_tokens`` cannot reach: long documents are slow to tokenise."""
    documents = read_documents(text) if isinstance(text, str | Path) else list(text)
    if max_tokens is None:
        return documents
    return [document[: (max_tokens + 1) * CHARACTERS_A_TOKEN] for document in documents]
