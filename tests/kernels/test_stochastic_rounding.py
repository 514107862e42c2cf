"""Stochastic rounding: neighbours only, the mean stays, and a state that decays slowly does not get stuck."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import evaluate
from squamata.evaluate.windows import Corpus, Window
from squamata.kernels.grid import round_codes
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.simd import noise
from squamata.kernels.site import Site
from squamata.models.block import ScanCache
from squamata.models.lm import LanguageModel
from squamata.run.decode_plan import Decoder
from squamata.run.model import Model
from squamata.spec.quant import QuantSpec

STATE = {"bits": 8, "granularity": "channel", "dynamic": True, "rounding": "stochastic"}


def test_a_value_becomes_one_of_its_neighbours_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    values = torch.tensor([-2.75, -0.5, 0.0, 0.125, 3.0, 41.9])
    codes = round_codes(values.expand(100_000, -1), "stochastic")
    assert bool(((codes == values.floor()) | (codes == values.ceil())).all())
    fraction = values - values.floor()
    error = (fraction * (1 - fraction) / len(codes)).sqrt()  # of a Bernoulli mean
    assert bool(((codes.mean(0) - values).abs() <= 5 * error).all())


def test_a_slowly_decaying_state_decays_where_rounding_to_nearest_holds_it() -> None:
    """1 % a step is less than half a step of any code below 50: to nearest such a state never moves again."""

    def decayed(rounding: str) -> float:
        torch.manual_seed(0)
        spec = QuantSpec(bits=8, rounding=rounding)  # type: ignore[arg-type]
        site = Site(
            "state", Layout(("channel", "state"), (1000, 1), flat=False), spec, torch.tensor(1.0), mode="integer"
        )
        state = torch.full((1, 1000, 1), 40.0)
        for _ in range(100):
            landed = site.land(0.99 * state)
            assert isinstance(landed, QTensor)
            state = landed.dequantize()
        return float(state.mean())

    assert decayed("half-even") == 40
    expected = 40 * 0.99**100
    assert abs(decayed("stochastic") - expected) < 0.03 * expected


def test_only_a_state_on_the_uniform_grid_may_ask_for_it() -> None:
    config = config_of("mamba2")
    with pytest.raises(SquamataError, match=r"layers\.0\.mixer\.u: 'rounding: stochastic' is for states"):
        recipe_of({"site": "*.u", "spec": {"bits": 8, "rounding": "stochastic"}}).resolve(config.blocks)
    with pytest.raises(SquamataError, match="rounded to the nearest level"):
        recipe_of({"site": "*.state", "spec": {"bits": 5, "codec": "log2", "rounding": "stochastic"}})


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_model_decodes_so_and_is_judged_the_same_twice(kind: str) -> None:
    config = config_of(kind)
    model = Model(quantized(config, perturbed_tensors(config), recipe_of({"site": "*.state", "spec": STATE}), []))
    ids = random_ids(config, 1, 24)[0]
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        cache = model.new_cache()
        runs.append(torch.stack([model.step(token[None], cache)[0] for token in ids]))
    assert not torch.equal(*runs)
    spread = (runs[0] - runs[1]).std() / runs[0].std()
    assert 0 < spread < 0.1  # of a state in 8 bits
    corpus = Corpus((Window(0, tuple(ids.tolist())),), 1, len(ids))
    before = torch.random.get_rng_state()
    first, second = (evaluate(model, corpus, mode="recurrent") for _ in range(2))
    assert first.perplexity == second.perplexity
    assert torch.equal(torch.random.get_rng_state(), before)


@njit
def _noises(first: int, count: int) -> np.ndarray:
    return np.array([noise(first + place) for place in range(count)])


def test_noise_is_murmur3_of_a_weyl_sequence_and_uniform() -> None:
    counters = (np.arange(4096, dtype=np.uint64) + 2**40 + 2**32 - 7).astype(np.uint32)
    with np.errstate(over="ignore"):
        mixed = counters * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    expected = ((mixed ^ (mixed >> 16)) >> 8) / 2.0**24
    found = _noises(2**40 + 2**32 - 7, 4096)
    np.testing.assert_array_equal(found, expected)
    counts = np.histogram(found, 16, (0, 1))[0]
    assert ((counts - 256) ** 2 / 256).sum() < 45  # chi squared of 15 degrees: once in ten thousand


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("d_state", [16, 24, 5])  # sixteen rows at once; rows with a rest; nothing but the rest
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_the_compiled_token_goes_up_with_the_fraction_and_every_element_by_itself(
    kind: str, d_state: int, dynamic: bool
) -> None:
    """After one token the state is its drive alone, which no rounding has touched yet: what it should be is known."""
    config = config_of(kind, d_state=d_state)
    tensors, ids = perturbed_tensors(config), random_ids(config, 1, 1)
    spec = STATE if dynamic else {"bits": 8, "rounding": "stochastic"}
    checkpoint = quantized(config, tensors, recipe_of({"site": "*.mixer.state", "spec": spec}), [ids])
    model = LanguageModel(checkpoint, "integer", torch.float32)
    plain = float_model(config, tensors)
    exact, decoder = plain.new_cache(1), Decoder(model)
    Decoder(plain).step(ids[0], exact)
    torch.manual_seed(0)
    runs = 300
    drawn: list[list[torch.Tensor]] = [[], []]
    for _ in range(runs):
        cache = model.new_cache(1)
        decoder.step(ids[0], cache)
        for codes, layer in zip(drawn, cache, strict=True):
            assert isinstance(layer, ScanCache) and isinstance(layer.state, QTensor)
            codes.append(layer.state.data.flatten().double())
    for codes, layer, block in zip(drawn, exact, model.blocks, strict=True):
        assert isinstance(layer, ScanCache) and isinstance(layer.state, torch.Tensor)
        s = layer.state
        scale = (
            (s.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-8) if dynamic else block.sites["state"].expanded()[0]
        )
        wanted = (s * (1 / scale)).clamp(-127, 127).flatten().double()
        error, fraction = torch.stack(codes) - wanted, wanted - wanted.floor()
        assert bool((error.abs() < 1).all())
        deviation = (fraction * (1 - fraction)).sqrt()
        assert bool((error.mean(0).abs() <= 5 * deviation / runs**0.5 + 3 / runs).all())  # a rare event may come thrice
        rounded = deviation > 0.1
        units = error[:, rounded] / deviation[rounded]
        for shift in (1, 16, d_state):  # neighbours, lanes and rows do not go up together
            both = units[:, shift:] * units[:, :-shift]
            assert abs(float(both.mean())) < 5 / both.numel() ** 0.5
