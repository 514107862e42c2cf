"""How fast a model runs: TTFT, TPOT, TTLT, and the share of what memory bandwidth allows; checked, then timed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import psutil
import torch

from squamata.errors import SquamataError
from squamata.evaluate.result import Result
from squamata.evaluate.size import bytes_by_part, bytes_read_per_token
from squamata.evaluate.windows import Progress
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor
from squamata.memory import peak_rss_bytes

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel

TOLERANCE = 1e-4  # relative L2 error of a float model
TOLERANCE_SIXTEEN_BITS = 5e-4  # of a float model with integer weights, whose products take activations of 16 bits
TOLERANCE_QUANTIZED = 1e-2  # of one layer: a float sum added in another order may round to the next integer code
TOKEN_QUANTIZED = 5e-2  # of all layers, through which such codes are carried on

_GATE_PROMPT = 48
_BANDWIDTH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Agreement:
    """The gate: relative L2 errors of the fast backend to the reference, the worst layer of a prompt (given the same
    input) and the logits of one token through all layers (given the same state)."""

    layer_error: float
    layer_tolerance: float
    token_error: float
    token_tolerance: float


@dataclass(frozen=True)
class Speed(Result):
    """What is told of a model's speed on any device: times in milliseconds, their median and spread over the repeats.

    TTFT from call to first token, TPOT of every further token, TTLT from call to last token. Rates count the tokens of
    all sequences of the batch. ``bytes``: see ``bytes_by_part``. ``floor_ms``: the bytes that a token must move over
    the memory's measured bandwidth; ``floor_share``: that over TPOT. ``peak_rss_bytes``: of the whole process, loading
    and the reference included.
    """

    bytes: dict[str, int]
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    ttlt_ms: dict[str, float]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    floor_ms: float
    floor_share: float
    prompt: int
    generate: int
    batch: int
    repeats: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Profile(Speed):
    """Speed on a CPU: {median, min, max} of times, TPOT the mean of a run's further tokens; the floor is of weights.

    ``rss_bytes``: of the process while it was timed.
    """

    rss_bytes: int
    weight_bytes_per_token: int
    dram_read_bytes_per_s: float
    threads: int
    agreement: Agreement


def profile(
    model: LanguageModel,
    prompt: int = 512,
    generate: int = 128,
    batch: int = 1,
    repeats: int = 5,
    progress: Progress | None = None,
) -> Profile:
    """Time greedy generation of ``generate`` tokens after ``prompt`` random ones, for ``batch`` sequences at once.

    SquamataError if the fast kernels disagree with the reference: then nothing is timed.
    """
    check_counts(prompt=(prompt, 1), generate=(generate, 2), batch=(batch, 1), repeats=(repeats, 1))
    agreement = check_agreement(model)
    ids = random_ids(model.config.vocab_size, batch, prompt)
    _timed_run(model, ids, 2)  # compiles, packs, warms the caches
    memory, rates = torch.empty(0), []
    runs: list[tuple[float, float]] = []
    for done in range(repeats):
        if progress is not None:
            progress(done, repeats)
        runs.append(_timed_run(model, ids, generate))
        if not done:
            resident = psutil.Process().memory_info().rss
            peak = max(peak_rss_bytes(), resident)  # the kernel books the peak a little late
            memory = torch.ones(_BANDWIDTH_BYTES // 4)  # only now: it is no memory of the model's
        rates.append(read_rate(memory))  # in turn with the runs: a shared machine's bandwidth changes by the minute
    bandwidth = statistics.median(rates)
    ttft = _spread([first for first, _ in runs])
    tpot = _spread([(last - first) / (generate - 1) for first, last in runs])
    weight_bytes = bytes_read_per_token(model)
    floor = 1e3 * weight_bytes / bandwidth
    return Profile(
        bytes=bytes_by_part(model, batch),
        ttft_ms=ttft,
        tpot_ms=tpot,
        ttlt_ms=_spread([last for _, last in runs]),
        prefill_tokens_per_s=1e3 * batch * prompt / ttft["median"],
        decode_tokens_per_s=1e3 * batch / tpot["median"],
        peak_rss_bytes=peak,
        rss_bytes=resident,
        weight_bytes_per_token=weight_bytes,
        dram_read_bytes_per_s=bandwidth,
        floor_ms=floor,
        floor_share=floor / tpot["median"],
        prompt=prompt,
        generate=generate,
        batch=batch,
        repeats=repeats,
        threads=torch.get_num_threads(),
        agreement=agreement,
    )


def check_counts(**counts: tuple[int, int]) -> None:
    """Refuse counts, each given with the least it may be."""
    for name, (value, least) in counts.items():
        if value < least:
            raise SquamataError(f"{name} must be at least {least}, not {value}")


def random_ids(vocabulary: int, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 (B, L), the same for the same seed."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_agreement(model: LanguageModel) -> Agreement:
    """Compare the fast backend with the reference; SquamataError if they disagree.

    A prompt layer by layer, both given the reference's input, and then one token through the whole model from the
    reference's state: a code that rounds the other way is not carried on, so it cannot hide or feign a wrong kernel.
    """
    ids = random_ids(model.config.vocab_size, 1, _GATE_PROMPT + 1, seed=1)
    with use_backend("ref"):
        h, residual, cache = ops.embedding(ids[:, :-1], model.embedding, model.dtype), None, model.new_cache(batch=1)
    worst = 0.0
    for block, past, spare in zip(model.blocks, cache, model.new_cache(batch=1), strict=True):
        fast, _ = block.forward(h, residual, spare)
        with use_backend("ref"):
            h, residual = block.forward(h, residual, past)
        worst = max(worst, _relative(fast, h))
    ours = copy.deepcopy(cache)
    with use_backend("ref"):
        expected = model.step(ids[:, -1], cache)
    token = _relative(model.step(ids[:, -1], ours), expected)
    exact = (
        TOLERANCE_SIXTEEN_BITS if any(isinstance(x, QTensor) for x in model.checkpoint.tensors.values()) else TOLERANCE
    )
    quantized = any(site.quantized for site in model.sites())
    limits = (TOLERANCE_QUANTIZED if quantized else exact, TOKEN_QUANTIZED if quantized else exact)
    if not (worst <= limits[0] and token <= limits[1]):  # also catches NaN
        raise SquamataError(
            f"the fast kernels disagree with the reference (relative error of a layer {worst:.2g}, of a token "
            f"{token:.2g}), so nothing was timed; please report this with the model's config.json"
        )
    return Agreement(worst, limits[0], token, limits[1])


def _relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).double().norm() / expected.double().norm())


@torch.no_grad()
def _timed_run(model: LanguageModel, ids: torch.Tensor, generate: int) -> tuple[float, float]:
    """Milliseconds from the call to the first and to the last of ``generate`` greedy tokens."""
    started = time.perf_counter()
    cache = model.new_cache(batch=len(ids))
    token = model.forward(ids, cache, last_only=True)[:, -1].argmax(-1)
    first = time.perf_counter()
    for _ in range(generate - 1):
        token = model.step(token, cache).argmax(-1)
    return 1e3 * (first - started), 1e3 * (time.perf_counter() - started)


def read_rate(memory: torch.Tensor, rounds: int = 3) -> float:
    """Bytes a second at which all threads together read a buffer far larger than the caches: the best of a few sums."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - started)
    return memory.nbytes / best


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the block torch and the compiled kernels use so many threads; None leaves them as they are."""
    before = torch.get_num_threads(), numba.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if count is not None and not 1 <= count <= most:
        raise SquamataError(f"threads must be 1 to {most} on this machine, not {count}")
    _set_threads(*((count, count) if count else before))
    try:
        yield
    finally:
        _set_threads(*before)


def _set_threads(of_torch: int, of_numba: int) -> None:
    torch.set_num_threads(of_torch)
    numba.set_num_threads(of_numba)
