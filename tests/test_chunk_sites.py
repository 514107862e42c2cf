"""Mamba-2's scan with sites inside its chunks (SSDi8): its integers written out by hand, and every way to run them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of
from torch.nn.functional import softplus

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import evaluate
from squamata.kernels import ops
from squamata.kernels.causal_conv1d import causal_conv1d
from squamata.kernels.dispatch import use_backend
from squamata.kernels.grid import Grid
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Mode, Site, encode
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan.chunks import ChunkSites
from squamata.kernels.ssd_scan.ref import run as ssd_scan
from squamata.models.block import ScanCache
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.models.mamba2 import Mamba2
from squamata.pipeline import load, quantize
from squamata.run.decode_plan import plan_model
from squamata.run.gpu_plan import Planner
from squamata.run.model import Model
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

B_, H, P, G, N, CHUNK = 2, 4, 3, 2, 5, 16
LAYOUT = HeadLayout(H, P, G, N, CHUNK, (0.0, math.inf))
LAYOUTS = {
    "B_conv": Layout(("ssd_group", "state"), (G, N)),
    "C_conv": Layout(("ssd_group", "state"), (G, N)),
    "scores": Layout(("ssd_group",), (G,)),
    "u_scaled": Layout(("head", "channel"), (H, P)),
    "chunk_decay": Layout(("head",), (H,)),
    "state": Layout(("head", "channel", "state"), (H, P, N), flat=False),
}
AWAY: dict[str, Any] = {"bits": 8, "rounding": "half-away"}
SSDI8: dict[str, dict[str, Any]] = {
    "B_conv": AWAY | {"granularity": "ssd_group"},
    "C_conv": AWAY | {"granularity": "ssd_group"},
    "scores": AWAY | {"granularity": "ssd_group"},
    "u_scaled": AWAY | {"granularity": "channel"},
    "chunk_decay": {"bits": 7, "codec": "fixed", "rounding": "half-away"},
    "state": AWAY | {"granularity": "channel"},
}
Inputs = dict[str, torch.Tensor]


def inputs(length: int, seed: int = 0) -> Inputs:
    """Float inputs of the scan; heads that forget at once and that hardly forget."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "u": normal(B_, length, H * P) * torch.linspace(0.2, 3, H * P), "dt": normal(B_, length, H),
        "B": normal(B_, length, G * N), "C": normal(B_, length, G * N) * 2, "dt_bias": normal(H),
        "A": -torch.tensor([0.001, 0.03, 0.3, 2.0]), "D": normal(H),
    }  # fmt: skip


def make_sites(specs: dict[str, dict[str, Any]], scales: dict[str, torch.Tensor], mode: Mode) -> dict[str, Site]:
    return {
        name: Site(name, layout, QuantSpec.model_validate(specs[name]) if name in specs else None, scales.get(name),
                   mode=mode)
        for name, layout in LAYOUTS.items()
    }  # fmt: skip


