"""Stochastic rounding: neighbours only, the mean stays, and a state that decays slowly does not get stuck."""

from __future__ import annotations

import pytest
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.evaluate.perplexity import evaluate
from squamata.evaluate.windows import Corpus, Window
from squamata.kernels.grid import round_codes
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site
from squamata.run.decode_plan import NotPlannableError, plan_model
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
    with pytest.raises(NotPlannableError, match="stochastically"):
        plan_model(model)
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
