"""Counts, traffic and products of the chip model against what the package really stores, reads and multiplies."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from judged import ON_THEIR_KINDS
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.evaluate.size import bytes_by_part, bytes_read_per_token
from squamata.hardware import Technology, estimate
from squamata.hardware.counts import Groups, counts, ragged_groups
from squamata.hardware.traffic import UNTYING
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor
from squamata.models.block import ScanCache, tensor_layouts
from squamata.models.config import ModelConfig, parameter_shapes, shape
from squamata.models.lm import KINDS, LanguageModel
from squamata.spec.recipe import Recipe
from squamata.transform import TRANSFORMS

FLOAT32 = Technology.read("7nm").model_copy(update={"float_bits": 32})
ANY_DEPTH = [pair for pair in ON_THEIR_KINDS if not pair[1].endswith("-8b")]  # that one names layers up to the 54th
GROUPS = Groups(ssd=2, heads=2, channels=3)

ODD = recipe_of(
    {"site": "*.mixer.*", "spec": {"bits": 8}},
    {"site": "*.mixer.[xz]", "spec": {"bits": 8, "granularity": "head,channel"}, "architectures": ["mamba2"]},
    {"site": "*.mixer.[xz]", "spec": {"bits": 6, "granularity": "group(24)"}, "architectures": ["mamba1"]},
    {"site": "*.mixer.dt", "spec": {"bits": 8, "granularity": "head"}, "architectures": ["mamba2"]},
    {"site": "*.mixer.y", "spec": {"bits": 8, "granularity": "token", "dynamic": True}},
    {"site": "*.mixer.[BC]", "spec": {"bits": 8, "granularity": "state"}},
    {"site": "*.mixer.[BC]_conv", "spec": {"bits": 8, "granularity": "ssd_group,state"}},
    {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index"}, "architectures": ["mamba2"]},
    {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state"}, "architectures": ["mamba2"]},
    {"site": "*.in_proj.weight", "spec": {"bits": 4, "granularity": "group(7)", "scale_dtype": "float16"}},
    {"site": "*.out_proj.weight", "spec": {"bits": 4, "granularity": "out"}},
    {"site": "*.mixer.conv.weight", "spec": {"bits": 8, "granularity": "segment,tap"}},
    {"site": "*.mixer.A_log", "spec": {"bits": 8, "granularity": "channel"}, "architectures": ["mamba1"]},
    {"site": "*.x_proj.weight", "spec": {"bits": 8, "granularity": "segment", "symmetric": False}},
)


def index_map(axes: tuple[str, ...], sizes: tuple[int, ...], groups: Groups) -> torch.Tensor:
    """A ragged map over the leading axes with every group in it."""
    leading = tuple(size for axis, size in zip(axes, sizes, strict=True) if axis != "state")
    return (torch.arange(prod(leading)) % groups.count).reshape(leading)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [*ANY_DEPTH, ("mamba1", ODD), ("mamba2", ODD)],
    ids=lambda part: str(getattr(part, "name", part)),
)
def test_scales_are_counted_as_the_partition_stores_them(kind: str, recipe: Recipe | str) -> None:
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    config = config_of(kind, n_groups=2) if kind == "mamba2" else config_of(kind)
    found = counts(config, recipe, GROUPS, 32)
    shapes = {name.removeprefix("layers.0."): dims for name, dims in parameter_shapes(config).items()}
    layouts = tensor_layouts(KINDS[kind], config, shapes)
    sizes = KINDS[kind].site_sizes(config)
    checked = 0
    for name, count in found.items():
        if not name.startswith("layers.0.") or count.spec is None:
            continue
        assert count.info is not None
        inside = name.removeprefix("layers.0.")
        layout = layouts.get(inside) or Layout(count.info.axes, sizes[inside.removeprefix("mixer.")])
        index = index_map(layout.axes, layout.sizes, GROUPS) if count.spec.granularity.ragged else None
        kept = (prod(layout.sizes[:-1]),) if count.spec.kept_channels else None  # all channels here are, one group
        groups = prod(kept or Partition(count.spec.granularity, layout, index).shape())
        assert count.scales == groups * count.spec.numbers, name
        assert count.elements == layout.flat_size, name
        checked += 1
    assert checked == sum(site.startswith("layers.0.") for site in recipe.resolve(config.blocks))


def cache_bytes(model: LanguageModel) -> int:
    """Codes of the cache, and scales that are taken at run time; static ones are the model's."""
    total = 0
    for layer in model.new_cache(1):
        assert isinstance(layer, ScanCache)
        for value in (layer.conv, layer.state):
            quantized_value = isinstance(value, QTensor)
            total += value.data.nbytes if quantized_value else value.nbytes
            total += value.scale.nbytes if quantized_value and value.spec.dynamic else 0
    return total


