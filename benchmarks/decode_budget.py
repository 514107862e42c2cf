"""Where the time of one decoded token goes: stages are left out one at a time and the differences taken.

    python benchmarks/decode_budget.py --shapes mamba-130m mamba2-130m --recipe quamba-w8a8

The floor is weight bytes over DRAM read bandwidth, both measured in the same run. A token without a stage computes
nonsense; nothing but its time is used.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from squamata.evaluate.profile import check_agreement, read_rate
from squamata.evaluate.size import bytes_read_per_token
from squamata.kernels.decode.cpu import DecodePlan
from squamata.kernels.decode.token import function_address
from squamata.pipeline import random_model
from squamata.run.decode_plan import plan_model

STAGES = {
    "enter": "norm, in_proj, convolution",
    "scan": "x_proj, dt_proj, state update (Mamba-1); state update (Mamba-2)",
    "leave": "gated norm, rotation, out_proj",
}


def nothing(layer_record, shared_record, private_record, thread, threads):  # type: ignore[no-untyped-def]
    """A phase that does no work."""


def milliseconds(plan: DecodePlan, embedding: np.ndarray, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        plan.step(embedding)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def budget(shape: str, recipe: str, repeats: int) -> str:
    model = random_model(shape, recipe)
    agreement = check_agreement(model)
    plan = plan_model(model)
    states = plan.bind(plan.new_states())
    embedding = np.random.default_rng(0).standard_normal(model.config.d_model).astype(np.float32)
    idle = function_address(nothing)
    whole_record, head = states.table.copy(), plan._model[0]["project_head"]
    times: dict[str, list[float]] = {name: [] for name in ("whole", *STAGES, "head")}
    for _ in range(repeats):
        for name in times:
            states.table[:] = whole_record
            plan._model[0]["project_head"] = idle if name == "head" else head
            if name in STAGES:
                states.table[name] = idle
            times[name] += milliseconds(plan, embedding, 10)
    median = {name: statistics.median(values) for name, values in times.items()}
    bandwidth, bytes_read = read_rate(torch.ones(2**27)), bytes_read_per_token(model)
    floor = 1e3 * bytes_read / bandwidth
    lines = [
        f"{shape}, {recipe}: fast kernels against reference, one token: {agreement.token_error:.1e}",
        f"{bytes_read / 1e6:.1f} MB of weights, {bandwidth / 1e9:.1f} GB/s: floor {floor:.2f} ms, "
        f"{100 * floor / median['whole']:.0f} % of {median['whole']:.2f} ms "
        f"({min(times['whole']):.2f}-{max(times['whole']):.2f})",
        "",
        "| stage | ms a token |",
        "|---|---|",
    ]
    lines += [f"| {text} | {median['whole'] - median[name]:.2f} |" for name, text in STAGES.items()]
    rest = median["whole"] - sum(median["whole"] - median[name] for name in (*STAGES, "head"))
    lines += [
        f"| head | {median['whole'] - median['head']:.2f} |",
        f"| fork-joins, overlap of the above | {rest:.2f} |",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["mamba-130m", "mamba2-130m"])
    parser.add_argument("--recipe", default="quamba-w8a8")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    with torch.inference_mode():
        print("\n\n".join(budget(shape, arguments.recipe, arguments.repeats) for shape in arguments.shapes))


if __name__ == "__main__":
    main()
