"""What a scan leaves for out_proj itself, and the counters that it waits for, in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.kernels.decode.triton import Mamba2Layer
from squamata.kernels.gpu.gemv import INTERPRETED, Blocks, Count, Shape, gemv, product
from squamata.kernels.gpu.scan import InputPlan, ssd_step
from squamata.kernels.gpu.tiles import Format, tile_linear
from squamata.kernels.linear import Linear
from squamata.kernels.packing import pack_int4
from squamata.kernels.qtensor import QTensor
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.spec.quant import QuantSpec

DEVICE = "cpu" if INTERPRETED else "cuda"
EPSILON = 1e-3
W4A16 = [{"site": "*.in_proj.weight", "spec": {"bits": 4, "granularity": "group(32)", "full_range": True}},
         {"site": "*.out_proj.weight", "spec": {"bits": 4, "granularity": "group(32)", "full_range": True}},
         ]  # fmt: skip


def in_blocks(x: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, K) in 16 bits with a scale a block: codes, scales as products take them, and values."""
    parts = x.unflatten(1, (-1, channels))
    scale = parts.abs().amax(2, keepdim=True) / 32512
    codes = (parts / scale).round()
    upper = ((codes + 128) / 256).floor()
    halves = torch.cat([upper.flatten(1), (codes - 256 * upper).flatten(1)], 1).to(torch.int8)
    return halves, (scale / 16).squeeze(2), (codes * scale).flatten(1)


def random_weight(rows: int, columns: int, group: int | None) -> QTensor:
    spec = QuantSpec(bits=4, full_range=True, granularity=f"group({group})" if group else "channel")
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows, columns // group if group else 1) * 0.01 + 0.001
    return QTensor(pack_int4(codes), scale, spec, None, columns)