@pytest.mark.parametrize(("kind", "recipe"), ANY_DEPTH)
def test_bytes_are_those_of_a_quantized_model(kind: str, recipe: str) -> None:
    """Weights a token reads, weights stored, the cache; all but the two numbers a layer that name a rotation."""
    config = config_of(kind, d_inner=48 if kind == "mamba1" else 64)
    checkpoint = quantized(config, perturbed_tensors(config), Recipe.read(recipe), [random_ids(config, 1, 20)])
    model = LanguageModel(checkpoint)
    rotations = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name.endswith("rotation"))
    found = estimate(config, recipe, FLOAT32)
    parts = bytes_by_part(model)
    sparse = any(spec.sparse for spec in model.specs.values())  # how many elements it has is known only about
    figures = found.traffic["weights"], found.model_bytes
    exact = bytes_read_per_token(model) - rotations // 2, parts["total"] - parts["sites"] - rotations
    assert figures == (pytest.approx(exact, rel=2e-3) if sparse else exact)  # read as int64, dtype float32
    taps = config.d_conv
    assert found.traffic["state"] / 2 + found.traffic["conv"] * (taps - 1) / taps == cache_bytes(model)
    kept = {name: tensor for name, tensor in checkpoint.site_tensors.items() if not name.endswith(("index", "order"))}
    # a zero point is one byte on a chip, float32 in a file
    stored = sum(tensor.numel() if name.endswith("zero") else tensor.nbytes for name, tensor in kept.items())
    ragged = any(name.endswith("index") for name in checkpoint.site_tensors)  # a map there, ends of groups on a chip
    ends = config.n_layers * 4 * (found.groups["ssd"] * found.groups["heads"] * (1 + found.groups["channels"]))
    assert found.all_scale_bytes == stored + (ends if ragged else 0)


def test_the_transforms_that_untie_are_known() -> None:
    assert {name for name, transform in TRANSFORMS.items() if transform.unties} == UNTYING


def test_products_of_a_token() -> None:
    """Closed form for mamba2-2.7b: projections and head as int8, the scan three a state element."""
    found = estimate(shape("mamba2-2.7b"), "quamba-w8a8").macs_per_token
    projections = 64 * (10576 * 2560 + 2560 * 5120 + 4 * (5120 + 2 * 128)) + 50288 * 2560
    assert found == {"int8": projections, "float16": 0, "float32": 64 * 3 * 80 * 64 * 128}
    weight_only = estimate(shape("mamba-130m"), "w4a16").macs_per_token
    layer = 3072 * 768 + 80 * 1536 + 1536 * 48 + 768 * 1536 + 1536 * 4
    assert weight_only == {"int8": 0, "float16": 24 * layer + 50280 * 768, "float32": 24 * 3 * 1536 * 16}


def test_a_convolution_with_a_scale_a_tap_cannot_add_integers() -> None:
    plain = {"site": "*.mixer.*", "spec": {"bits": 8}}
    along_taps = {"site": "*.mixer.conv.weight", "spec": {"bits": 8, "granularity": "tap"}}
    config = config_of("mamba1")
    whole, split = (estimate(config, recipe_of(*rules)) for rules in ((plain,), (plain, along_taps)))
    assert split.macs_per_token["float16"] - whole.macs_per_token["float16"] == 2 * 64 * 4
    assert split.conv_energy_nj > whole.conv_energy_nj


def test_ragged_groups_come_from_the_recipe_and_never_outnumber_their_members() -> None:
    config = shape("mamba2-2.7b")
    recipe = Recipe.read("float")
    asked = recipe.model_copy(
        update={"transforms": (recipe_of(transforms=[{"reorder": {"head_groups": 8}}]).transforms[0],)}
    )
    assert ragged_groups(config, recipe) == Groups(1, 4, 4)
    assert ragged_groups(config, asked) == Groups(1, 8, 4)
    assert ragged_groups(config, asked, heads=2, channels=16) == Groups(1, 2, 16)
    assert ragged_groups(shape("mamba2-8b"), recipe) == Groups(8, 4, 4)
    assert ragged_groups(config_of("mamba2"), recipe, heads=9) == Groups(2, 2, 4)  # two heads a group


def test_layers_may_differ() -> None:
    """Scales of one layer are the largest's, those of the model the sum."""
    clipped = {"bits": 8, "granularity": "head,channel"}
    recipe = recipe_of(
        {"site": "*.mixer.u", "spec": {"bits": 8}}, {"site": "*.mixer.u", "spec": clipped, "layers": [1]}
    )
    found = estimate(config_of("mamba2"), recipe.model_copy(update={"architectures": ("mamba2",)}))
    assert found.scale_bytes_per_layer == 64 * 4 and found.scale_bytes == 64 * 4 + 4
    assert found.lookup_bits == 32 and found.lookup_latency_ns["sequential"] == 1.0
    hybrid = ModelConfig(**(config_of("mamba2").model_dump() | {"blocks": ("mamba1", "mamba2"), "dt_rank": 3}))
    assert estimate(hybrid, "w8a8").architecture == "hybrid"


def test_a_float_or_dynamic_input_needs_no_sram() -> None:
    dynamic: dict[str, Any] = {"bits": 8, "granularity": "token", "dynamic": True}
    for recipe in (Recipe.read("float"), recipe_of({"site": "*.mixer.u", "spec": dynamic})):
        found = estimate(config_of("mamba2"), recipe)
        assert (found.scale_bytes, found.lookup_bits, found.lookup_energy_nj, found.sram_mm2) == (0, 0, 0, 0)


def test_a_recipe_for_the_other_architecture_is_refused() -> None:
    recipe = recipe_of(architectures=["mamba2"])
    with pytest.raises(SquamataError, match="recipe test is for mamba2, not mamba1"):
        estimate(shape("mamba-130m"), recipe)
