"""Speed on one GPU: prefill and decode of named shapes, random weights, recipe by recipe; single products; large batch.

    python benchmarks/gpu.py --json gpu.json --models FOLDER ...
    python benchmarks/gpu.py --shapes mamba2-2.7b --recipes w4a8 --no-greedy --no-products

First, in ``--jobs`` processes at once and for ``--prepare`` seconds at most, what needs no quiet machine: every row of
the table on two layers against the reference on the same device (``squamata.cli.gpu_profile``), which compiles its
kernels; every single product against an exact one; greedy tokens and logits of the bundled model and of ``--models``
against simulation on the CPU. Then, alone on the GPU, what is timed; a row that was not checked is checked then. What
fails its check is not timed, and the exit status is 1. TTFT and TPOT: medians of graph replays in milliseconds with
the 10th and 90th percentile. *share*: bytes that a step must move (weights, scales, state) over the bandwidth of a
device copy, over TPOT. ``--json`` holds every result as soon as it is known, the most important rows first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product as every
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_checks import greedy_check
from gpu_products import ROWS, SIZES, compiled_product, product
from gpu_products import show as show_product

from squamata.cli.gpu_profile import LAYERS_CHECKED, GpuAgreement, check_agreement, copy_bandwidth, profile_gpu
from squamata.cli.random_codes import random_checkpoint
from squamata.errors import SquamataError
from squamata.load.hub import bundled
from squamata.models.config import shape
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.spec.recipe import Recipe

# Heads and embeddings of the first four are in as few bits as those of Quamba2's models, which they stand beside.
RECIPES = {
    "bfloat16": "float",
    "w8a8": "quamba-w8a8",
    "w4a8": "w4a8-int4-head",
    "w4a16": "w4a16-int4-head",
    "w4a8-int8-head": "w4a8",
    "w4a16-float-head": "w4a16",
}
BESIDE_RIVALS = tuple(RECIPES)[:4]
LONGEST = ("w8a8", "w4a8")  # to compile
MANY = 8  # sequences beyond which a prompt is short: the state's size does not depend on it
FEW_TOKENS = 16
JOBS = max(2, min(16, (os.cpu_count() or 4) // 2))


class Row(NamedTuple):
    """One row of the table. ``state``: the recipe's own or *float16*."""

    shape: str
    recipe: str
    batch: int
    state: str
    prompt: int

    def model(self, layers: int | None = None) -> LanguageModel:
        """Random weights, of the first ``layers`` only if given."""
        chosen, config = Recipe.read(RECIPES[self.recipe]), shape(self.shape)
        if self.state == "float16":
            mapping = chosen.to_mapping()
            mapping["rules"].append({"site": "*.mixer.state", "spec": "float"})
            chosen = Recipe.from_mapping(mapping)
        if layers is not None:
            config = config.model_copy(update={"blocks": config.blocks[:layers]})
        return LanguageModel(random_checkpoint(config, chosen, "cuda"), dtype=torch.bfloat16)

    def checked(self) -> GpuAgreement:
        """Against the reference, and all kernels compiled, on two layers."""
        model = self.model(LAYERS_CHECKED)
        agreement = check_agreement(model, self.batch)
        decoder = CapturedDecoder(model, self.batch, state_dtype=torch.float16)
        decoder.captured_prefill(min(self.prompt, decoder.longest))
        torch.cuda.synchronize()
        return agreement

    def measured(self, agreement: GpuAgreement | None) -> dict[str, Any]:
        result = profile_gpu(self.model(), self.prompt, 128, self.batch, agreement=agreement)
        about = {"shape": self.shape, "recipe": self.recipe, "file": RECIPES[self.recipe], "state": self.state}
        errors = {"error": result.agreement.error, "fast_error": result.agreement.fast_error}
        return about | errors | result.to_dict() | {"agreement": None}


class Results:
    """What is known so far, on disk as soon as it is known."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.started = path, time.perf_counter()
        self.found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def add(self, key: str, value: Any, to_list: bool = True) -> None:
        if to_list:
            self.found.setdefault(key, []).append(value)
        else:
            self.found[key] = value
        self.found["seconds"] = time.perf_counter() - self.started
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1))

    @contextmanager
    def failing(self, what: Any) -> Iterator[None]:
        """Within the block an error is a result: a check that fails, or a GPU that has no room for it now."""
        try:
            yield
        except Exception as error:  # of another process, of any kind
            kind = "failed" if isinstance(error, SquamataError) else "broken_off"
            self.add(kind, {"what": str(what), "error": str(error)})
            print(f"{what}: {kind}: {error}", flush=True)

    def failed(self, what: Any) -> bool:
        return any(entry["what"] == str(what) for entry in self.found.get("failed", ()))

    def phase(self, what: str) -> None:
        print(f"--- {what} ({time.perf_counter() - self.started:.0f} s)", flush=True)


def freed(function: Callable[..., Any], *arguments: Any) -> Any:
    """In another process: what it gives, and the GPU's memory back."""
    try:
        return function(*arguments)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def prepare(rows: list[Row], arguments: argparse.Namespace, results: Results) -> dict[Row, GpuAgreement]:
    """All that several processes may do at once; what is not done in time is left to the timing."""
    agreements: dict[Row, GpuAgreement] = {}
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(
        arguments.jobs, torch.set_num_threads, (1,)
    ) as pool:  # fmt: skip
        waiting: dict[Any, AsyncResult[Any]] = {}
        first = [row for row in rows if row.recipe in LONGEST and row.batch == 1]
        for row in first:
            waiting[row] = pool.apply_async(freed, (row.checked,))
        for source, name in () if arguments.no_greedy else every((bundled(), *arguments.models), arguments.recipes):
            task = pool.apply_async(freed, (greedy_check, RECIPES[name], Path(folder), source))
            waiting[f"{source.name}, {name}"] = task
        for row in (row for row in rows if row not in first):
            waiting[row] = pool.apply_async(freed, (row.checked,))
        for size in () if arguments.no_products else every(SIZES, ROWS):
            waiting[size] = pool.apply_async(freed, (compiled_product, *size[0], size[1]))
        until = time.perf_counter() + arguments.prepare
        while waiting and time.perf_counter() < until:
            time.sleep(0.1)
            for what in [what for what, task in waiting.items() if task.ready()]:
                with results.failing(what):
                    found = waiting.pop(what).get()
                    results.phase(f"{what}: checked")
                    if isinstance(found, GpuAgreement):
                        agreements[what] = found
                    elif isinstance(found, dict):
                        results.add("greedy", found)
                        show_greedy(found)
        if waiting:
            results.add("not_prepared", [str(what) for what in waiting], to_list=False)
            print("not checked or compiled in time:", *waiting, sep="\n   ", flush=True)
    return agreements


