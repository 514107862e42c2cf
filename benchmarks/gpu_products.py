"""Single products of a GPU's kernels beside other libraries': torch, and gemlite where it can be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from squamata.cli.gpu_profile import milliseconds, spread
from squamata.errors import SquamataError
from squamata.kernels.gpu.expand import as_rows, expand, rows_of, scratch_bytes
from squamata.kernels.gpu.gemm import LAND, PLAIN, RESIDUAL, Finish, gemm
from squamata.kernels.gpu.gemv import Landing, choose_shape, gemv
from squamata.kernels.gpu.gemv import product as vector_product
from squamata.kernels.gpu.tiles import Format, TiledLinear, tile_linear
from squamata.kernels.linear import Linear
from squamata.kernels.packing import pack_int4
from squamata.kernels.qtensor import QTensor
from squamata.spec.quant import QuantSpec

SIZES = ((10576, 2560), (2560, 5120))  # outputs and inputs of in_proj and out_proj at 2.7B
ROWS = (1, 64, 256, 1024)
PRODUCT_TOLERANCE, RIVAL_TOLERANCE = 1e-5, 3e-2  # theirs rounds activations and outputs to bfloat16 or int8
SETS = 8  # of data that timed launches rotate among: 27 MB of int8 weights each, of which few fit into a cache

Launch = Callable[[], Any]


def random_linear(outputs: int, width: int, bits: int) -> Linear:
    spec = QuantSpec(bits=bits, full_range=bits == 4, granularity="group(128)" if bits == 4 else "channel")
    low, high = spec.code_range
    codes = torch.randint(low, high + 1, (outputs, width), dtype=torch.int8, device="cuda")
    scale = torch.rand(outputs, width // 128 if bits == 4 else 1, device="cuda") * 0.01 + 0.001
    return Linear(QTensor(pack_int4(codes) if bits == 4 else codes, scale.half().float(), spec, None,
                          width if bits == 4 else None))  # fmt: skip


def microseconds(launches: list[Launch]) -> dict[str, float]:
    """Of one launch: a graph of launches that rotate among several sets of data, so that caches do not lie."""
    for launch in launches:
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    found = spread(milliseconds(graph.replay, 30))
    return {name: 1e3 * value / len(launches) for name, value in found.items()}


def check(what: str, found: Tensor, x: Tensor, weight: QTensor, tolerance: float) -> None:
    """Against float64; SquamataError if it is off."""
    exact = x[:64].double() @ weight.dequantize(torch.float64).T
    error = float((found[:64].double() - exact).norm() / exact.norm())
    if not error <= tolerance:
        raise SquamataError(f"{what} {tuple(x.shape)} x {exact.shape[1]} is off: relative error {error:.2g}")


def our_vector(weight: QTensor, tiled: TiledLinear, x: Tensor) -> Launch:
    """Our matrix-vector product of a decode step."""
    shape = choose_shape(tiled.rows, tiled.columns, tiled.format)
    out = torch.full((len(x), tiled.rows), float("nan"), device="cuda")
    position = torch.zeros(1, dtype=torch.int32, device="cuda")

    made = vector_product(x, None, tiled, tiled.factor, None, (None, out), None, shape)

    def launch() -> None:
        gemv(made, position, False)

    launch()
    check("our product", out, x, weight, PRODUCT_TOLERANCE)
    return launch


def our_product(weight: QTensor, tiled: TiledLinear, x: Tensor) -> tuple[Launch, Tensor]:
    """Our integer product over a weight laid out by rows, with scales and landing or residual."""
    laid_out = rows_of(tiled, torch.zeros(scratch_bytes(tiled), dtype=torch.uint8, device="cuda"))
    expand(tiled, laid_out)
    rows = as_rows(tiled, laid_out)
    out = torch.full((len(x), tiled.rows), float("nan"), device="cuda")
    gemm(x, None, rows, tiled.factor, None, Finish(PLAIN, values=out))
    check("our product", out, x, weight, PRODUCT_TOLERANCE)
    if tiled.rows > tiled.columns:  # as in_proj: landed on int8
        inverse = torch.full_like(tiled.factor, 3.0)
        landing = Landing(inverse, -42 * inverse, 42 * inverse, any_codes=True, any_values=False, scale=1 / inverse)
        codes = torch.zeros(len(x), tiled.rows, dtype=torch.int8, device="cuda")
        return lambda: gemm(x, None, rows, tiled.factor, landing, Finish(LAND, codes)), laid_out
    residual = torch.zeros(len(x), tiled.rows, device="cuda")
    return lambda: gemm(x, None, rows, tiled.factor, None, Finish(RESIDUAL, residual=residual)), laid_out


def ours(outputs: int, width: int, rows: int, number: int) -> dict[str, list[Launch]]:
    """Our products, and torch's of the same sizes without scales."""
    sets: dict[str, list[Launch]] = {"w8a8": [], "w4a8": [], "bfloat16 torch.mm": []}
    for _ in range(number):
        for bits in (8, 4):
            weight = random_linear(outputs, width, bits)
            format = Format.INT8_INT8 if bits == 8 else Format.INT4_INT8
            tiled = tile_linear(weight, format, choose_shape(outputs, width, format).tile_rows, "cuda")
            x = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
            assert isinstance(weight.weight, QTensor)
            if rows == 1:
                sets[f"w{bits}a8"].append(our_vector(weight.weight, tiled, x))
                continue
            launch, laid_out = our_product(weight.weight, tiled, x)
            sets[f"w{bits}a8"].append(launch)
            if bits == 8:
                theirs = sets.setdefault("torch._int_mm", [])
                theirs.append(lambda x=x, weight=laid_out: torch._int_mm(x, weight.T))
        a = torch.randn(rows, width, device="cuda").bfloat16()
        b = torch.randn(outputs, width, device="cuda").bfloat16()
        sets["bfloat16 torch.mm"].append(lambda a=a, b=b: a @ b.T)
    return sets


