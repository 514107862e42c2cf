"""A model on any torch device, every quantized site simulated: what a laboratory needs of a GPU.

Simulation is the definition that the integer kernels are tested against, and it knows every number format; so a study
on a GPU does not wait for kernels. It is plain torch: fast with many sequences at once, and, where a token's launches
would take longer than their work, replayed as one captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor
from squamata.models.block import ScanCache
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import Cache, LanguageModel
from squamata.run.device import check_device


class SimulatedModel(LanguageModel):
    """A language model in mode *simulate* on ``device`` (*cpu*, *cuda*: the current GPU), by the reference kernels.

    Token ids may come from anywhere, logits (float32) stay on the device. Stepping captures a graph for the newest
    cache; stepping another one captures it anew.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cuda", tokenizer: Any = None) -> None:
        check_device(device)
        self.device = torch.device(device)
        self._captured: _CapturedStep | None = None
        with self._placed():
            super().__init__(checkpoint.on(self.device), "simulate", tokenizer=tokenizer)

    @classmethod
    def of(cls, model: LanguageModel, device: str = "cuda") -> SimulatedModel:
        """The twin of a model that lives on the CPU."""
        return cls(model.checkpoint, device, model.tokenizer)

    def _placed(self) -> AbstractContextManager[object]:
        """Within it tensors are made on the device; what only computes runs outside: it costs every call a little."""
        return nullcontext() if self.device.type == "cpu" else self.device

    def new_cache(self, batch: int = 1) -> Cache:
        with self._placed():
            for site in self.sites():  # made here once, not while a graph is captured
                if site.quantized and site.spec is not None and not site.spec.dynamic:
                    site.expanded()
            return super().new_cache(batch)

    def forward(self, ids: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        with use_backend("ref"):
            return super().forward(ids.to(self.device), cache, last_only)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        if self.device.type != "cuda":
            return super().step(ids, cache)
        if self._captured is None or self._captured.cache is not cache:
            self._captured = None  # its memory goes before the next is made
            self._captured = _CapturedStep(super().step, ids.to(self.device), cache)
        return self._captured(ids)


class _CapturedStep:
    """One step of a cache as a CUDA graph."""

    def __init__(self, step: Callable[[Tensor, Cache], Tensor], ids: Tensor, cache: Cache) -> None:
        from squamata.run.graphs import captured  # needs triton

        self.cache = cache
        self.ids = ids.clone()
        before = [part.clone() for part in _parts(cache)]

        @torch.no_grad()
        def run() -> None:
            self.logits = step(self.ids, cache)

        self.replay = captured(run, ids.device)
        for part, value in zip(_parts(cache), before, strict=True):
            part.copy_(value)

    def __call__(self, ids: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.replay()
        return self.logits.clone()


def _parts(cache: Cache) -> Iterator[Tensor]:
    """Every tensor that a step may change."""
    for layer in cast(list[ScanCache], cache):
        for value in (layer.conv, layer.state):
            if isinstance(value, QTensor):
                yield from (part for part in (value.data, value.scale, value.second) if part is not None)
            else:
                yield value


def placed(model: LanguageModel, device: str) -> LanguageModel:
    """The model itself for *cpu*; for *cuda* its simulated twin there."""
    check_device(device)
    return model if device == "cpu" else SimulatedModel.of(model, device)


def described(device: str) -> dict[str, str]:
    """What a measurement says of where it was made, and by which arithmetic."""
    if device == "cpu":
        return {"device": "cpu", "arithmetic": "integer"}
    return {"device": torch.cuda.get_device_name(), "arithmetic": "simulated"}


def share_devices(device: str, number: int) -> None:
    """Make this process, one of several with consecutive numbers, run on its share of the GPUs: one in turn."""
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
