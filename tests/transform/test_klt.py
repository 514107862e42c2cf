"""KLT-enhanced rotation: float64 logits stay, all channels vary alike, and a killed run goes on with the same basis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MemorySource, Tensors, config_of, float_model, perturbed_tensors, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import as_float
from squamata.kernels.site import observing
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts, calibrated_sites
from squamata.spec.granularity import Granularity
from squamata.transform import Observed
from squamata.transform.klt import enhanced, stream_basis

TURNED = ["fold_norm", "klt"]


def parts_of(config: ModelConfig, tensors: Tensors, transforms: list[Any], ids: torch.Tensor) -> QuantizedParts:
    return QuantizedParts(MemorySource(config, tensors), recipe_of(transforms=transforms), [ids])


def transformed(config: ModelConfig, tensors: Tensors, transforms: list[Any], ids: torch.Tensor) -> Checkpoint:
    parts = parts_of(config, tensors, transforms, ids)
    merged = {name: value for part in parts.each() for name, value in part.items()}
    return Checkpoint(parts.config, merged, recipe_of(transforms=transforms))


def observed(x: torch.Tensor) -> Observed:
    statistics = Observed(Partition(Granularity(("channel",)), Layout(("channel",), (x.shape[-1],))), pairs=True)
    statistics.update(x[None])
    return statistics


@pytest.mark.parametrize("norms", [None, 1e-6])
@pytest.mark.parametrize("width", [32, 36])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_the_logits_stay(kind: str, width: int, norms: float | None) -> None:
    rank: dict[str, Any] = {"dt_rank": 4, "bcdt_norm_epsilon": norms} if kind == "mamba1" else {}
    config = config_of(kind, d_model=width, projection_bias=True, **rank)
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    before = float_model(config, tensors, torch.float64)(ids)
    for transforms in (TURNED, [{"smooth": {"products": ["out_proj", "conv"]}}, *TURNED, "hadamard"]):
        after = LanguageModel(transformed(config, tensors, transforms, ids), "float", torch.float64)(ids)
        assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


def test_every_channel_varies_alike_where_hadamard_alone_does_not() -> None:
    """The worst case of the paper: correlated channels whose principal direction is a row of the Hadamard matrix."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator) + 10 * torch.randn(4000, 1, generator=generator)
    turn = enhanced(observed(x).basis())
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64))
    variances = (x.double() @ turn).var(0)
    torch.testing.assert_close(variances, torch.full_like(variances, float(variances.mean())), rtol=1e-3, atol=0)
    hadamard = (x.double() @ enhanced_without_basis(16)).var(0)
    assert float(hadamard.max() / hadamard.min()) > 100


def enhanced_without_basis(size: int) -> torch.Tensor:
    from squamata.transform.observed import Basis

    return enhanced(Basis(torch.eye(size, dtype=torch.float64)))


@torch.no_grad()
def test_the_streams_basis_is_of_what_the_first_layer_reads() -> None:
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    tensors["layers.0.norm.weight"] = torch.ones(config.d_model)
    ids = random_ids(config, 4, 40)
    model, seen = float_model(config, tensors), []
    with observing([model.blocks[0].sites["in"]], lambda _, x: seen.append(x)):
        model(ids)
    flat = seen[0].flatten(0, 1).double()
    found = stream_basis(config, [tensors["embedding.weight"][one] for one in ids]).vectors
    turned = found.T @ torch.cov(flat.T) @ found
    off = turned - torch.diag(turned.diagonal())
    assert float(off.abs().max()) < 1e-3 * float(turned.diagonal().max())


@torch.no_grad()
def test_dt_low_is_turned_on_mamba1() -> None:
    config = config_of("mamba1", dt_rank=4)
    tensors = perturbed_tensors(config)
    tensors["layers.0.mixer.x_proj.weight"][1] = tensors["layers.0.mixer.x_proj.weight"][0] * 9
    ids = random_ids(config, 4, 40)
    spreads = []
    for transforms in (["fold_norm"], TURNED):
        model, seen = LanguageModel(transformed(config, tensors, transforms, ids), "float"), []
        with observing([model.blocks[0].sites["dt_low"]], lambda _, x, seen=seen: seen.append(x)):
            model(ids)
        variances = seen[0].flatten(0, 1).var(0)
        spreads.append(float(variances.max() / variances.min()))
    assert spreads[0] > 20 and spreads[1] < 1.01


def test_it_must_see_text_and_folded_norms() -> None:
    config = config_of("mamba2")
    recipe = recipe_of(transforms=TURNED)
    assert calibrated_sites(recipe, config) == ["layers.0.mixer.in"]
    with pytest.raises(SquamataError, match="put fold_norm before it"):
        transformed(config, perturbed_tensors(config), ["klt"], random_ids(config, 2, 9))


def test_a_run_that_goes_on_takes_the_basis_it_began_with() -> None:
    config = config_of("mamba1", dt_rank=4)
    tensors, ids = perturbed_tensors(config), random_ids(config, 2, 19)
    whole = parts_of(config, tensors, TURNED, ids)
    expected = list(whole.each())
    first = parts_of(config, tensors, TURNED, ids)
    first.make(0)
    first.make(1)
    streams = {name: tensor.clone() for name, tensor in first.streams().items()}
    again = parts_of(config, tensors, TURNED, ids)
    again.restore(2, streams)
    for number in (2, 3):
        made = again.make(number)
        assert made.keys() == expected[number].keys()
        assert all(torch.equal(as_float(made[name]), as_float(expected[number][name])) for name in made)