def scales_for(x: Inputs) -> dict[str, torch.Tensor]:
    """Plausible scales, a different one for every group; some so small that values are clamped."""
    generator = torch.Generator().manual_seed(7)

    def spread(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    return {
        "B_conv": 0.02 * spread(G), "C_conv": 0.04 * spread(G), "scores": 0.1 * spread(G),
        "u_scaled": 0.03 * spread(H, P), "state": 0.15 * spread(H, P), "chunk_decay": torch.ones(()),
    }  # fmt: skip


def scan(x: Inputs, sites: dict[str, Site], state: Value) -> tuple[torch.Tensor, Value]:
    chunks = ChunkSites.of(sites)
    assert chunks is not None
    B, C = (sites[name].land(x[name[0]]) for name in ("B_conv", "C_conv"))
    return chunks.scan(x["u"], x["dt"], B, C, state, (x["A"], x["D"], x["dt_bias"]), LAYOUT, sites)


def away(x: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round half away from zero and clamp to int8 without -128."""
    return np.clip(np.sign(x) * np.floor(np.abs(x) + 0.5), -127, 127).astype(np.int64)


def ssdi8(x: Inputs, scales: dict[str, torch.Tensor], state: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """SSDi8's scan as its kernels compute it, token by token and number by number where that is clear enough:
    y (B, L, H, P) and the last state's codes."""
    f = {name: part.double().numpy() for name, part in x.items()}
    s = {name: part.double().numpy() for name, part in scales.items()}
    length = f["dt"].shape[1]
    u, dt = f["u"].reshape(B_, length, H, P), np.log1p(np.exp(f["dt"] + f["dt_bias"]))
    qB = away(f["B"].reshape(B_, length, G, N) / s["B_conv"][:, None])
    qC = away(f["C"].reshape(B_, length, G, N) / s["C_conv"][:, None])
    y, s32 = np.zeros((B_, length, H, P)), state.copy()
    for b in range(B_):
        for h in range(H):
            g = h // (H // G)
            for start in range(0, length, CHUNK):
                tokens = range(start, min(start + CHUNK, length))
                dA = np.cumsum([dt[b, t, h] * f["A"][h] for t in tokens])
                stored = np.clip(s32[b, h], -127, 127)
                accumulated = np.zeros((P, N), np.int64)
                for i, t in enumerate(tokens):
                    y[b, t, h] = np.exp(dA[i]) * (stored @ qC[b, t, g]) * s["C_conv"][g] * s["state"][h]
                    for j, k in enumerate(tokens[: i + 1]):
                        cb = away((qC[b, t, g] @ qB[b, k, g]) * s["C_conv"][g] * s["B_conv"][g] / s["scores"][g])
                        y[b, t, h] += cb * s["scores"][g] * np.exp(dA[i] - dA[j]) * dt[b, k, h] * u[b, k, h]
                    y[b, t, h] += f["D"][h] * u[b, t, h]
                    scaled = away(np.exp(dA[-1] - dA[i]) * dt[b, t, h] * u[b, t, h] / s["u_scaled"][h])
                    accumulated += np.outer(scaled, qB[b, t, g])
                new = away(accumulated * (s["u_scaled"][h] * s["B_conv"][g] / s["state"][h])[:, None])
                gate = min(int(np.floor(np.exp(dA[-1]) * 128 + 0.5)), 127)
                s32[b, h] = ((s32[b, h] * gate + 64) >> 7) + new
    return y, np.clip(s32, -127, 127)


@pytest.mark.parametrize("mode", ["integer", "simulate"])
@pytest.mark.parametrize("length", [1, 3, 16, 50])
def test_the_integers_are_ssdi8s(length: int, mode: Mode) -> None:
    x = inputs(length)
    scales = scales_for(x)
    sites = make_sites(SSDI8, scales, mode)
    before = torch.randint(-127, 128, (B_, H, P, N), generator=torch.Generator().manual_seed(3))
    carried = before.float() if mode == "simulate" else before.to(torch.int8)
    state = QTensor(carried, sites["state"].expanded().scale, QuantSpec.model_validate(SSDI8["state"]))
    y, after = scan(x, sites, state)
    wanted, codes = ssdi8(x, scales, before.numpy())
    assert isinstance(after, QTensor) and after.data.dtype == carried.dtype
    np.testing.assert_array_equal(after.data.numpy().astype(np.int64), codes)
    np.testing.assert_allclose(y.double().numpy().reshape(wanted.shape), wanted, rtol=1e-4, atol=2e-4)
    if length > 2 * CHUNK:
        assert np.abs(codes).max() == 127  # clamping was reached


def test_clamping_is_of_what_is_read_not_of_what_goes_on() -> None:
    """A state that grows past int8 in one chunk comes back by itself: codes 200, then (200 g + 64) >> 7."""
    site = make_sites(SSDI8, {"state": torch.full((H, P), 1.0)}, "integer")["state"]
    from squamata.kernels.ssd_scan.chunks import Running

    running = Running(site, site.empty(1, H, P, N), torch.float32)
    for gate, added, wide, read in ((0.0, 100.0, 100, 100), (127 / 128, 100.0, 199, 127), (0.5, 0.0, 100, 100)):
        running.advance(torch.full((1, H), gate), torch.full((1, H, P, N), added))
        assert set(running.wide.flatten().tolist()) == {wide}
        assert isinstance(running.landed, QTensor) and set(running.landed.data.flatten().tolist()) == {read}


@pytest.mark.parametrize("bits", range(2, 13))
def test_a_product_with_a_fixed_point_number_is_a_product_and_a_shift(bits: int) -> None:
    spec = QuantSpec(bits=bits, codec="fixed", rounding="half-away")
    x = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([-0.3, 1.0, 1.5])])
    stored = encode(x, Grid.of(torch.tensor(1.0)), spec)
    assert stored.data.tolist() == [min(max(math.floor(v * 2**bits + 0.5), 0), 2**bits - 1) for v in x.tolist()]
    state = torch.arange(-300, 301)
    shifted = (state[:, None] * stored.data[None].long() + 2 ** (bits - 1)) >> bits
    multiplied = torch.floor(state.double()[:, None] * stored.dequantize().double()[None] + 0.5)
    assert torch.equal(multiplied.long(), shifted)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_observers_see_the_definition_and_change_nothing(length: int) -> None:
    x = inputs(length)
    sites, seen = make_sites({}, {}, "float"), dict[str, list[torch.Tensor]]()
    for name in ("scores", "u_scaled", "chunk_decay", "state"):
        sites[name].observer = seen.setdefault(name, []).append
    state = torch.randn(B_, H, P, N, generator=torch.Generator().manual_seed(3))
    y, after = scan(x, sites, state)
    wanted, last = ssd_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["dt_bias"], state, LAYOUT)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(as_float(after), last, rtol=1e-4, atol=1e-4)

    dt = softplus(x["dt"] + x["dt_bias"]).double()
    first = dt[:, :CHUNK]
    decay = (first * x["A"]).cumsum(1)
    torch.testing.assert_close(seen["chunk_decay"][0].double(), decay[:, -1].exp(), rtol=1e-5, atol=1e-6)
    u = x["u"][:, :CHUNK].double().unflatten(2, (H, P)) * ((decay[:, -1:] - decay).exp() * first)[..., None]
    torch.testing.assert_close(seen["u_scaled"][0].double(), u.flatten(2), rtol=1e-5, atol=1e-6)
    assert seen["scores"][0].shape == (B_, min(length, CHUNK) * (min(length, CHUNK) + 1) // 2, G)
    assert len(seen["state"]) == -(-length // CHUNK)
    torch.testing.assert_close(seen["state"][-1], last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "head", "group(3)"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("left_out", [*SSDI8, "nothing"])
def test_any_subset_of_the_sites_comes_near_the_recurrence(left_out: str, bits: int, granularity: str) -> None:
    """Whatever shares a scale: what cannot be summed as codes, and 16 bits, is multiplied as values."""
    x = inputs(40)
    fine: dict[str, dict[str, Any]] = {name: {"bits": bits} for name in SSDI8} | {
        "u_scaled": {"bits": bits, "granularity": granularity},
        "state": {"bits": bits, "granularity": {"group(3)": "state", "head": "head"}.get(granularity, "channel,state")},
        "chunk_decay": {"bits": 12, "codec": "fixed"},
    }
    fine.pop(left_out, None)
    plain = make_sites({}, {}, "float")
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("scores", "u_scaled", "chunk_decay", "state")}
    for name, found in seen.items():
        plain[name].observer = found.append
    wanted, last = scan(x, plain, torch.zeros(B_, H, P, N))
    ranges = {name: torch.cat([part.flatten() for part in found]).abs().max() for name, found in seen.items()}
    ranges |= {"B_conv": x["B"].abs().max(), "C_conv": x["C"].abs().max()}
    sites = make_sites(fine, {}, "integer")
    for name, site in sites.items():
        if site.spec is not None:
            one = torch.tensor(1.0) if name == "chunk_decay" else ranges[name] / site.spec.span
            site.set_scale(one.expand(site.partition.shape()).clone())
    y, after = scan(x, sites, sites["state"].empty(B_, H, P, N))
    near = 0.03 if bits == 8 else 0.001
    assert float((y - wanted).norm() / wanted.norm()) < near
    assert float((as_float(after) - as_float(last)).norm() / as_float(last).norm()) < near


def checkpoint_of(*rules: dict[str, Any], base: str | None = "ssdi8-w8a8", **overrides: Any) -> Checkpoint:
    config = config_of("mamba2", chunk_size=16, **overrides)
    recipe = recipe_of(*rules, **({"extends": base} if base else {}))
    return quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 2, 40)])