def show_greedy(found: dict[str, Any]) -> None:
    print(f"{found['model']}, {found['recipe']}: greedy tokens equal {found['equal']} of {found['of']}; "
          f"logits' relative error {found['first_error']:.1e} first, {found['worst_error']:.1e} worst "
          f"(the reference's own {found['reference_noise']:.1e}); layer by layer {found['differing']} of "
          f"{found['codes']} codes differ, by {found['most_apart']} at most, outputs by "
          f"{found['layer_error']:.1e}", flush=True)  # fmt: skip


def show(row: dict[str, Any], seconds: float) -> None:
    first, token = row["ttft_ms"], row["tpot_ms"]
    print(
        f"{row['shape']:12} {row['file']:15} {row['state']:8} {row['batch']:4} {first['median']:9.2f} "
        f"{first['p10']:7.2f}-{first['p90']:<7.2f} {token['median']:8.3f} {token['p10']:7.3f}-{token['p90']:<7.3f} "
        f"{row['decode_tokens_per_s']:9.0f} {1e-12 * row['achieved_bytes_per_s']:5.2f} {row['floor_ms']:6.3f} "
        f"{100 * row['floor_share']:4.0f}% {row['error']:8.1e} {row['fast_error']:8.1e}  ({seconds:.0f} s)"
    )
    for phase, kernels in row["kernels"].items():
        parts = (f"{name} {entry['launches']}x{entry['microseconds']:.2f}" for name, entry in kernels.items())
        print(f"   {phase}, us a launch: {', '.join(parts)}", flush=True)


def time_rows(rows: list[Row], agreements: dict[Row, GpuAgreement], results: Results) -> None:
    print("shape        recipe          state    batch   TTFT ms  p10-p90          TPOT ms p10-p90          tokens/s "
          " TB/s  floor  share    error     fast")  # fmt: skip
    for row in (row for row in rows if not results.failed(row)):
        started = time.perf_counter()
        with results.failing(row):
            found = row.measured(agreements.get(row))
            results.add("rows", found)
            show(found, time.perf_counter() - started)
        gc.collect()
        torch.cuda.empty_cache()
    speed = {(row["shape"], row["batch"], row["state"]): row["decode_tokens_per_s"]
             for row in results.found.get("rows", ()) if row["recipe"] == "w8a8"}  # fmt: skip
    for (name, batch, state), fast in speed.items():
        if state == "recipe" and (slow := speed.get((name, batch, "float16"))):
            results.add("state", {"shape": name, "batch": batch, "gain": fast / slow})
            print(f"{name}, batch {batch}: int8 state {fast / slow:.2f} times the tokens/s of a float16 state")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["mamba2-2.7b", "mamba2-8b", "mamba-2.8b", "mamba2-130m"])
    parser.add_argument("--recipes", nargs="+", default=list(BESIDE_RIVALS), choices=list(RECIPES))
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--large", nargs="*", type=int, default=[256, 64, 8], help="batches of the state's comparison")
    parser.add_argument("--large-shapes", nargs="*", default=["mamba2-2.7b"])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="folders of real models to check on as well")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes that check and compile")
    parser.add_argument("--prepare", type=float, default=90, help="seconds for it")
    parser.add_argument("--no-greedy", action="store_true")
    parser.add_argument("--no-products", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    results = Results(arguments.json)
    rows = [Row(name, recipe, 1, "recipe", arguments.prompt)
            for name, recipe in every(arguments.shapes, arguments.recipes)]  # fmt: skip
    for name, batch, state in every(arguments.large_shapes, arguments.large, ("recipe", "float16")):
        rows.append(Row(name, "w8a8", batch, state, arguments.prompt if batch <= MANY else FEW_TOKENS))
    results.phase("checked and compiled")
    agreements = prepare(rows, arguments, results)
    results.phase("timed")
    results.add("copy", copy_bandwidth(), to_list=False)
    print(f"{results.found['gpu']}, torch {torch.__version__}; device copy {results.found['copy'] * 1e-12:.2f} TB/s")
    if importlib.util.find_spec("mamba_ssm") is None:
        results.add("mamba_ssm", "not importable", to_list=False)
        print("mamba_ssm is not importable: no float16 rows of its own")
    time_rows(rows, agreements, results)
    for size, count in () if arguments.no_products else every(SIZES, ROWS):
        with results.failing(f"products of {count} rows, {size}"):
            for found in product(*size, count):
                results.add("products", found)
                show_product(found)
    results.phase("done")
    if results.found.get("failed"):
        raise SystemExit("not all checks passed")


if __name__ == "__main__":
    main()
