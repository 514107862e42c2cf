"""How fast a model runs on a GPU: checked, then timed with device events; a table of its kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from squamata.errors import SquamataError
from squamata.evaluate.profile import Speed, check_counts, random_ids
from squamata.evaluate.size import bytes_by_part
from squamata.evaluate.windows import Progress
from squamata.kernels.dispatch import use_backend
from squamata.memory import peak_rss_bytes
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder

LAYERS_CHECKED = 2
PROMPT_CHECKED, TOKENS_CHECKED = 40, 3
PROMPTS_OF_ITS_OWN = 8
TOLERANCE = 1e-4  # relative L2 error of logits, float32 kernels, a float model
TOLERANCE_QUANTIZED = 3e-2  # a float sum added in another order may round to the next code, which is carried on
OWN_ERRORS = 2.0  # what is allowed in any case: so many times the reference's own distance from itself in float64
TOLERANCE_FAST = 6e-2  # bfloat16 values between the kernels of a prefill, against the float32 ones
_BANDWIDTH_BYTES = 2**31


@dataclass(frozen=True)
class GpuAgreement:
    """Largest relative L2 errors of logits, prompt and following tokens, first layers: the kernels with float32 values
    against the reference, and the ones that are timed against those."""

    error: float
    tolerance: float
    fast_error: float
    fast_tolerance: float


@dataclass(frozen=True)
class GpuProfile(Speed):
    """Speed on a GPU: {median, min, max, p10, p90} of graph replays; TTLT for ``generate`` tokens is summed from these.

    The floor is of weights, scales and state over the bandwidth of a device copy. ``kernels``: {decode, prefill} ->
    name -> {launches, microseconds a launch}.
    """

    gpu: str
    copy_bytes_per_s: float
    bytes_per_step: int
    achieved_bytes_per_s: float
    peak_gpu_bytes: int
    kernels: dict[str, dict[str, dict[str, float]]]
    agreement: GpuAgreement


def milliseconds(launch: Callable[[], Any], repeats: int = 60, warm: int = 3) -> list[float]:
    """Times of single launches by device events, sorted."""
    for _ in range(warm):
        launch()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)


def spread(times: list[float]) -> dict[str, float]:
    """Median, extremes, 10th and 90th percentile of sorted times."""
    tenth = len(times) // 10
    ends = {"min": times[0], "max": times[-1], "p10": times[tenth], "p90": times[-1 - tenth]}
    return {"median": statistics.median(times)} | ends


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read plus written."""
    source = torch.randn(_BANDWIDTH_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (statistics.median(milliseconds(lambda: target.copy_(source), 20)) * 1e-3)


def kernel_times(kernels: Iterable[tuple[str, Callable[[], None]]]) -> dict[str, dict[str, float]]:
    """Microseconds a launch of every kind of kernel: all launches of one kind in one graph, one after the other."""
    found = {}
    for name, group in groupby(sorted(kernels, key=lambda kernel: kernel[0]), key=lambda kernel: kernel[0]):
        launches = [launch for _, launch in group]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        median = statistics.median(milliseconds(graph.replay, 20))
        found[name] = {"launches": len(launches), "microseconds": 1e3 * median / len(launches)}
    return found


@torch.no_grad()
def check_agreement(model: LanguageModel, batch: int = 1) -> GpuAgreement:
    """Compare the kernels with the reference on the model's first layers; SquamataError if they disagree."""
    checkpoint = model.checkpoint
    config = checkpoint.config.model_copy(update={"blocks": checkpoint.config.blocks[:LAYERS_CHECKED]})
    where = checkpoint.tensors["final_norm.weight"]
    device = where.device if isinstance(where, torch.Tensor) else torch.device("cpu")
    ids = random_ids(config.vocab_size, batch, PROMPT_CHECKED + TOKENS_CHECKED, seed=1)
    with torch.device(device) if device.type == "cuda" else nullcontext(), use_backend("ref"):
        part = LanguageModel(Checkpoint(config, checkpoint.tensors, checkpoint.recipe, checkpoint.site_tensors))
        exact = CapturedDecoder(part, batch, weights="float32")
        fast = CapturedDecoder(part, batch, state_dtype=torch.float16)
        cache = part.new_cache(batch)
        worst, worst_fast = 0.0, 0.0
        for start, stop in ((0, PROMPT_CHECKED), *((at, at + 1) for at in range(PROMPT_CHECKED, ids.shape[1]))):
            piece = ids[:, start:stop].to(device)
            wanted = part.forward(piece, cache, last_only=True)[:, -1].cpu()
            exact.logits.fill_(float("nan"))
            fast.logits.fill_(float("nan"))
            many = stop - start > 1
            got, got_fast = ((one.prefill(piece) if many else one.step(piece[:, 0])).cpu() for one in (exact, fast))
            worst = max(worst, _relative(got, wanted))
            worst_fast = max(worst_fast, _relative(got_fast, got))
        tolerance = TOLERANCE
        if any(site.quantized for site in part.sites()):
            tolerance = max(TOLERANCE_QUANTIZED, OWN_ERRORS * _own_error(part, device))
    if not (worst <= tolerance and worst_fast <= TOLERANCE_FAST):
        raise SquamataError(
            f"the GPU kernels disagree with the reference (relative error of logits {worst:.2g}, of the fast kernels "
            f"{worst_fast:.2g}), so nothing was timed; please report this with the model's config.json"
        )
    return GpuAgreement(worst, tolerance, worst_fast, TOLERANCE_FAST)


def _own_error(part: LanguageModel, device: torch.device) -> float:
    """Largest relative error of the reference's logits, of any token of some prompts, against its float64 self: what
    comes of sums that round to the next code."""
    ids = random_ids(part.config.vocab_size, PROMPTS_OF_ITS_OWN, PROMPT_CHECKED, seed=2).to(device)
    exact = LanguageModel(part.checkpoint, dtype=torch.float64)
    ours, theirs = (model.forward(ids, model.new_cache(len(ids))).double() for model in (part, exact))
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def _relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((ours.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")  # not a number: never within a tolerance


@torch.no_grad()
def profile_gpu(
    model: LanguageModel,
    prompt: int = 1024,
    generate: int = 128,
    batch: int = 1,
    repeats: int = 60,
    progress: Progress | None = None,
    agreement: GpuAgreement | None = None,
) -> GpuProfile:
    """Time prefill and decode of ``batch`` sequences. SquamataError if the kernels disagree with the reference.

    ``progress``: checked, timed, kernel by kernel. ``agreement``: what ``check_agreement`` has found already.
    """
    check_counts(prompt=(prompt, 1), generate=(generate, 2), batch=(batch, 1), repeats=(repeats, 1))
    tell = progress or (lambda done, total: None)
    tell(0, 3)
    agreement = agreement or check_agreement(model, batch)
    tell(1, 3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    decoder = CapturedDecoder(model, batch, state_dtype=torch.float16)
    logits = decoder.prefill(random_ids(model.config.vocab_size, batch, prompt).cuda())
    finite = bool(torch.isfinite(logits).all())
    plan, replay = decoder.captured_prefill(min(prompt, decoder.longest))
    pieces = -(-prompt // decoder.longest)
    first = spread([pieces * time for time in milliseconds(replay, max(3, repeats // 3))])
    tokens = spread(milliseconds(decoder.replay, repeats))
    if not (finite and torch.isfinite(decoder.logits).all()):
        raise SquamataError(
            "the logits on the GPU are not finite, so no times are given: the weights or scales are off"
        )
    peak = torch.cuda.max_memory_allocated()
    tell(2, 3)
    kernels = {"decode": kernel_times(decoder.kernels()), "prefill": kernel_times(plan.kernels())}
    decoder.reset()
    bandwidth, moved = copy_bandwidth(), decoder.plan.weight_bytes + decoder.plan.state_bytes
    floor = 1e3 * moved / bandwidth
    return GpuProfile(
        gpu=torch.cuda.get_device_name(),
        bytes=bytes_by_part(model, batch) if not model.final_norm.is_cuda else {},
        ttft_ms=first,
        tpot_ms=tokens,
        ttlt_ms={part: first[part] + (generate - 1) * tokens[part] for part in first},
        prefill_tokens_per_s=1e3 * batch * prompt / first["median"],
        decode_tokens_per_s=1e3 * batch / tokens["median"],
        copy_bytes_per_s=bandwidth,
        bytes_per_step=moved,
        achieved_bytes_per_s=1e3 * moved / tokens["median"],
        floor_ms=floor,
        floor_share=floor / tokens["median"],
        peak_gpu_bytes=peak,
        peak_rss_bytes=peak_rss_bytes(),
        prompt=prompt,
        generate=generate,
        batch=batch,
        repeats=repeats,
        kernels=kernels,
        agreement=agreement,
    )