@pytest.mark.parametrize(
    "rules",
    [(), ({"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "channel", "dynamic": True}},),
     ({"site": "*.mixer.decay", "spec": {"bits": 8, "codec": "ltsq-fine"}},),
     ({"site": "*.mixer.chunk_decay", "spec": "float"},)],
    ids=["as it is", "dynamic state", "decay too", "float gate"],
)  # fmt: skip
def test_integers_are_simulation_and_what_is_saved_is_read(rules: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(*rules)
    ids = random_ids(checkpoint.config, 2, 40, 5)
    integer, simulated = LanguageModel(checkpoint), LanguageModel(checkpoint, "simulate")
    with use_backend("ref"):
        logits = integer(ids)
        assert torch.equal(logits, simulated(ids))
        caches = integer.new_cache(2), simulated.new_cache(2)
        assert torch.equal(integer.forward(ids[:, :23], caches[0]), simulated.forward(ids[:, :23], caches[1]))
        for t in range(23, 27):
            assert torch.equal(integer.step(ids[:, t], caches[0]), simulated.step(ids[:, t], caches[1]))
        write_checkpoint(checkpoint, tmp_path / "out")
        assert torch.equal(LanguageModel(read_checkpoint(tmp_path / "out"))(ids), logits)
    config = config_of("mamba2", chunk_size=16)
    plain = float_model(config, perturbed_tensors(config))(ids)
    assert float((logits - plain).abs().mean()) < 0.1 * float(plain.abs().mean())


def test_a_rule_for_everything_names_none_of_them() -> None:
    everything = checkpoint_of({"site": "*.mixer.*", "spec": {"bits": 8}}, base=None)
    model = LanguageModel(everything)
    assert not {name for site in model.sites() for name in ChunkSites._fields if site.name.endswith(name)}
    plan_model(model)


def test_a_token_alone_is_the_recurrence_compiled_or_not() -> None:
    """No chunk, no gate: only the state, which a prompt left in codes, is rounded after it."""
    checkpoint = checkpoint_of()
    model, ids = Model(checkpoint), random_ids(checkpoint.config, 2, 30, 5)
    block = model.blocks[0]
    assert isinstance(block, Mamba2)
    x, B, C, dt = (torch.randn(2, 1, size, generator=torch.Generator().manual_seed(size)) for size in (64, 32, 32, 4))
    with use_backend("ref"):
        cache, reference = model.new_cache(2), model.new_cache(2)
        for each in (cache, reference):
            model.forward(ids[:, :20], each)
        given = cache[0]
        assert isinstance(given, ScanCache) and isinstance(given.state, QTensor)
        before = given.state.dequantize()
        y = ops.conv_ssd_scan(x, B, C, dt, block.scan, as_float(given.conv).clone(), given.state, block.sites)
        conv = as_float(reference[0].conv).clone()  # type: ignore[attr-defined]
        landing = tuple(block.sites[name] for name in ("u", "B_conv", "C_conv"))
        u, B, C = causal_conv1d((x, B, C), block.scan.conv_weight, block.scan.conv_bias, conv, landing)
        scan = block.scan
        wanted, after = ssd_scan(u, dt, scan.A, B, C, scan.D, scan.dt_bias, before, scan.layout)
        assert torch.equal(y, wanted)
        stored = block.sites["state"].land(after)
        assert isinstance(stored, QTensor) and torch.equal(stored.data, given.state.data)
        cache = model.new_cache(2)
        model.forward(ids[:, :20], cache)
        steps = [model.step(ids[:, t], reference) for t in (20, 21, 22)]
    for t, expected in zip((20, 21, 22), steps, strict=True):
        found = model.step(ids[:, t], cache)
        assert float((found - expected).norm() / expected.norm()) < 0.05
    assert model._decoder is not None


@pytest.mark.parametrize("site", ChunkSites._fields)
def test_the_gpu_kernels_decline(site: str) -> None:
    spec = {"bits": 7, "codec": "fixed"} if site == "chunk_decay" else {"bits": 8}
    model = LanguageModel(checkpoint_of({"site": f"*.mixer.{site}", "spec": spec}, base=None))
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    planner = Planner(1, torch.device("cpu"), False, torch.float32, False)
    with pytest.raises(SquamataError, match=site if site != "chunk_decay" else "linear_grid|symmetric|chunk_decay"):
        planner.model(model)


def test_scales_learn_through_the_chunks() -> None:
    """Gradients pass the integer state and every site in it."""
    x = inputs(50)
    sites = make_sites(SSDI8, scales_for(x), "simulate")
    x["u"].requires_grad_()
    y, _ = scan(x, sites, sites["state"].empty(B_, H, P, N))
    y[:, -10:].sum().backward()
    assert x["u"].grad is not None
    assert float(x["u"].grad[:, :CHUNK].abs().max()) > 0  # through two states


@pytest.fixture(scope="module")
def judged(bundled_folder: Path, bundled_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """KL to the float model, nats a token, of a recipe on the bundled model."""
    original = load(bundled_folder, mode="float")
    folder = tmp_path_factory.mktemp("judged")

    def kl(name: str, recipe: Recipe, mode: str = "parallel", tokens: int = 1024) -> float:
        out = folder / name
        if not out.exists():
            quantize(bundled_folder, recipe, out, calibration=bundled_calibration, samples=8, length=256)
        found = evaluate(load(out), bundled_folder / "excerpt.jsonl", original, 512, tokens, mode)
        assert found.kl is not None
        return found.kl

    return kl


def test_what_its_scales_and_its_correction_are_worth(judged: Any) -> None:
    """A scale a (head, channel) and group beats one a tensor; the mean's correction harms nothing."""
    recipe = Recipe.read("ssdi8-w8a8")
    assert recipe.correct is not None
    one_scale = Recipe.from_mapping({
        "name": "one scale", "extends": "ssdi8-w8a8", "rules": [
            {"site": f"*.mixer.{name}", "spec": AWAY} for name in ("B_conv", "C_conv", "scores", "u_scaled", "state")
        ],
    })  # fmt: skip
    found = judged("as-it-is", recipe)
    assert found < 0.1
    assert found < judged("one-scale", one_scale)
    assert found < 1.02 * judged("uncorrected", recipe.model_copy(update={"correct": None}))
