"""Model: a language model with the verbs that a user calls on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from squamata.kernels.dispatch import chosen_backend
from squamata.kernels.site import Mode, Revision
from squamata.kernels.threads import alone, share_threads
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import Cache, LanguageModel
from squamata.run.decode_plan import Decoder, NotPlannableError
from squamata.run.generate import Generation, Piece, generate, generate_stream, sampling_options


class _Compiled:
    """A model's decoder, made for one revision of its sites; None where the sites cannot be planned.

    It is full of addresses, so a copy of the model, or one that another process unpickles, starts without.
    """

    def __init__(self) -> None:
        self.decoder: Decoder | None = None
        self._revision: int | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[_Compiled], tuple[()]]:
        return _Compiled, ()

    def of(self, model: LanguageModel, revision: int) -> Decoder | None:
        """The decoder of this revision, planned now if it is a new one."""
        with self._lock:
            if self._revision != revision:
                try:
                    self.decoder = Decoder(model)
                except NotPlannableError:
                    self.decoder = None
                self._revision = revision
            return self.decoder


class Model(LanguageModel):
    """What ``squamata.load`` returns: ``model(ids)`` for logits, ``model.generate(prompt)`` for text.

    Threads may share one, each with a cache of its own; it may be copied and pickled.
    """

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
        self._compiled = _Compiled()

    @property
    def _decoder(self) -> Decoder | None:
        """The newest decoder, if any."""
        return self._compiled.decoder

    def forward(self, ids: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        """As ``LanguageModel.forward``, on as many threads as torch has now."""
        share_threads()
        with alone():
            return super().forward(ids, cache, last_only)

    def __repr__(self) -> str:
        config, checkpoint = self.config, self.checkpoint
        where = "" if checkpoint.folder is None else f" {checkpoint.folder.name}"
        shape = f"{config.architecture}, {config.n_layers} layers, d_model {config.d_model}"
        return f"<Model{where}: {shape}, recipe {checkpoint.recipe.name}>"

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence: ids (B,) -> logits (B, V); compiled into one call where that is possible."""
        compiled = chosen_backend() in (None, "cpu")
        decoder = self._compiled.of(self, self._revision.number) if compiled else None
        return super().step(ids, cache) if decoder is None else decoder.step(ids, cache)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """Continue a prompt; ``options`` are the fields of ``SamplingOptions``, ``on_piece`` to see it come, and
        ``device`` (*cpu* or *cuda*)."""
        return generate(self, prompt, **options)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """The same, token by token as they come."""
        return generate_stream(self, prompt, sampling_options(**options))
