"""Speed on one GPU: prefill and decode of named shapes, random weights, recipe by recipe; single products; large batch.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --shapes mamba2-2.7b --recipes w4a8 --no-greedy --no-products

Everything is checked before it is timed, and a check that fails ends the run: greedy tokens and logits of the bundled
model against simulation on the CPU; two layers of every shape and recipe against the reference on the same device
(``squamata.cli.gpu_profile``); single products against an exact one. TTFT and TPOT: medians of graph replays in
milliseconds with the 10th and 90th percentile. *share*: bytes that a step must move (weights, scales, state) over the
bandwidth of a device copy, over TPOT.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata import pipeline
from squamata.cli.gpu_profile import copy_bandwidth, milliseconds, profile_gpu, spread
from squamata.cli.random_codes import random_checkpoint
from squamata.errors import SquamataError
from squamata.kernels import ops
from squamata.kernels.decode.triton import Mamba1Layer, Mamba2Layer
from squamata.kernels.dispatch import use_backend
from squamata.kernels.gpu_expand import as_rows, expand, rows_of, scratch_bytes
from squamata.kernels.gpu_gemm import LAND, PLAIN, RESIDUAL, Finish, gemm
from squamata.kernels.gpu_gemv import Landing, choose_shape
from squamata.kernels.gpu_tiles import Format, TiledLinear, tile_linear
from squamata.kernels.linear import Linear
from squamata.kernels.packing import pack_int4
from squamata.kernels.qtensor import QTensor
from squamata.load.hub import bundled
from squamata.models.block import ScanCache
from squamata.models.config import shape
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.save.read import read_checkpoint
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

RECIPES = {"bfloat16": "float", "w8a8": "quamba-w8a8", "w4a8": "w4a8", "w4a16": "w4a16"}
PROMPT, NEW = 64, 32  # of the greedy check
# Relative error of logits while the tokens agree, times the reference's own: stepwise against parallel, in this run.
# A code that rounds the other way is carried on through all layers, in the reference as on the GPU.
NOISE_FACTOR, LEAST_TOLERANCE = 2.0, 1e-5
LAYER_TOKENS = 4
MOST_DIFFERING = 2e-3  # of the codes that layers leave, each fed with the reference's inputs: ties, by one step
PRODUCT_TOLERANCE = 1e-5


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def greedy_check(recipe: str, folder: Path, source: Path) -> dict[str, Any]:
    """A real model, quantized: simulation on the CPU against the GPU's prefill and decode."""
    with use_backend("ref"), torch.no_grad():
        if recipe == "float":
            simulated = LanguageModel(pipeline.load(source).checkpoint)
        else:
            out = folder / f"{source.name}-{recipe}"
            pipeline.quantize(source, recipe, out, bundled() / "calibration.jsonl", samples=8, length=128)
            simulated = LanguageModel(read_checkpoint(out), "simulate")
        prompt = torch.randint(1, 8000, (1, PROMPT), generator=torch.Generator().manual_seed(3))
        cache = simulated.new_cache(1)
        logits = [simulated.forward(prompt, cache, last_only=True)[0, -1]]
        for _ in range(NEW):
            logits.append(simulated.step(logits[-1].argmax()[None], cache)[0])
        taken = torch.stack([each.argmax() for each in logits[:-1]])[None]
        parallel = simulated.forward(torch.cat([prompt, taken], 1), simulated.new_cache(1))[0, PROMPT - 1 :]
        noise = max(relative(a, b) for a, b in zip(parallel, logits, strict=True))
    model = LanguageModel(simulated.checkpoint)
    decoder = CapturedDecoder(model, 1, weights="float32")
    ours = [decoder.prefill(prompt.cuda())[0].cpu().clone()]
    ours += [decoder.step()[0].cpu().clone() for _ in range(NEW)]
    tokens = [(int(a.argmax()), int(b.argmax())) for a, b in zip(ours, logits, strict=True)]
    equal = next((at for at, (a, b) in enumerate(tokens) if a != b), NEW + 1)
    errors = [relative(a, b) for a, b in zip(ours, logits, strict=True)][: max(equal, 1)]
    found = {"model": source.name, "recipe": recipe, "first_error": errors[0], "worst_error": max(errors),
             "reference_noise": noise, "equal": equal, "of": NEW + 1} | layer_check(model)  # fmt: skip
    within = max(errors) <= max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
    if not (within and found["differing"] <= MOST_DIFFERING * max(1, found["codes"]) and found["most_apart"] <= 1):
        raise SquamataError(f"the check on a real model failed: {found}")
    return found