@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("channels", [16, 32, 64])
def test_a_product_of_blocks_in_16_bits_agrees_with_the_exact_one(
    channels: int, group: int | None, groups: int
) -> None:
    """``groups``: of a norm that is still to be applied; 0: none."""
    torch.manual_seed(channels)
    rows, outputs, columns = 3, 37, 384
    weight = random_weight(outputs, columns, group)
    tiled = tile_linear(Linear(weight), Format.INT4_INT16, 8, DEVICE)
    x, scale, values = in_blocks(torch.randn(rows, columns) * torch.rand(columns).exp(), channels)
    squares = torch.rand(rows, columns // channels)
    blocks = Blocks(
        channels, groups=max(groups, 1), epsilon=EPSILON, squares=squares.to(DEVICE) if groups else None,
        scale=scale.contiguous().to(DEVICE),
    )  # fmt: skip
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    made = product(
        x.to(DEVICE), None, tiled, tiled.factor, None, (None, out), None, Shape(8, 2), blocks=blocks
    )  # fmt: skip
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    exact = normed(values, squares, groups) @ weight.dequantize(torch.float64).T
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def normed(values: torch.Tensor, squares: torch.Tensor, groups: int) -> torch.Tensor:
    """values (rows, K) in float64 over the root mean square of their group, from sums of squares (rows, blocks)."""
    if not groups:
        return values.double()
    mean = squares.double().unflatten(1, (groups, -1)).sum(2) / (values.shape[1] // groups)
    return (values.double().unflatten(1, (groups, -1)) * (mean + EPSILON).rsqrt()[:, :, None]).flatten(1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("format", [Format.FLOAT32_FLOAT, Format.INT4_FLOAT])
def test_a_product_applies_the_norm_that_the_scan_left(format: Format, groups: int) -> None:
    torch.manual_seed(groups)
    rows, outputs, columns, channels = 2, 24, 384, 16
    weight = torch.randn(outputs, columns) if format == Format.FLOAT32_FLOAT else random_weight(outputs, columns, 32)
    tiled = tile_linear(Linear(weight), format, 8, DEVICE)
    x, squares = torch.randn(rows, columns), torch.rand(rows, columns // channels)
    blocks = Blocks(channels, groups=groups, epsilon=EPSILON, squares=squares.to(DEVICE))
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    made = product(
        x.to(DEVICE), None, tiled, tiled.factor, None, (None, out), None, Shape(8, 4), blocks=blocks
    )  # fmt: skip
    gemv(made, torch.zeros(1, dtype=torch.int32, device=DEVICE), pdl=False)
    weights = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)
    exact = normed(x, squares, groups) @ weights.T
    assert torch.allclose(out.cpu().double(), exact, rtol=1e-5, atol=1e-4)


def scanned(halves: bool, after: Count | None = None) -> tuple[torch.Tensor, Blocks, torch.Tensor]:
    """One token of two sequences, 2 heads of 32 channels, 16 states, blocks of 16: what is left, and y gate in
    float64."""
    torch.manual_seed(7)
    rows, heads, width, states, channels = 2, 2, 32, 16, 16
    inner = heads * width
    mixed, state = torch.randn(rows, inner + 2 * states), torch.randn(rows, heads, width, states)
    dt, bias, A, skip = torch.randn(rows, heads), torch.randn(heads), -torch.rand(heads), torch.randn(heads)
    gate, gain = torch.randn(rows, inner), torch.rand(inner) + 0.5
    squares, scale = (torch.full((rows, inner // channels), float("nan"), device=DEVICE) for _ in range(2))
    blocks = Blocks(
        channels, gate.to(DEVICE), gain.to(DEVICE), squares=squares, scale=scale if halves else None
    )  # fmt: skip
    kind = torch.int8 if halves else torch.float32
    out = torch.full((rows, inner * (2 if halves else 1)), 99, dtype=kind, device=DEVICE)
    moved = [part.to(DEVICE) for part in (mixed, dt, bias, A, skip)]
    ssd_step(
        moved[0], (moved[1], moved[1]), InputPlan(False, torch.ones(heads, device=DEVICE)), tuple(moved[2:]),
        state.clone().to(DEVICE), None, out, 0, 1, (0.0, 1e9), channels, False, after, blocks,
    )  # fmt: skip
    u, B, C = (part.double() for part in mixed.split([inner, states, states], 1))
    u, step = u.unflatten(1, (heads, width)), torch.nn.functional.softplus(dt.double() + bias)
    new = (step * A).exp()[..., None, None] * state + (step[..., None] * u)[..., None] * B[:, None, None]
    y = (new * C[:, None, None]).sum(-1) + skip[:, None] * u
    return out.cpu(), blocks, torch.stack([y.flatten(1) * gate, (y.flatten(1) * gate) * gain])


@pytest.mark.parametrize("halves", [False, True])
def test_a_scan_gates_and_leaves_its_blocks(halves: bool) -> None:
    out, blocks, (gated, wanted) = scanned(halves)
    assert blocks.squares is not None
    sums = gated.square().unflatten(1, (-1, blocks.channels)).sum(2)
    assert torch.allclose(blocks.squares.cpu().double(), sums, rtol=1e-4)
    if blocks.scale is None:
        assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-5)
        return
    step = 16 * blocks.scale.cpu().double().repeat_interleave(blocks.channels, 1)
    upper, lower = out.double().chunk(2, 1)
    assert torch.allclose(step * 32512, wanted.abs().unflatten(1, (-1, 16)).amax(2).repeat_interleave(16, 1), rtol=1e-5)
    assert bool((((256 * upper + lower) * step - wanted).abs() <= 0.51 * step + 1e-5 * wanted.abs()).all())


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernel would wait for ever")
def test_a_scan_does_not_go_on_before_its_programs_have_counted() -> None:
    """With two tokens behind it, five programs a token: at 14 one is missing, at 15 all are there."""
    steps = torch.tensor([2])
    scanned(False, Count(torch.tensor([15]), steps, 5))
    with pytest.raises(Exception, match="programs are missing"):
        scanned(False, Count(torch.tensor([14]), steps, 5))


def programs(layer: object) -> int:
    """Programs of the product that a layer's scan waits for, with one sequence."""
    return len(layer.scan_proj.linear.words) if isinstance(layer, Mamba2Layer) else 0


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_counters_stand_at_the_tokens_whatever_happens_between(kind: str) -> None:
    """Steps, a cache loaded, states forgotten, a prefill, kernels one by one: after each the next token is right."""
    config = config_of(kind, d_model=64, d_inner=128, **({"dt_rank": 16} if kind == "mamba1" else {"head_dim": 32}))
    model = LanguageModel(quantized(config, perturbed_tensors(config), recipe_of(*W4A16), []))
    ids = random_ids(config, 1, 6, seed=1).to(DEVICE)
    decoder = CapturedDecoder(model, 1, DEVICE, weights="float32", pdl=False)
    fresh = [decoder.step(ids[:, token]).clone() for token in range(3)]
    behind = int(decoder.plan.buffers.steps)
    assert decoder.plan.counters[:, 0].tolist() == [behind * programs(layer) for layer in decoder.plan.layers]
    assert not decoder.plan.counters[:, 1:].any()
    counters = decoder.plan.counters.clone()
    for _, launch in decoder.kernels():
        launch()
    assert torch.equal(decoder.plan.counters, counters) and int(decoder.plan.buffers.steps) == behind
    decoder.load_cache(model.new_cache(1))
    decoder.prefill(ids)
    decoder.reset()
    again = [decoder.step(ids[:, token]).clone() for token in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("rules", [[], W4A16], ids=["float", "w4a16"])
def test_a_layer_without_its_rotation_kernel_gives_what_it_gives_with_it(kind: str, rules: list[object]) -> None:
    """Two groups of the norm in Mamba-2; 16-bit activations with a scale a block are no coarser than with one a row."""
    sizes = {"dt_rank": 16} if kind == "mamba1" else {"head_dim": 32, "n_groups": 2}
    config = config_of(kind, d_model=64, d_inner=128, **sizes)
    model = LanguageModel(quantized(config, perturbed_tensors(config), recipe_of(*rules), []))
    joined, apart = (CapturedDecoder(model, 2, DEVICE, pdl=False) for _ in range(2))
    layers = apart.plan.layers
    assert all(layer.exit.block for layer in layers)
    apart.plan.layers = [replace(layer, exit=replace(layer.exit, block=0)) for layer in layers]
    assert [name for name, _ in joined.kernels()].count("rotate") == 0
    assert [name for name, _ in apart.kernels()].count("rotate") == len(layers)
    ids = random_ids(config, 2, 4, seed=1).to(DEVICE)
    for token in range(4):
        wanted, got = apart.step(ids[:, token]), joined.step(ids[:, token])
        assert float((got - wanted).norm() / wanted.norm()) < 2e-4
