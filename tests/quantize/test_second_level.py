"""Two levels of scales: value = round(code * ratio) * channel, an int8 weight in 4-bit storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels.packing import unpack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.models.lm import LanguageModel
from squamata.quantize.rtn import round_to_nearest
from squamata.quantize.second_level import with_second_level
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

GROUPED: dict[str, Any] = {"bits": 4, "granularity": "group(32)", "full_range": True, "scale_dtype": "float16"}


def two_level(rows: int, columns: int) -> tuple[QTensor, QTensor]:
    """A random weight in one level of scales, and in two."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * torch.rand(rows, 1).exp()
    layout = Layout(("out", "in"), (rows, columns), flat=False)
    plain = round_to_nearest(weight, QuantSpec.model_validate(GROUPED), layout)
    return plain, with_second_level(plain, QuantSpec.model_validate(GROUPED | {"second_level": True}))


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (8, 70), (3, 31)])
def test_it_is_the_formula(rows: int, columns: int) -> None:
    plain, found = two_level(rows, columns)
    channel = plain.dequantize().abs().amax(1) / 127
    ratio = (plain.scale / channel[:, None]).half().double()
    codes = unpack_int4(plain.data, columns).double()
    eight = torch.stack([torch.round(codes[:, k] * ratio[:, k // 32]) for k in range(columns)], 1).clamp(-127, 127)
    operand = found.as_operand()
    assert torch.equal(operand.data.double(), eight) and operand.data.dtype == torch.int8
    torch.testing.assert_close(found.dequantize().double(), eight * channel[:, None].double(), rtol=1e-6, atol=0)
    step = channel[:, None] / 2 + plain.dequantize().abs() * 2**-11  # half an int8 step, and float16 ratios
    assert bool(((found.dequantize() - plain.dequantize()).abs() <= step * 1.0001).all())
    assert torch.equal(found.data, plain.data)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_it_runs_in_integers_and_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Products see int8 rows: simulation and integers agree exactly, also after save and load."""
    config = config_of(kind, tie_embeddings=False)
    rules = [{"site": f"*.{name}.weight", "spec": GROUPED | {"second_level": True}} for name in ("in_proj", "out_proj")]
    rules += [{"site": "head.weight", "spec": GROUPED | {"second_level": True}}]
    rules += [{"site": site, "spec": {"bits": 8}} for site in ("*.mixer.in", "*.mixer.out", "head.in")]
    checkpoint = quantized(config, perturbed_tensors(config), recipe_of(*rules), [random_ids(config, 2, 30)])
    ids = random_ids(config, 1, 12)
    write_checkpoint(checkpoint, tmp_path / "saved")
    loaded = read_checkpoint(tmp_path / "saved")
    name = "layers.0.mixer.in_proj.weight"
    for part in ("data", "scale", "second"):
        assert torch.equal(getattr(loaded.tensors[name], part), getattr(checkpoint.tensors[name], part))
    logits = LanguageModel(checkpoint)(ids)
    assert torch.equal(LanguageModel(loaded)(ids), logits)
    torch.testing.assert_close(LanguageModel(checkpoint, "simulate")(ids), logits, rtol=1e-4, atol=1e-5)


def test_where_it_has_no_meaning_it_is_refused() -> None:
    for wrong in ({"bits": 8}, {"symmetric": False, "full_range": False}, {"granularity": "channel"}):
        with pytest.raises(ValueError, match="'second_level' is for symmetric weights"):
            QuantSpec.model_validate(GROUPED | {"second_level": True} | wrong)
    rule = {"site": "embedding.weight", "spec": GROUPED | {"second_level": True}}
    with pytest.raises(SquamataError, match="weight of a product"):
        Recipe.from_mapping({"name": "x", "rules": [rule]}).resolve(("mamba2",))