def gemlite(outputs: int, width: int, rows: int, number: int) -> dict[str, list[Launch]]:
    """Its products of the same sizes: activations come in bfloat16 and, where it says a8, are rounded in the launch.

    With its kernels' default configurations: trying all of them takes minutes for these sizes.
    """
    import gemlite as library
    from gemlite import helper

    library.set_autotune("default")
    sets: dict[str, list[Launch]] = {"gemlite a8w8 (untuned)": [], "gemlite a16w4 (untuned)": []}
    for one in range(number):
        x = torch.randn(rows, width, device="cuda").bfloat16()
        for name, bits in (("gemlite a8w8 (untuned)", 8), ("gemlite a16w4 (untuned)", 4)):
            weight = random_linear(outputs, width, bits).weight
            assert isinstance(weight, QTensor)
            codes, scale = weight.codes(), weight.scale
            if bits == 8:
                layer = helper.A8W8_int8_dynamic("cuda", torch.bfloat16).from_weights(codes, scales=scale)
            else:
                zeros = torch.full_like(scale, 8.0)
                parts = ((codes + 8).to(torch.uint8), scale.reshape(-1, 1), zeros.reshape(-1, 1))
                layer = helper.A16W4_HQQ_INT("cuda", torch.bfloat16).from_weights(*parts)
            if one == 0:
                check(name, layer(x), x, weight, RIVAL_TOLERANCE)
            sets[name].append(lambda x=x, layer=layer: layer(x))
    return sets


def product(outputs: int, width: int, rows: int, number: int = SETS) -> Iterator[dict[str, Any]]:
    """Rows of the table for one size; a library that fails says so in its row. ``number``: of sets of data."""
    about = {"rows": rows, "outputs": outputs, "width": width}
    sets: dict[str, list[Launch] | str] = dict(ours(outputs, width, rows, number))
    if importlib.util.find_spec("gemlite") is None:
        sets["gemlite"] = "not importable"
    else:
        try:
            sets |= gemlite(outputs, width, rows, number)
        except Exception as error:  # whatever another library may raise
            sets["gemlite"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    for name, launches in sets.items():
        if isinstance(launches, str):
            yield about | {"product": name, "problem": launches}
            continue
        times = microseconds(launches)
        tops = 2 * rows * outputs * width / times["median"] * 1e-6
        yield about | {"product": name, "us": times, "tops": tops}


def compiled_product(outputs: int, width: int, rows: int) -> None:
    """Everything that ``product`` launches, checked and compiled."""
    for _ in product(outputs, width, rows, number=1):
        pass


def show(row: dict[str, Any]) -> None:
    size = f"{row['rows']:5} x {row['width']} x {row['outputs']:6} {row['product']:23}"
    if "problem" in row:
        print(size, row["problem"], flush=True)
        return
    us = row["us"]
    print(f"{size} {us['median']:8.1f} us ({us['p10']:.1f}-{us['p90']:.1f}) {row['tops']:6.0f} TOPS", flush=True)
