"""What any transform may count on: its parameters checked, statistics it asked for, tensors that survive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from tiny import config_of, perturbed_tensors, recipe_of
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout, Partition
from squamata.models.block import OptionalTensor
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.mamba2 import Mamba2
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.scales import gather_for
from squamata.scales.statistics import Statistics
from squamata.spec.granularity import Granularity
from squamata.spec.quant import QuantSpec
from squamata.transform import TRANSFORMS, Transform, apply, check, needs

Tensors = dict[str, Tensor]
AWQ = {"awq": {"spec": {"bits": 4, "granularity": "channel"}}}


def balance(
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5,
) -> Tensors:
    """Leaves the range of every feature of u, to a power, as a tensor of the layer."""
    if kind != "mamba2":
        return dict(tensors)
    assert list(statistics) == ["mixer.u"]
    low, high = statistics["mixer.u"].magnitude()
    return dict(tensors) | {"mixer.balance": torch.maximum(-low, high).reshape(-1) ** strength}


def demanding(
    config: ModelConfig, kind: str, tensors: Mapping[str, Tensor], statistics: Mapping[str, Statistics], block: int
) -> Tensors:
    assert not statistics and type(block) is int
    return dict(tensors) | {"mixer.y.index": torch.arange(4) // block}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "balance", Transform(balance, needs=("mixer.u",)))
    monkeypatch.setitem(TRANSFORMS, "demanding", Transform(demanding))


@pytest.mark.parametrize(
    "transform, said",
    [
        ({"balance": {"strength": "much"}}, "strength: must be a number"),
        ({"balance": {"strength": 2}}, "strength: must be less than or equal to 1, not 2"),
        ({"balance": {"strength": [0.5]}}, "strength: "),
        ({"balance": {"strenth": 0.5}}, "no parameter 'strenth' (did you mean 'strength'?)"),
        ({"hadamard": {"statistics": 1}}, "no parameter 'statistics', it takes none"),
        ({"demanding": {}}, "parameter 'block' is missing"),
        ({"demanding": {"block": None}}, "block: must be a whole number, not None"),
        ("demanding", "parameter 'block' is missing"),
    ],
)
def test_wrong_parameters_are_one_line(transform: Any, said: str) -> None:
    with pytest.raises(SquamataError) as caught:
        check(recipe_of(transforms=[transform]))
    assert str(caught.value).startswith("transform ") and said in str(caught.value) and "\n" not in str(caught.value)


def observed(spec: Any, values: Tensor) -> Statistics:
    statistics = gather_for(Partition(spec.granularity, Layout(("head", "channel"), (4, 16))), spec)
    statistics.update(values)
    return statistics


def test_a_transform_gets_the_statistics_it_asked_for_and_no_others() -> None:
    recipe = recipe_of(transforms=[{"balance": {"strength": 1.0}}, {"demanding": {"block": "2"}}, "hadamard"])
    wanted = needs(recipe, "mamba2")
    assert list(wanted) == ["mixer.u"] and needs(recipe_of(transforms=["hadamard"]), "mamba2") == {}
    values = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    config = config_of("mamba2")
    statistics = {"mixer.u": observed(wanted["mixer.u"], values)}
    changed = apply(recipe, config, "mamba2", {"norm.weight": torch.ones(32)}, statistics)
    torch.testing.assert_close(changed["mixer.balance"], values.abs().amax((0, 1)))
    assert changed["mixer.y.index"].tolist() == [0, 0, 1, 1]
    assert "mixer.balance" not in apply(recipe, config, "mamba1", {}, statistics)


def declared(config: ModelConfig) -> dict[str, OptionalTensor]:
    return {"mixer.balance": OptionalTensor((config.d_inner,), torch.float32)}


def test_what_the_block_declares_survives_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mamba2, "optional_tensors", staticmethod(declared))
    config = config_of("mamba2")
    left = {"layers.1.mixer.balance": torch.rand(config.d_inner)}  # one layer only: it is optional
    checkpoint = Checkpoint(config, perturbed_tensors(config) | left, recipe_of(transforms=["balance"]))
    write_checkpoint(checkpoint, tmp_path / "saved")
    again = read_checkpoint(tmp_path / "saved")
    assert again.tensors.keys() == checkpoint.tensors.keys()
    assert torch.equal(again.tensors["layers.1.mixer.balance"], left["layers.1.mixer.balance"])  # type: ignore[arg-type]
    wrong = {"layers.1.mixer.balance": torch.rand(3)}
    write_checkpoint(Checkpoint(config, perturbed_tensors(config) | wrong, checkpoint.recipe), tmp_path / "wrong")
    with pytest.raises(SquamataError, match=r"balance' has shape \(3,\) where \(64,\)"):
        read_checkpoint(tmp_path / "wrong")


def test_a_block_that_declares_no_rotation_misses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("mamba2")
    checkpoint = Checkpoint(config, perturbed_tensors(config), recipe_of(transforms=["hadamard"]))
    write_checkpoint(checkpoint, tmp_path / "saved")
    with pytest.raises(SquamataError, match=r"layers\.0\.mixer\.rotation' is missing"):
        read_checkpoint(tmp_path / "saved")
    monkeypatch.setattr(Mamba2, "optional_tensors", staticmethod(declared))
    assert read_checkpoint(tmp_path / "saved").tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        (
            ["fold_norm", AWQ],
            "awq is told of mixer.in in the model as it came, which fold_norm has changed by then:",
        ),
        (["reorder", "smooth"], "smooth is told of mixer.out .* which reorder has changed .* put smooth before it"),
        (["rotate_residual", "klt"], "klt is told of stream .* which rotate_residual has changed .* put klt before it"),
        (["hadamard", {"smooth": {"products": ["out_proj"]}}], "smooth is told of mixer.out .* which hadamard"),
        (["smooth", AWQ], "awq is told of mixer.in .* which smooth has changed by then: leave one out"),
        (["reorder", "reorder"], "reorder is told of mixer.u .* which reorder has changed by then: leave one out"),
        (["smooth", "fold_norm", "klt"], "klt is told of mixer.dt_low .* which smooth"),
    ],
)
def test_nothing_is_told_of_values_that_have_changed(transforms: list[Any], said: str) -> None:
    """The model stays equal whatever the factors and orders are, so nothing else would notice."""
    with pytest.raises(SquamataError, match=said):
        check(recipe_of(transforms=transforms))


@pytest.mark.parametrize(
    "transforms",
    [
        [AWQ, "fold_norm"],
        ["smooth", "reorder", "fold_norm", "rotate_residual", "hadamard"],
        ["fold_norm", "rotate_residual", "hadamard", {"smooth": {"products": ["dt_proj"]}}],
        [{"smooth": {"products": ["in_proj", "out_proj", "conv"]}}, "fold_norm", "klt", "hadamard"],
        [{"smooth": {"products": ["in_proj"]}}, {"smooth": {"products": ["out_proj"], "alpha": 0.8}}],
    ],
)
def test_orders_in_which_everything_told_still_holds(transforms: list[Any]) -> None:
    check(recipe_of(transforms=transforms))


def test_a_site_that_no_layer_has_is_not_in_the_way() -> None:
    check(recipe_of(transforms=["smooth", "fold_norm", "klt"], architectures=["mamba2"]))


def test_a_ragged_scale_needs_a_transform_that_leaves_maps() -> None:
    ragged = [QuantSpec(bits=8, granularity=Granularity(("index",)))]
    with pytest.raises(SquamataError, match="needs a map: add the transform 'reorder'"):
        check(recipe_of(transforms=["hadamard"]), ragged)
    check(recipe_of(transforms=["reorder_within"]), ragged)


def test_what_a_transform_leaves_alone_is_not_observed() -> None:
    recipe = recipe_of(transforms=[{"smooth": {"products": ["out_proj"]}}])
    assert list(needs(recipe, "mamba2")) == ["mixer.out"]
    assert list(needs(recipe_of(transforms=["smooth"]), "mamba2")) == ["mixer.in", "mixer.out"]
    assert list(needs(recipe_of(transforms=["smooth"]), "mamba1")) == ["mixer.in", "mixer.dt_low", "mixer.out"]
