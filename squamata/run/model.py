"""Model: a language model with the verbs that a user calls on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.dispatch import chosen_backend
from squamata.kernels.site import Mode, Revision
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import Cache, LanguageModel
from squamata.run.decode_plan import Decoder, NotPlannableError
from squamata.run.generate import Generation, Piece, generate, generate_stream, refuse_outside, sampling_options


class Model(LanguageModel):
    """What ``squamata.load`` returns: ``model(ids)`` for logits, ``model.generate(prompt)`` for text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        mode: Mode = "integer",
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(checkpoint, mode, dtype, tokenizer)
        self._revision = Revision()
        for site in self.sites():
            site.revision = self._revision
        self._planned: int | None = None  # the revision that the decoder is of
        self._decoder: Decoder | None = None

    def __repr__(self) -> str:
        config, checkpoint = self.config, self.checkpoint
        where = "" if checkpoint.folder is None else f" {checkpoint.folder.name}"
        shape = f"{config.architecture}, {config.n_layers} layers, d_model {config.d_model}"
        return f"<Model{where}: {shape}, recipe {checkpoint.recipe.name}>"

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids int64 (B, L) -> logits float32 (B, L, V) from a fresh state; SquamataError for other ids."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise SquamataError(f"token ids are an int64 tensor (B, L) with at least one token each, not {found}")
        refuse_outside((int(id) for id in ids.aminmax()), self.config.vocab_size)
        return super().__call__(ids)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence: ids (B,) -> logits (B, V); compiled into one call where that is possible."""
        decoder = self._compiled()
        return super().step(ids, cache) if decoder is None else decoder.step(ids, cache)

    def _compiled(self) -> Decoder | None:
        """The decoder for the sites as they are now; None for one that composes the ops."""
        if chosen_backend() not in (None, "cpu"):
            return None
        if self._planned != self._revision.number:
            self._planned = self._revision.number
            try:
                self._decoder = Decoder(self)
            except NotPlannableError:
                self._decoder = None
        return self._decoder

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a prompt; ``options`` are the fields of ``SamplingOptions``, ``on_piece`` to see it come, and
        ``device`` (*cpu* or *cuda*)."""
        return generate(self, prompt, **options)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """The same, token by token as they come."""
        return generate_stream(self, prompt, sampling_options(**options))
