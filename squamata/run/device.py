"""A model on a GPU, in the form in which generation and chat use one."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.models.lm import Cache, LanguageModel

DEVICES = ("cpu", "cuda")


def check_device(device: str) -> None:
    """SquamataError unless models can run there."""
    if device not in DEVICES:
        raise SquamataError(f"no device '{device}': give one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SquamataError("device cuda: torch sees no GPU here; use --device cpu")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise SquamataError(
            "device cuda: the GPU kernels need the library 'triton', which is not installed: install it"
        )


class DeviceModel:
    """One or more sequences on a GPU, with what ``generate`` and ``Chat`` ask of a model.

    It holds one state: a new cache ends the one before. ``options``: of ``CapturedDecoder``. SquamataError without a
    GPU, or for a recipe that the fused kernels do not take.
    """

    def __init__(self, model: LanguageModel, batch: int = 1, device: str = "cuda", **options: Any) -> None:
        from squamata.run.graphs import CapturedDecoder

        self.config, self.tokenizer, self.checkpoint = model.config, model.tokenizer, model.checkpoint
        self.decoder = CapturedDecoder(model, batch, device, **options)
        self._cache: Cache = []

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model, pickled or not, is without its twin and makes one of its own."""
        return type(None), ()

    def new_cache(self, batch: int = 1) -> Cache:
        """Forget everything; the cache itself is empty, the state stays on the device."""
        if batch != self.decoder.batch:
            raise SquamataError(f"this model was put on the device for {self.decoder.batch} sequences, not {batch}")
        self.decoder.reset()
        self._cache = []
        return self._cache

    def forward(self, ids: Tensor, cache: Cache, last_only: bool = True) -> Tensor:
        """Token ids (B, L) -> logits (B, 1, V) of the last token, on the device."""
        self._check(cache)
        if not last_only:
            raise SquamataError("a model on the GPU gives the logits of the last token only: run on the CPU for all")
        return self.decoder.prefill(ids)[:, None]

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence: ids (B,) -> logits (B, V), on the device, until the next call."""
        self._check(cache)
        return self.decoder.step(ids)

    def _check(self, cache: Cache) -> None:
        if cache is not self._cache:
            raise SquamataError("a newer conversation has taken this one's place on the GPU: start again")


def on_device(model: LanguageModel, device: str) -> LanguageModel | DeviceModel:
    """The model itself for *cpu*; for *cuda* its twin on the GPU, made once and kept with it."""
    check_device(device)
    if device == "cpu":
        return model
    twin = getattr(model, "device_twin", None)
    if not isinstance(twin, DeviceModel):
        twin = DeviceModel(model, device=device)
        model.device_twin = twin  # type: ignore[attr-defined]
    return twin
