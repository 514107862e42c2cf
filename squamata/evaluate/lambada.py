"""LAMBADA (Paperno et al. 2016): the last word of a passage, from ``{context, continuation}`` lines."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from squamata.evaluate.result import Result
from squamata.evaluate.scoring import read_examples, request, score
from squamata.evaluate.uncertainty import mean_and_error
from squamata.evaluate.windows import Progress, tokenizer_of

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


@dataclass(frozen=True)
class LambadaResult(Result):
    """``accuracy``: share of passages whose last word greedy decoding gives, every token of it. ``perplexity``: of the
    last words, a word (not a token). ``hits``: per passage, in file order.
    """

    accuracy: float
    accuracy_stderr: float | None
    perplexity: float
    examples: int
    seconds: float
    hits: tuple[bool, ...] = field(repr=False, compare=False)


def evaluate_lambada(
    model: LanguageModel, path: str | Path, limit: int | None = None, progress: Progress | None = None
) -> LambadaResult:
    """Judge a model on the first ``limit`` passages of a JSONL file (``context``, ``continuation``)."""
    started = time.perf_counter()
    tokenizer = tokenizer_of(model)
    passages = read_passages(path, limit)
    requests = [request(tokenizer, row["context"], " " + row["continuation"]) for row in passages]
    scores = score(model, requests, progress)
    accuracy, error = mean_and_error([item.greedy for item in scores])
    return LambadaResult(
        accuracy=accuracy,
        accuracy_stderr=error,
        perplexity=math.exp(sum(item.nats for item in scores) / len(scores)),
        examples=len(scores),
        seconds=time.perf_counter() - started,
        hits=tuple(item.greedy for item in scores),
    )


def read_passages(path: str | Path, limit: int | None = None) -> list[dict[str, str]]:
    """The passages of a file, checked."""
    return read_examples(path, {"context": str, "continuation": str}, limit)