@torch.no_grad()
def layer_check(model: LanguageModel) -> dict[str, Any]:
    """Every layer's decode kernels, each fed with the reference's inputs and state: codes of the convolution's input
    and of the state that differ, by how much at most, and the worst relative error of a layer's output."""
    decoder = CapturedDecoder(model, 1, weights="float32", pdl=False)
    buffers, cache = decoder.plan.buffers, model.new_cache(1)
    found = {"codes": 0, "differing": 0, "most_apart": 0, "layer_error": 0.0}
    ids = torch.randint(1, 8000, (LAYER_TOKENS, 1), generator=torch.Generator().manual_seed(4))
    for token in ids:
        with use_backend("ref"):
            h, residual = ops.embedding(token[:, None], model.embedding, torch.float32), None
        for index, (block, layer) in enumerate(zip(model.blocks, decoder.plan.layers, strict=True)):
            buffers.h.copy_(h[:, 0])
            if residual is not None:
                buffers.residual.copy_(residual[:, 0])
            with use_backend("ref"):
                h, residual = block.forward(h, residual, cache[index])
            for _, launch in layer.kernels(buffers, first=index == 0):
                launch()
            found["layer_error"] = max(found["layer_error"], relative(buffers.h.cpu(), h[:, 0]))
            given = cache[index]
            assert isinstance(given, ScanCache)
            slot = int(buffers.position) % layer.state.ring.shape[0]
            for ours, theirs in ((layer.state.ring[slot], given.conv), (layer.state.state, given.state)):
                if isinstance(theirs, QTensor):
                    wanted = theirs.data[..., -1] if theirs is given.conv else theirs.data
                    apart = (ours.cpu().int().reshape(-1) - wanted.int().reshape(-1)).abs()
                    found["codes"] += apart.numel()
                    found["differing"] += int((apart > 0).sum())
                    found["most_apart"] = max(found["most_apart"], int(apart.max()))
            take_state(layer, slot, given)
        buffers.position += 1
    return found


def take_state(layer: Mamba1Layer | Mamba2Layer, slot: int, given: ScanCache) -> None:
    """The reference's newest input of the convolution and its state, for the next token."""
    conv, state = ((part.data if isinstance(part, QTensor) else part) for part in (given.conv, given.state))
    layer.state.ring[slot].copy_(conv[..., -1].reshape(layer.state.ring[slot].shape))
    layer.state.state.copy_(state.reshape(layer.state.state.shape))
    if layer.scan.grid is not None and layer.scan.grid.span > 0 and isinstance(given.state, QTensor):
        layer.scan.grid.scale.copy_(given.state.scale.reshape(-1))


def whole_model(name: str, recipe: str, batch: int, prompt: int, state: str) -> dict[str, Any]:
    """One row of the table: ``state`` is the recipe's own or *float16*."""
    chosen = Recipe.read(RECIPES[recipe])
    if state == "float16":
        mapping = chosen.to_mapping()
        mapping["rules"].append({"site": "*.mixer.state", "spec": "float"})
        chosen = Recipe.from_mapping(mapping)
    model = LanguageModel(random_checkpoint(shape(name), chosen, "cuda"), dtype=torch.bfloat16)
    result = profile_gpu(model, prompt, 128, batch)
    about = {"shape": name, "recipe": recipe, "state": state, "error": result.agreement.error}
    return about | {"fast_error": result.agreement.fast_error} | result.to_dict() | {"agreement": None}


