"""Quamba2's scales in the integer runtime: u and state along index maps, B and C per SSD group; prefill and decode."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor, as_float, store
from squamata.kernels.site import Site, observing
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import Cache, LanguageModel
from squamata.run.decode_plan import Decoder
from squamata.spec.quant import QuantSpec

PIECES = (
    {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index", "rounding": "half-away"}},
    {"site": "*.mixer.[BC]_conv", "spec": {"bits": 8, "granularity": "ssd_group"}},
)
STATES: dict[str, dict[str, Any]] = {
    "static": {"bits": 8, "granularity": "index,state", "rounding": "half-away"},
    "static-without-index": {"bits": 8, "granularity": "index"},
    "static-4-bit": {"bits": 4, "granularity": "index,state"},
    "run-time": {"bits": 8, "granularity": "channel", "dynamic": True},
}
W4 = {"bits": 4, "granularity": "group(32)", "full_range": True}
TIPPED = 2e-2  # of logits: a code may lie a tie away (see assert_near), which moves a tiny model's logits so far
SHAPES: dict[str, dict[str, Any]] = {
    "G1": {"d_inner": 64, "head_dim": 16, "n_groups": 1},
    "G2-odd": {"d_model": 40, "d_inner": 80, "head_dim": 8, "n_groups": 2, "d_state": 20},  # 5 heads a group
    "G8": {"d_inner": 192, "head_dim": 8, "n_groups": 8, "d_state": 24},  # 3 heads a group
    "G3-odd": {"d_model": 36, "d_inner": 105, "head_dim": 7, "n_groups": 3, "d_state": 9},  # 5 heads of 7 channels
}


@cache
def checkpoint_of(shape: str, state: str, four_bits: bool = False) -> Checkpoint:
    config = config_of("mamba2", **SHAPES[shape])
    batches = [random_ids(config, 2, 24, seed) for seed in range(2)]
    weights = ({"site": "*_proj.weight", "spec": W4},) if four_bits else ()
    rules = (*PIECES, {"site": "*.mixer.state", "spec": STATES[state]}, *weights)
    recipe = recipe_of(*rules, extends="quamba-w8a8", transforms=[{"reorder": {"channel_groups": 3}}, "hadamard"])
    return quantized(config, perturbed_tensors(config), recipe, batches)


def codes_of(cache: Cache) -> list[torch.Tensor]:
    """Integers of the convolution's and the scan's memory of every layer."""
    values = [value for layer in cache for value in (layer.conv, layer.state)]  # type: ignore[attr-defined]
    assert all(isinstance(value, QTensor) for value in values)
    return [value.codes().int() for value in values]


@pytest.mark.parametrize("length", [3, 37])
@pytest.mark.parametrize("state", list(STATES))
@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_prefill_gives_the_integers_of_the_simulation(shape: str, state: str, length: int) -> None:
    """Every site, code by code; then the caches and the logits without observers, where kernels land by themselves."""
    checkpoint = checkpoint_of(shape, state)
    ids = random_ids(checkpoint.config, 2, length, seed=7)
    contestants = (("simulate", "ref"), ("integer", "ref"), ("integer", "cpu"))
    found = [everything(LanguageModel(checkpoint, mode), backend, ids) for mode, backend in contestants]  # type: ignore[arg-type]
    simulated, *others = found
    for codes, memory, logits in others:
        assert codes.keys() == simulated[0].keys()
        assert_near(list(codes.values()), list(simulated[0].values()))
        assert_near(memory, simulated[1])
        torch.testing.assert_close(logits, simulated[2], rtol=TIPPED, atol=TIPPED)
    assert all(map(torch.equal, found[0][1], found[1][1])) and torch.equal(found[0][2], found[1][2])


def everything(model: LanguageModel, backend: str, ids: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    """Codes by site, codes of the caches, logits."""
    codes: dict[str, torch.Tensor] = {}
    with use_backend(backend):
        with observing(model.sites(), lambda site, x: codes.update({site.name: landed(site, x)})):
            model(ids)
        cache = model.new_cache(len(ids))
        logits = model.forward(ids, cache)
    return codes, codes_of(cache), logits


def landed(site: Site, x: torch.Tensor) -> torch.Tensor:
    """The codes that a value becomes; float sites: nothing to compare."""
    if site.spec is None:
        return torch.zeros(1, dtype=torch.int32)
    inverse = site.runtime_grid(x)[1] if site.spec.dynamic else site.expanded()[1]
    return torch.round(x * inverse).clamp(*site.spec.code_range).int()


def assert_near(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """At most one unit apart, and that in at most one value of a thousand (tiny tensors: one value)."""
    for mine, reference in zip(ours, theirs, strict=True):
        off = (mine - reference).abs()
        assert int(off.max()) <= 1 and int((off > 0).sum()) <= max(1, off.numel() // 1000)


@pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("state", list(STATES))
@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_compiled_decode_follows_the_reference(shape: str, state: str, four_bits: bool) -> None:
    """Token by token from the same cache; the plan must take every one of these sites."""
    model = LanguageModel(checkpoint_of(shape, state, four_bits))
    decoder, ours, theirs = Decoder(model), model.new_cache(), model.new_cache()
    simulation = LanguageModel(model.checkpoint, "simulate")
    imagined, states = simulation.new_cache(), {}
    for token in random_ids(model.config, 1, 10, seed=6)[0]:
        with use_backend("ref"), observing(model.sites(), lambda site, x: states.update({site.name: (site, x)})):
            expected, simulated = model.step(token[None], theirs), simulation.step(token[None], imagined)
        assert torch.equal(expected, simulated) and all(map(torch.equal, codes_of(theirs), codes_of(imagined)))
        logits = decoder.step(token[None], ours)
        torch.testing.assert_close(logits, expected, rtol=TIPPED, atol=TIPPED)
        for layer, (got, want) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(got.conv.data, want.conv.data)  # type: ignore[attr-defined]
            assert_only_ties_differ(got.state, want.state, *states[f"layers.{layer}.mixer.state"])  # type: ignore[attr-defined]
            store(got.state, want.state)  # type: ignore[attr-defined]


def assert_only_ties_differ(ours: QTensor, theirs: QTensor, site: Site, x: torch.Tensor) -> None:
    """One unit at most, where the value was as good as half way between two codes.

    With a run-time scale these come in bursts: after the first token a row of the state is a multiple of B's integers,
    divided by the largest of them, and so half way exactly for many of its indices at once.
    """
    inverse = site.runtime_grid(x)[1] if theirs.spec.dynamic else site.expanded()[1]
    from_tie = ((x * inverse).frac().abs() - 0.5).abs()
    off = (ours.data.int() - theirs.data.int()).abs()
    assert int(off.max()) <= 1 and bool((from_tie[off > 0] < 1e-4).all())
    torch.testing.assert_close(ours.scale, theirs.scale)


@torch.no_grad()
def test_every_group_is_rounded_with_its_own_scale() -> None:
    """By hand: what the maps and scales of the checkpoint say a value of u and of the state must become."""
    model = LanguageModel(checkpoint_of("G2-odd", "static"), "simulate")
    H, P, N = 10, 8, 20
    cache, seen = model.new_cache(), {}
    with use_backend("ref"), observing(model.sites(), lambda site, x: seen.update({site.name: x.clone()})):
        model.forward(random_ids(model.config, 1, 11), cache)
    tensors, name = model.checkpoint.site_tensors, "layers.1.mixer"
    index, scale = tensors[f"{name}.state.index"], tensors[f"{name}.state.scale"]
    state = seen[f"{name}.state"][0]
    memory = cache[1].state  # type: ignore[attr-defined]
    assert scale.shape == (int(index.max()) + 1, N) and index.shape == (H, P)
    for h, p, n in ((0, 0, 0), (3, 7, 19), (9, 4, 3), (5, 1, 10)):
        scaled = float(state[h, p, n]) / float(scale[index[h, p], n])
        expected = max(-127, min(127, int(abs(scaled) + 0.5) * (1 if scaled > 0 else -1)))
        assert int(memory.data[0, h, p, n]) == expected
    site = model.blocks[1].sites["B_conv"]
    assert site.scale is not None and site.scale.shape == (2,) and site.expanded()[0].shape == (2 * N,)
    spec = model.blocks[1].sites["u"].spec
    assert isinstance(spec, QuantSpec) and spec.granularity.ragged
    assert as_float(memory).shape == (1, H, P, N)
