"""What logits say about tokens: nats, divergence from a reference, and agreement with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squamata.errors import SquamataError

_SOFTMAX_AT_ONCE = 2**21  # 8 MiB of log-probabilities at a time


@dataclass(frozen=True)
class AtOnce:
    """How much of a model runs at once where it lives. ``logits``: float32 numbers of a forward pass; ``sequences``
    that step side by side; ``steps`` whose logits are measured together; ``kept``: bytes of a reference's logits."""

    logits: int = 2**25
    sequences: int = 32
    steps: int = 1
    kept: int = 2**30

    def rows(self, length: int, vocabulary: int) -> int:
        """How many sequences of this length keep their logits (B, L, V) within the memory set aside for them."""
        return max(1, self.logits // (length * vocabulary))


HOST, ACCELERATOR = AtOnce(), AtOnce(logits=2**27, sequences=256, steps=16, kept=2**32)


def at_once(model: object) -> AtOnce:
    """What suits the place where a model lives: the host's memory, unless it says that its device is another."""
    device: torch.device | None = getattr(model, "device", None)
    return HOST if device is None or device.type == "cpu" else ACCELERATOR


@dataclass(frozen=True)
class Measured:
    """Per token, float64 (n,): nats of the target; with a reference KL(reference || model) and 1.0 where they agree."""

    nats: torch.Tensor
    kl: torch.Tensor | None = None
    agrees: torch.Tensor | None = None


def measure(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None) -> Measured:
    """Measure logits (n, V) on targets int64 (n,), beside the logits of a reference model (n, V).

    Log-softmax is taken in float32 (float64 for float64 logits), a few rows at a time. SquamataError if the logits
    give a token no finite likelihood, or there is no finite KL between the two.
    """
    rows = max(1, _SOFTMAX_AT_ONCE // logits.shape[-1])
    references = [None] * len(targets) if reference is None else reference.split(rows)
    parts = [
        _measure_rows(some, some_targets, some_reference)
        for some, some_targets, some_reference in zip(
            logits.split(rows), targets.split(rows), references, strict=reference is not None
        )
    ]
    nats, kl, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    if not torch.isfinite(nats).all():
        raise SquamataError("the model gives logits that are not finite: its weights or scales are damaged")
    if reference is None:
        return Measured(nats)
    if not torch.isfinite(kl).all():
        raise SquamataError("KL is not finite: the reference, or this model, gives logits that are not")
    return Measured(nats, kl, agrees)


def _measure_rows(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_q = _log_softmax(logits)  # (n, V)
    nats = -log_q.gather(-1, targets[:, None])[:, 0].double()
    if reference is None:
        return nats, nats, nats
    log_p = _log_softmax(reference)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    return nats, kl, (logits.argmax(-1) == reference.argmax(-1)).double()


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