def random_linear(outputs: int, width: int, bits: int) -> Linear:
    spec = QuantSpec(bits=bits, full_range=bits == 4, granularity="group(128)" if bits == 4 else "channel")
    low, high = spec.code_range
    codes = torch.randint(low, high + 1, (outputs, width), dtype=torch.int8)
    scale = torch.rand(outputs, width // 128 if bits == 4 else 1) * 0.01 + 0.001
    return Linear(QTensor(pack_int4(codes) if bits == 4 else codes, scale.half().float(), spec, None,
                          width if bits == 4 else None))  # fmt: skip


def microseconds(launches: list[Callable[[], Any]]) -> dict[str, float]:
    """Of one launch: a graph of launches that rotate among several sets of data, so that caches do not lie."""
    for launch in launches:
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    found = spread(milliseconds(graph.replay, 30))
    return {name: 1e3 * value / len(launches) for name, value in found.items()}


def our_product(layer: Linear, tiled: TiledLinear, x: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """Our integer product over a weight laid out by rows, with scales and residual, checked against float64."""
    weight = rows_of(tiled, torch.zeros(scratch_bytes(tiled), dtype=torch.uint8, device="cuda"))
    expand(tiled, weight)
    rows = as_rows(tiled, weight)
    out = torch.full((len(x), tiled.rows), float("nan"), device="cuda")
    gemm(x, None, rows, tiled.factor, None, Finish(PLAIN, values=out))
    assert isinstance(layer.weight, QTensor)
    exact = x[:64].double() @ layer.weight.dequantize(torch.float64).cuda().T
    error = float((out[:64] - exact).norm() / exact.norm())
    if not error <= PRODUCT_TOLERANCE:
        raise SquamataError(f"our product {tuple(x.shape)} x {tiled.rows} is off: relative error {error:.2g}")
    if tiled.rows > tiled.columns:  # as in_proj: landed on int8
        inverse = torch.full_like(tiled.factor, 3.0)
        landing = Landing(inverse, -42 * inverse, 42 * inverse, any_codes=True, any_values=False, scale=1 / inverse)
        codes = torch.zeros(len(x), tiled.rows, dtype=torch.int8, device="cuda")
        return lambda: gemm(x, None, rows, tiled.factor, landing, Finish(LAND, codes)), weight
    residual = torch.zeros(len(x), tiled.rows, device="cuda")
    return lambda: gemm(x, None, rows, tiled.factor, None, Finish(RESIDUAL, residual=residual)), weight


def product(outputs: int, width: int, rows: int) -> list[dict[str, Any]]:
    """Our int8 x int8 and int4 x int8 products, scales and landing or residual included, beside torch's bare ones."""
    found = []
    sets: dict[str, list[Callable[[], Any]]] = {"w8a8": [], "w4a8": [], "torch._int_mm": [], "bfloat16 torch.mm": []}
    for _ in range(4):
        for bits in (8, 4):
            layer = random_linear(outputs, width, bits)
            format = Format.INT8_INT8 if bits == 8 else Format.INT4_INT8
            tiled = tile_linear(layer, format, choose_shape(outputs, width, format).tile_rows, "cuda")
            x = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
            launch, weight = our_product(layer, tiled, x)
            sets[f"w{bits}a8"].append(launch)
            if bits == 8:
                sets["torch._int_mm"].append(lambda x=x, weight=weight: torch._int_mm(x, weight.T))
        a = torch.randn(rows, width, device="cuda").bfloat16()
        b = torch.randn(outputs, width, device="cuda").bfloat16()
        sets["bfloat16 torch.mm"].append(lambda a=a, b=b: a @ b.T)
    for name, launches in sets.items():
        times = microseconds(launches)
        tops = 2 * rows * outputs * width / times["median"] * 1e-6
        found.append({"product": name, "rows": rows, "outputs": outputs, "width": width, "us": times, "tops": tops})
    return found


def show(row: dict[str, Any], seconds: float) -> None:
    first, token = row["ttft_ms"], row["tpot_ms"]
    print(
        f"{row['shape']:12} {row['recipe']:9} {row['state']:8} {row['batch']:4} {first['median']:9.2f} "
        f"{first['p10']:7.2f}-{first['p90']:<7.2f} {token['median']:8.3f} {token['p10']:7.3f}-{token['p90']:<7.3f} "
        f"{row['decode_tokens_per_s']:9.0f} {1e-12 * row['achieved_bytes_per_s']:5.2f} {row['floor_ms']:6.3f} "
        f"{100 * row['floor_share']:4.0f}% {row['error']:8.1e} {row['fast_error']:8.1e}  ({seconds:.0f} s)"
    )
    for phase, kernels in row["kernels"].items():
        parts = (f"{name} {entry['launches']}x{entry['microseconds']:.2f}" for name, entry in kernels.items())
        print(f"   {phase}, us a launch: {', '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["mamba2-130m", "mamba2-2.7b", "mamba-2.8b", "mamba2-8b"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--large", nargs="*", type=int, default=[8, 64, 256], help="batches of the state's comparison")
    parser.add_argument("--large-shapes", nargs="*", default=["mamba2-2.7b", "mamba2-8b"])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="folders of real models to check on as well")
    parser.add_argument("--no-greedy", action="store_true")
    parser.add_argument("--no-products", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy": bandwidth}
    print(f"{results['gpu']}, torch {torch.__version__}; device copy {bandwidth * 1e-12:.2f} TB/s")
    if not arguments.no_greedy:
        with tempfile.TemporaryDirectory() as folder:
            results["greedy"] = [greedy_check(RECIPES[name], Path(folder), source)
                                 for source in (bundled(), *arguments.models)
                                 for name in arguments.recipes]  # fmt: skip
        for found in results["greedy"]:
            print(f"{found['model']}, {found['recipe']}: greedy tokens equal {found['equal']} of {found['of']}; "
                  f"logits' relative error {found['first_error']:.1e} first, {found['worst_error']:.1e} worst "
                  f"(the reference's own {found['reference_noise']:.1e}); layer by layer {found['differing']} of "
                  f"{found['codes']} codes "
                  f"differ, by {found['most_apart']} at most, outputs by {found['layer_error']:.1e}",
                  flush=True)  # fmt: skip
    if not arguments.no_products:
        sizes = ((10576, 2560), (2560, 5120))
        results["products"] = [row for n, k in sizes for m in (64, 256, 1024) for row in product(n, k, m)]
        for row in results["products"]:
            print(f"{row['rows']:5} x {row['width']} x {row['outputs']:6} {row['product']:28} "
                  f"{row['us']['median']:8.1f} us "
                  f"({row['us']['p10']:.1f}-{row['us']['p90']:.1f}) {row['tops']:6.0f} TOPS")  # fmt: skip
    if importlib.util.find_spec("mamba_ssm") is None:
        print("mamba_ssm is not installed: no float16 rows of its own")
    print("shape        recipe    state    batch   TTFT ms  p10-p90          TPOT ms p10-p90          tokens/s  TB/s "
          " floor  share    error     fast")  # fmt: skip
    jobs = [(name, recipe, 1, "recipe") for name in arguments.shapes for recipe in arguments.recipes]
    jobs += [(name, "w8a8", batch, state) for name in arguments.large_shapes for batch in arguments.large
             for state in ("recipe", "float16")]  # fmt: skip
    results["rows"] = []
    for name, recipe, batch, state in jobs:
        started = time.perf_counter()
        prompt = arguments.prompt if batch <= 8 else 16  # the state's size does not depend on the prompt
        results["rows"].append(whole_model(name, recipe, batch, prompt, state))
        show(results["rows"][-1], time.perf_counter() - started)
        torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    speed = {(row["shape"], row["batch"], row["state"]): row["decode_tokens_per_s"]
             for row in results["rows"] if row["recipe"] == "w8a8"}  # fmt: skip
    for name in arguments.large_shapes:
        for batch in arguments.large:
            gain = speed[name, batch, "recipe"] / speed[name, batch, "float16"]
            print(f"{name}, batch {batch}: int8 state {gain:.2f} times the tokens/s of a float16 state")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
