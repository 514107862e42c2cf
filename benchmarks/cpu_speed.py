"""Prefill and decode of the 130M shapes on a CPU, beside Hugging Face transformers in the same run.

    python benchmarks/cpu_speed.py --rounds 4 --json out/cpu_speed.json

Random weights in the published shapes: speed and memory only. Before anything is timed, the float logits are compared
with transformers' and the quantized logits of the fast kernels with the reference's. The contestants take turns
(A B C A B C ...), because a shared machine's speed drifts: quote ratios, pair by pair. ``w4a8/int4`` is a recipe with
embedding and head in that format; the columns "x squamata ..." compare with the first quantized recipe.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from squamata.evaluate.profile import check_agreement
from squamata.load.random_model import random_tensors
from squamata.models.config import ModelConfig, shape
from squamata.pipeline import random_model
from squamata.run.model import Model
from squamata.spec.recipe import Recipe

PROMPT, DECODED = 512, 64


def hugging_face(config: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' own model with our random weights."""
    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "state_size": config.d_state,
        "num_hidden_layers": config.n_layers, "layer_norm_epsilon": config.norm_epsilon, "expand": 2,
        "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
    }  # fmt: skip
    if config.architecture == "mamba1":
        model = MambaForCausalLM(MambaConfig(time_step_rank=config.dt_rank, residual_in_fp32=True, **common))
    else:
        heads = {"num_heads": config.n_heads, "head_dim": config.head_dim, "n_groups": config.n_groups}
        model = Mamba2ForCausalLM(Mamba2Config(**heads, **common))
    model.load_state_dict(
        {_their_name(name, config): _their_shape(name, tensor) for name, tensor in random_tensors(config).items()},
        strict=False,
    )
    return model.to(dtype).eval()


def _their_name(name: str, config: ModelConfig) -> str:
    name = name.replace("embedding.weight", "embeddings.weight").replace("final_norm", "norm_f")
    name = name.replace("mixer.conv.", "mixer.conv1d.").replace("gate_norm", "norm")
    if config.architecture == "mamba1":
        name = name.replace("dt_bias", "dt_proj.bias")
    return "backbone." + name


def _their_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(1) if name.endswith("conv.weight") else tensor


def hugging_face_times(model: torch.nn.Module, ids: torch.Tensor, decoded: int) -> tuple[float, float]:
    """(prefill, decode) tokens/s; the head computes one row, as in ours."""
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = ids.shape[1] / (time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(decoded):
        out = model(ids[:, number : number + 1], cache_params=out.cache_params, use_cache=True)
    return prefill, decoded / (time.perf_counter() - start)


def our_times(model: Model, ids: torch.Tensor, decoded: int) -> tuple[float, float]:
    """(prefill, decode) tokens/s."""
    cache = model.new_cache(1)
    start = time.perf_counter()
    model.forward(ids, cache, last_only=True)
    prefill = ids.shape[1] / (time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(decoded):
        model.step(ids[:, number], cache)
    return prefill, decoded / (time.perf_counter() - start)


def check(models: dict[str, Model], reference: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Relative errors: our float logits against transformers'; fast kernels against the reference (check_agreement)."""
    expected = reference(ids).logits
    errors = {"float32 vs transformers": float((models["float"](ids) - expected).norm() / expected.norm())}
    if errors["float32 vs transformers"] > 1e-5:
        raise SystemExit(f"not timed: float32 and transformers differ by {errors['float32 vs transformers']:.2e}")
    for name, model in models.items():
        agreement = check_agreement(model)  # raises where they disagree
        errors |= {f"{name}, worst layer": agreement.layer_error, f"{name}, one token": agreement.token_error}
    return errors


def _with_tables(spelled: str) -> Recipe:
    name, _, tables = spelled.partition("/")
    return Recipe.read(name).with_tables(tables or None, tables or None)


def measure(name: str, recipes: list[str], rounds: int, decoded: int) -> dict[str, Any]:
    """All contestants of one shape, in turn."""
    config = shape(name)
    ids = torch.randint(0, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    ours = {recipe: random_model(name, _with_tables(recipe)) for recipe in recipes}
    theirs = {"float32": hugging_face(config, torch.float32), "bfloat16": hugging_face(config, torch.bfloat16)}
    errors = check(ours, theirs["float32"], ids[:, :48])
    contestants: dict[str, Callable[[], tuple[float, float]]] = {
        **{f"transformers {key}": lambda m=m: hugging_face_times(m, ids, decoded // 4) for key, m in theirs.items()},
        **{f"squamata {key}": lambda m=m: our_times(m, ids, decoded) for key, m in ours.items()},
    }
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, run in contestants.items():
            gc.collect()
            run()  # caches and thread pools as it finds them when it runs alone
            taken = run()
            times[key].append(taken)
    return {"shape": name, "errors": errors, "times": times}


def table(result: dict[str, Any]) -> str:
    first = next(key for key in result["times"] if key.startswith("squamata") and key != "squamata float")
    lines = [
        f"{result['shape']}: " + ", ".join(f"{key} {value:.1e}" for key, value in result["errors"].items()), "",
        f"| | prefill 512, tokens/s | x transformers float32 | x {first} | decode, tokens/s | x transformers bfloat16 "
        f"| x {first} |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for key, times in result["times"].items():
        cells = []
        for phase, rival in ((0, "transformers float32"), (1, "transformers bfloat16")):
            speeds = [pair[phase] for pair in times]
            cells.append(f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})")
            for beside, digits in ((rival, 1), (first, 2)):
                pairs = zip(times, result["times"][beside], strict=True)
                cells.append(f"{statistics.median(mine[phase] / their[phase] for mine, their in pairs):.{digits}f}")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["mamba-130m", "mamba2-130m"])
    parser.add_argument("--recipes", nargs="+", default=["float", "quamba-w8a8", "w4a16"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--decoded", type=int, default=DECODED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        results = [measure(name, arguments.recipes, arguments.rounds, arguments.decoded) for name in arguments.shapes]
    print("\n\n".join(table(result) for result in results))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
