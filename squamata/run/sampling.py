"""Choosing the next token: greedy, or drawn from the (trimmed) distribution, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from squamata.errors import SquamataError

_KINDS = (
    (Integral, "a whole number", ("max_new_tokens", "top_k", "seed")),
    (Real, "a number", ("temperature", "top_p", "repetition_penalty")),
    (tuple | list, "a tuple of strings", ("stop",)),
)
SMALLEST_TEMPERATURE = 2.0**-100  # a smaller one draws as this one does


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
        for kind, words, names in _KINDS:
            wrong = next((name for name in names if not isinstance(getattr(self, name), kind)), None)
            if wrong is not None:
                raise SquamataError(f"{wrong.replace('_', '-')} must be {words}, not {getattr(self, wrong)!r}")
        checks = (
            (self.max_new_tokens >= 1, "max-new-tokens must be at least 1", self.max_new_tokens),
            (0 <= self.temperature < math.inf, "temperature must be 0 (greedy) or more", self.temperature),
            (self.top_k >= 0, "top-k must be 0 (off) or more", self.top_k),
            (0 < self.top_p <= 1, "top-p must be above 0 and at most 1", self.top_p),
            (1e-6 <= self.repetition_penalty <= 1e6, "repetition-penalty must be 1e-6 to 1e6", self.repetition_penalty),
            (0 <= self.seed < 2**63, "seed must be 0 or more and below 2**63", self.seed),
            (all(isinstance(text, str) for text in self.stop), "stop must be a tuple of strings", self.stop),
            (all(self.stop), "a stop string must not be empty", self.stop),
        )
        for holds, message, value in checks:
            if not holds:
                raise SquamataError(f"{message}, not {value!r}")


class Sampler:
    """Picks token ids from logits, where the logits are. It remembers the ids it has seen for the repetition penalty.

    On a GPU everything between the logits and the id is one captured graph; the id alone comes to the host.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._early: set[int] = set()  # ids seen before the vocabulary's size is known
        self._place: _Place | None = None
        self._noise = torch.Generator().manual_seed(options.seed).get_state()

    @property
    def ids(self) -> Tensor:
        """int64 (1,): the last pick, on the device of the logits; a copy."""
        assert self._place is not None
        return self._place.ids.clone()

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Within it torch's generator on the CPU, by which sites round stochastically, goes on from where the seed and
        the blocks before have left it; afterwards it is as it was."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._noise)
        try:
            yield
        finally:
            self._noise = torch.get_rng_state()
            torch.set_rng_state(before)

    def see(self, ids: Iterable[int]) -> None:
        """Count ids, of the prompt for one, as used before."""
        if self._place is None:
            self._early.update(ids)
        else:
            self._place.see(ids)

    def pick(self, logits: Tensor) -> int:
        """The next id from logits float (V,). SquamataError if they hold NaN or infinity."""
        if self._place is None:
            self._place = _Place(self.options, len(logits), logits.device)
            self._place.see(self._early)
        picked = self._place.pick(logits.detach())
        if picked < 0:
            raise SquamataError("the model gives logits that are not finite: its weights or scales are damaged")
        return picked


class _Place:
    """What sampling needs on one device: logits (1, V), the ids seen, the pick, and the generator of the draws."""

    def __init__(self, options: SamplingOptions, vocabulary: int, device: torch.device) -> None:
        self.options = options
        self.logits = torch.zeros(1, vocabulary, device=device)
        self.seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
        self.ids = torch.zeros(1, dtype=torch.int64, device=device)
        self._generator = torch.Generator(device).manual_seed(options.seed)
        self._launch = self._choose
        if self.logits.is_cuda:
            from squamata.run.graphs import captured

            self._launch = captured(self._choose, device, self._generator)
            self._generator.manual_seed(options.seed)
            self.seen.zero_()

    def see(self, ids: Iterable[int]) -> None:
        self.seen[0, torch.tensor(sorted(ids), dtype=torch.int64, device=self.seen.device)] = True

    def pick(self, logits: Tensor) -> int:
        """The next id; -1 for logits that are not finite."""
        self.logits.copy_(logits)
        self._launch()
        return int(self.ids)

    def _choose(self) -> None:
        ids = draw(penalize(self.logits, self.seen, self.options.repetition_penalty), self.options, self._generator)
        self.ids.copy_(torch.where(self.logits.amax(-1).isfinite(), ids, -1))
        self.seen.scatter_(1, ids[:, None], True)


def draw(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """The next ids int64 (B,) from logits (B, V), without a word to the host.

    An id is the one of the least E / p, with E drawn from the exponential distribution for every id: each wins with
    its probability p.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    below = logits - logits.amax(-1, keepdim=True)  # 0 and less: a small temperature makes no infinity of the largest
    tempered = below / max(options.temperature, SMALLEST_TEMPERATURE)
    probabilities, ids = trim(tempered, options.top_k, options.top_p)
    winner = (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, True)
    return (winner if ids is None else ids.gather(-1, winner))[:, 0]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen ids less likely (Keskar et al. 2019, section 4.1): their logits divided by the penalty.

    A negative logit is multiplied instead, since dividing would make it likelier. As is usual, the ids of the prompt
    are among the seen. ``seen``: bool, as the logits.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def trim(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """Probabilities (..., k), 0 for what is trimmed, and the ids they are of, likeliest first; None: all, in order.

    ``top_k``: the k likeliest (Fan et al. 2018). ``top_p``: of those, renormalized, the fewest whose mass reaches p
    (Holtzman et al. 2020, section 3.1); at least one. What is kept sums to its own mass.
    """
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        mass_before = probabilities.double().cumsum(-1) - probabilities
        probabilities = probabilities * (mass_before < top_p)
    return probabilities, ids
