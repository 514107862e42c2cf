"""Choosing the next token: greedy, or drawn from the (trimmed) distribution, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from squamata.errors import SquamataError


@dataclass(frozen=True)
class SamplingOptions:
    """How text is generated. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 trim nothing;
    ``repetition_penalty`` 1 punishes nothing. Generation ends after ``max_new_tokens``, at the end-of-text token, or
    before the first of the ``stop`` strings.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max-new-tokens must be at least 1", self.max_new_tokens),
            (0 <= self.temperature < math.inf, "temperature must be 0 (greedy) or more", self.temperature),
            (self.top_k >= 0, "top-k must be 0 (off) or more", self.top_k),
            (0 < self.top_p <= 1, "top-p must be above 0 and at most 1", self.top_p),
            (0 < self.repetition_penalty < math.inf, "repetition-penalty must be above 0", self.repetition_penalty),
            (0 <= self.seed < 2**63, "seed must be 0 or more and below 2**63", self.seed),
            (not isinstance(self.stop, str), "stop must be a tuple of strings", self.stop),
            (all(self.stop), "a stop string must not be empty", self.stop),
        )
        for holds, message, value in checks:
            if not holds:
                raise SquamataError(f"{message}, not {value!r}")


class Sampler:
    """Picks token ids from logits. It remembers the ids it has seen for the repetition penalty."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._generator = torch.Generator().manual_seed(options.seed)
        self._seen: set[int] = set()

    def see(self, ids: Iterable[int]) -> None:
        """Count ids, of the prompt for one, as used before."""
        self._seen.update(ids)

    def pick(self, logits: torch.Tensor) -> int:
        """The next id from logits float (V,). SquamataError if they hold NaN or infinity."""
        options = self.options
        logits = logits.detach().float()
        if options.temperature != 0 or options.repetition_penalty != 1:
            logits = logits.cpu()  # the likeliest token is found where the logits are
        if not math.isfinite(logits.max().item()):
            raise SquamataError("the model gives logits that are not finite: its weights or scales are damaged")
        logits = penalize(logits, sorted(self._seen), options.repetition_penalty)
        if options.temperature == 0:
            picked = int(logits.argmax())
        else:
            probabilities, ids = trim(logits / options.temperature, options.top_k, options.top_p)
            picked = int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])
        self._seen.add(picked)
        return picked


def penalize(logits: torch.Tensor, seen: list[int], penalty: float) -> torch.Tensor:
    """Make seen ids less likely (Keskar et al. 2019, section 4.1): logits (V,) divided by the penalty.

    A negative logit is multiplied instead, since dividing would make it likelier. As is usual, the ids of the prompt
    are among the seen.
    """
    if penalty == 1 or not seen:
        return logits
    at = torch.tensor(seen)
    values = logits[at]
    return logits.index_copy(0, at, torch.where(values > 0, values / penalty, values * penalty))


def trim(logits: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids that stay, likeliest first if anything is trimmed; probabilities sum to the kept mass.

    ``top_k``: the k likeliest (Fan et al. 2018). ``top_p``: of those, renormalized, the fewest whose mass reaches p
    (Holtzman et al. 2020, section 3.1); at least one.
    """
    ids = torch.arange(len(logits))
    if 0 < top_k < len(logits):
        logits, ids = logits.topk(top_k)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        mass_before = probabilities.double().cumsum(0) - probabilities
        kept = mass_before < top_p
        probabilities, ids = probabilities[kept], ids[order][kept]
    return probabilities, ids
