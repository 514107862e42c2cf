"""A conversation with a base language model: one document that both sides write, with the state kept between turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from squamata.errors import SquamataError
from squamata.run.generate import continue_stream, prompt_ids, sampling_options
from squamata.run.sampling import Sampler

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


class Chat:
    """Keeps the state between turns, so a turn costs its own tokens and not the whole conversation again.

    ``options``: the fields of ``SamplingOptions``, ``max_new_tokens`` for each turn. ``tokens``: how many the state
    has taken in, or will with the next turn.
    """

    def __init__(self, model: LanguageModel, **options: Any) -> None:
        self.model = model
        self.options = sampling_options(**options)
        self.reset()

    def reset(self) -> None:
        """Forget everything: a fresh state and the seed's first draw."""
        self._cache = self.model.new_cache(batch=1)
        self._sampler = Sampler(self.options)
        self._pending: list[int] = []  # the last token generated, which the state has not taken in
        self.tokens = 0

    def say(self, text: str) -> Iterator[str]:
        """Write ``text`` into the document and stream the model's continuation.

        A reply that is not read to its end is as long as what was read. An end-of-text token ends the reply but is no
        part of the document, which goes on. An empty text lets the model go on; SquamataError if there is nothing to
        go on from.
        """
        ids = self._pending + self._turn_ids(text)
        if not ids:
            raise SquamataError("nothing to say: give some text")
        return self._reply(ids)

    def _turn_ids(self, text: str) -> list[int]:
        if self.tokens == 0:
            return prompt_ids(self.model, text)
        if self.model.tokenizer is None:
            raise SquamataError("the model has no tokenizer, so it cannot chat: add tokenizer.json to its folder")
        ids: list[int] = self.model.tokenizer.encode(text, begin=False)
        return ids

    def _reply(self, ids: list[int]) -> Iterator[str]:
        self.tokens += len(ids) - len(self._pending)
        for piece in continue_stream(self.model, ids, self._cache, self._sampler):
            self._pending = [] if piece.stopped_by == "eos" else [piece.id]
            self.tokens += len(self._pending)
            yield piece.text
