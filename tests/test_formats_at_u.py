"""Number formats at the SSM input, end to end: what every mode sees, files, memory, what the fast paths refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata import scales
from squamata.errors import SquamataError
from squamata.evaluate.inspection import site_rows
from squamata.kernels.codec import CODECS
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.site import Site
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.run.decode_plan import NotPlannableError, plan_model
from squamata.run.model import Model
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe

INT8 = {"bits": 8, "rounding": "half-away", "scale": {"percentile": {"alpha": 0.9999}}}
APART = {"site": "*.mixer.u_proj", "spec": INT8, "architectures": ["mamba1"]}
DUAL = {"bits": 5, "codec": "dual-scale", "scale": {"percentile": {"alpha": 0.97}}}
PIECEWISE = {"bits": 8, "codec": "outlier-piecewise", "granularity": "channel", "scale": {"percentile": {"alpha": 0.9}}}


def checkpoint_of(kind: str, *rules: dict[str, Any], base: str = "quamba-w8a8") -> Checkpoint:
    config = config_of(kind)
    recipe = Recipe.from_mapping({"name": "test", "extends": base, "rules": list(rules)})
    return quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 2, 24)])


def landed_at(model: LanguageModel, ids: torch.Tensor) -> dict[str, Value]:
    """What the last call left on every site of the first layer."""
    found: dict[str, Value] = {}

    def watch(site: Site, land: Any) -> Any:
        def record(x: torch.Tensor) -> Value:
            found[site.name.rpartition(".")[2]] = value = land(x)
            return value

        return record

    for site in model.blocks[0].sites.values():
        site.land = watch(site, site.land)  # type: ignore[method-assign]
    model(ids)
    return found


@torch.no_grad()
def test_a_product_input_apart_changes_nothing_by_itself() -> None:
    """Mamba-1 with u and u_proj of one spec is the model that has u alone."""
    ids = random_ids(config_of("mamba1"), 2, 13)
    with use_backend("ref"):
        apart = checkpoint_of("mamba1", {"site": "*.mixer.u", "spec": INT8}, APART)
        together = checkpoint_of("mamba1")
        for name, tensor in together.site_tensors.items():
            assert torch.equal(apart.site_tensors[name], tensor)
        assert len(apart.site_tensors) == len(together.site_tensors) + 2  # u_proj.scale of two layers
        assert torch.equal(LanguageModel(apart)(ids), LanguageModel(together)(ids))


@torch.no_grad()
def test_the_modes_of_the_ssm_input() -> None:
    """Integers; float for the scan alone; float for scan and x_proj: each site sees what the recipe says."""
    ids = random_ids(config_of("mamba1"), 1, 9)
    with use_backend("ref"):
        ceiling = landed_at(LanguageModel(checkpoint_of("mamba1", base="format-float-u")), ids)
        assert isinstance(ceiling["u"], torch.Tensor) and isinstance(ceiling["u_proj"], QTensor)
        step = float(ceiling["u_proj"].scale)
        difference = (ceiling["u"] - ceiling["u_proj"].dequantize()).abs()
        assert 0 < float(difference.median()) <= 0.5 * step * 1.001
        both = landed_at(LanguageModel(checkpoint_of("mamba1", {"site": "*.mixer.u", "spec": "float"})), ids)
        assert isinstance(both["u"], torch.Tensor) and "u_proj" not in both
        packed = landed_at(LanguageModel(checkpoint_of("mamba1", base="format-dual-scale-5")), ids)
        u, projected = packed["u"], packed["u_proj"]
        assert isinstance(u, QTensor) and isinstance(projected, QTensor)
        assert u.data.dtype == torch.uint8 and u.data.nbytes == projected.data.nbytes * 5 // 8


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("spec", "part"), [(DUAL, "coarse"), (PIECEWISE, "tail"), ({"bits": 12}, None)])
@torch.no_grad()
def test_saved_and_loaded_models_are_the_same(
    kind: str, spec: dict[str, Any], part: str | None, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(kind, {"site": "*.mixer.u", "spec": spec}, APART)
    write_checkpoint(checkpoint, tmp_path / "saved")
    again = read_checkpoint(tmp_path / "saved")
    assert again.site_tensors.keys() == checkpoint.site_tensors.keys()
    assert all(torch.equal(again.site_tensors[name], tensor) for name, tensor in checkpoint.site_tensors.items())
    stored = {name for name in again.site_tensors if name.startswith("layers.0.mixer.u.")}
    assert stored == {"layers.0.mixer.u.scale"} | ({f"layers.0.mixer.u.{part}"} if part else set())
    ids = random_ids(checkpoint.config, 2, 15)
    with use_backend("ref"):
        expected = LanguageModel(checkpoint)(ids)
        assert torch.equal(LanguageModel(again)(ids), expected)
        assert torch.equal(LanguageModel(again, "simulate")(ids), expected)
    write_checkpoint(again, tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again"))
    assert first == second


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_the_compiled_token_leaves_them_to_the_ops(kind: str) -> None:
    model = Model(checkpoint_of(kind, base="format-dual-scale-5"))
    with pytest.raises(NotPlannableError):
        plan_model(model)
    ours, theirs = model.new_cache(), model.new_cache()
    for token in (3, 5):
        with use_backend("ref"):
            expected = model.step(torch.tensor([token]), theirs)
        torch.testing.assert_close(model.step(torch.tensor([token]), ours), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_the_captured_step_refuses_them_in_one_line(kind: str) -> None:
    pytest.importorskip("triton", reason="the GPU kernels need triton")
    from squamata.run.graphs import CapturedDecoder

    model = LanguageModel(checkpoint_of(kind, base="format-dual-scale-5"))
    with pytest.raises(SquamataError, match="5-bit dual-scale"):
        CapturedDecoder(model, 1, "cpu", pdl=False)


def test_inspection_names_the_format() -> None:
    rows = {row.site: row for row in site_rows(LanguageModel(checkpoint_of("mamba1", base="format-dual-scale-5")))}
    u = rows["layers.1.mixer.u"]
    assert (u.format, u.bits, u.bytes, u.strategy) == ("5-bit dual-scale", 5, 8, "percentile(alpha=0.99)")
    assert "layers.1.mixer.u_proj" in rows
    plain = LanguageModel(checkpoint_of("mamba1"))
    assert not any("u_proj" in row.site for row in site_rows(plain))


def test_what_the_fine_grid_clips_the_coarse_one_holds() -> None:
    """On the calibration's own values a uniform grid that ends at the threshold clips 3 %, the dual scale nothing."""
    uniform = {"bits": 5, "scale": {"percentile": {"alpha": 0.97}}}
    x = torch.randn(1, 400, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for spec in (uniform, DUAL, PIECEWISE):
        site = next(site for site in LanguageModel(checkpoint_of("mamba2")).sites() if site.name.endswith("x"))
        recipe = recipe_of({"site": "*.mixer.x", "spec": spec})
        site.spec = recipe.resolve(("mamba2",))["layers.0.mixer.x"]
        found.append(_clipped(site, x))
    assert found[0] == pytest.approx(0.03, abs=0.01) and found[1:] == [0.0, 0.0]


def _clipped(site: Site, x: torch.Tensor) -> float:
    assert site.spec is not None
    statistics = scales.gather_for(site.partition, site.spec)
    statistics.update(x)
    site.set_scale(*scales.compute(statistics, site.spec))
    return float(CODECS[site.spec.codec].beyond(x, site.grid(x), site.spec).float().mean())
