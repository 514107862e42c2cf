"""Model: a language model with the verbs that a user calls on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from squamata.kernels.dispatch import chosen_backend
from squamata.kernels.site import Mode
from squamata.models.lm import Cache, LanguageModel
from squamata.run.decode_plan import Decoder, NotPlannableError
from squamata.run.generate import Generation, Piece, generate, generate_stream, sampling_options


class Model(LanguageModel):
    """What ``squamata.load`` returns: ``model(ids)`` for logits, ``model.generate(prompt)`` for text."""

    _decoder: Decoder | None = None
    _plannable = True

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence: ids (B,) -> logits (B, V); compiled into one call where that is possible."""
        decoder = self._compiled()
        return super().step(ids, cache) if decoder is None else decoder.step(ids, cache)

    def _compiled(self) -> Decoder | None:
        if chosen_backend() not in (None, "cpu") or not self._plannable:
            return None
        if self._decoder is None:
            try:
                self._decoder = Decoder(self)
            except NotPlannableError:
                self._plannable = False
        return self._decoder

    def set_mode(self, mode: Mode) -> None:
        super().set_mode(mode)
        self._decoder, self._plannable = None, True

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a prompt; ``options`` are the fields of ``SamplingOptions``."""
        return generate(self, prompt, **options)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """The same, token by token as they come."""
        return generate_stream(self, prompt, sampling_options(**options))
