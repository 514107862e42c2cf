"""Round to nearest: the error is half a step, codes stay codes, and formats are what they say."""

from __future__ import annotations

import pytest
import torch
from tiny import config_of, perturbed_tensors

from squamata.errors import SquamataError
from squamata.kernels.packing import unpack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.models.lm import model_layouts
from squamata.quantize import check, quantize_tensors, rtn
from squamata.quantize.rtn import round_to_nearest
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

WEIGHT = Layout(("out", "in"), (6, 21), (2, 3, 1), flat=False)
CONV = Layout(("channel", "tap"), (6, 4), (2, 3, 1), flat=False)
BIAS = Layout(("channel",), (6,), (2, 3, 1), flat=False)
GRANULARITIES = ["tensor", "channel", "segment", "group(8)", "group(128)"]
CASES = [(WEIGHT, granularity) for granularity in GRANULARITIES]
CASES += [(CONV, granularity) for granularity in ("tensor", "channel", "tap", "channel,tap", "segment", "group(3)")]
CASES += [(BIAS, granularity) for granularity in ("tensor", "segment", "channel")]


def random_weight(layout: Layout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 1, layout.sizes[0]).reshape(-1, *(1,) * (len(layout.sizes) - 1))
    return torch.randn(layout.sizes, generator=generator) * rows


@pytest.mark.parametrize(("layout", "granularity"), CASES)
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_at_most_half_a_step(layout: Layout, granularity: str, bits: int, symmetric: bool) -> None:
    weight = random_weight(layout)
    quantized = round_to_nearest(weight, QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity), layout)
    assert quantized.shape == tuple(weight.shape) and not quantized.simulated
    error = (quantized.dequantize() - weight).abs()
    assert (error <= quantized.element_scale() * 0.50001).all()
    codes = quantized.codes().to(torch.int64)
    assert codes.abs().max() <= (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)


@pytest.mark.parametrize(("layout", "granularity"), [*CASES, (BIAS, "group(4)")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["minmax", {"percentile": {"alpha": 0.9}}], ids=["minmax", "percentile"])
def test_blocks_of_rows_give_the_same_bits(
    layout: Layout, granularity: str, dtype: torch.dtype, scale: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the memory changes nothing: blocks of a row or two against the whole at once in float32."""
    weight = random_weight(layout).to(dtype)
    for spec in (
        QuantSpec(bits=8, granularity=granularity, scale=scale),
        QuantSpec(bits=4, granularity=granularity, scale=scale, symmetric=False),
    ):
        whole = round_to_nearest(weight.float(), spec, layout)
        monkeypatch.setattr(rtn, "BLOCK", 2 * weight[0].numel() + 1)
        parts = round_to_nearest(weight, spec, layout)
        monkeypatch.undo()
        assert torch.equal(parts.data, whole.data) and torch.equal(parts.scale, whole.scale)
        assert (parts.second is None) == spec.symmetric
        assert parts.second is None or torch.equal(parts.second, whole.second)


def test_a_large_table_needs_no_float32_copy_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tensor larger than a block is made of a bfloat16 table."""
    sizes = []
    honest = torch.Tensor.float
    monkeypatch.setattr(rtn, "BLOCK", 64)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: (sizes.append(x.numel()), honest(x))[1])
    layout = Layout(("out", "in"), (100, 21), flat=False)
    for granularity in ("channel", "group(8)", "tensor"):
        round_to_nearest(torch.randn(100, 21).bfloat16(), QuantSpec(bits=8, granularity=granularity), layout)
    assert 0 < max(sizes) <= 64


def test_a_scale_beyond_float16_is_refused() -> None:
    weight = torch.tensor([[1.0, -1e7], [2.0, 1.0]])
    layout = Layout(("out", "in"), (2, 2), flat=False)
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype="float16")
    with pytest.raises(SquamataError, match=r"1.429e\+06 is beyond float16.*scale_dtype: float32"):
        round_to_nearest(weight, spec, layout)
    recipe = Recipe(name="mine")
    with pytest.raises(SquamataError, match=r"^layers\.0\.w: a scale"):
        quantize_tensors(recipe, {"layers.0.w": weight}, {"layers.0.w": spec}, {"layers.0.w": layout})


@pytest.mark.parametrize(("layout", "granularity"), CASES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_again_changes_nothing(layout: Layout, granularity: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, granularity=granularity)
    once = round_to_nearest(random_weight(layout), spec, layout)
    twice = round_to_nearest(once.dequantize(), spec, layout)
    assert torch.equal(twice.data, once.data)
    torch.testing.assert_close(twice.scale, once.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_values_on_the_grid_come_back_exactly(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (6, 21), generator=torch.Generator().manual_seed(4))
    codes[:, 3] = largest
    weight = codes * 2.0 ** torch.arange(-3, 3)[:, None]
    quantized = round_to_nearest(weight, QuantSpec(bits=bits, granularity="channel"), WEIGHT)
    assert torch.equal(quantized.dequantize(), weight) and torch.equal(quantized.codes().long(), codes)


def test_full_range_4_bit_is_twice_the_maximum_over_15() -> None:
    weight = torch.tensor([[-1.5, 0.7, 0.05, 1.4, 3.0, 0.1, -3.0, 2.9]])
    layout = Layout(("out", "in"), (1, 8), flat=False)
    spec = QuantSpec(bits=4, full_range=True, granularity="group(4)")
    quantized = round_to_nearest(weight, spec, layout)
    scale = torch.tensor([[2 * 1.5 / 15, 2 * 3.0 / 15]])
    torch.testing.assert_close(quantized.scale, scale, rtol=1e-6, atol=0)
    expected = torch.clamp(torch.round(weight / scale.repeat_interleave(4, 1)) + 8, 0, 15) - 8
    assert torch.equal(quantized.codes().float(), expected)
    assert quantized.codes().tolist() == [[-8, 4, 0, 7, 7, 0, -8, 7]]


def test_float16_scales_are_those_the_codes_were_made_with() -> None:
    weight = random_weight(WEIGHT, seed=2)
    quantized = round_to_nearest(weight, QuantSpec(bits=4, granularity="group(8)", scale_dtype="float16"), WEIGHT)
    assert torch.equal(quantized.scale, quantized.scale.half().float())
    error = (quantized.dequantize() - weight).abs() / quantized.element_scale()
    assert error.max() <= 0.5 + 7 * 2**-11 + 1e-5  # the clipped largest code, at most half a float16 step too small


def test_four_bits_are_packed_two_a_byte_and_others_are_not() -> None:
    weight = random_weight(WEIGHT)
    packed = round_to_nearest(weight, QuantSpec(bits=4), WEIGHT)
    assert packed.data.dtype == torch.uint8 and packed.data.shape == (6, 11) and packed.length == 21
    assert torch.equal(unpack_int4(packed.data, 21), packed.codes())
    for spec in (QuantSpec(bits=5), QuantSpec(bits=4, symmetric=False)):
        assert round_to_nearest(weight, spec, WEIGHT).data.dtype == torch.int8
    assert round_to_nearest(random_weight(BIAS), QuantSpec(bits=4), BIAS).data.dtype == torch.int8


def test_a_row_of_zeros() -> None:
    weight = random_weight(WEIGHT)
    weight[2] = 0
    for granularity in ("channel", "group(8)"):
        quantized = round_to_nearest(weight, QuantSpec(bits=8, granularity=granularity), WEIGHT)
        assert bool((quantized.dequantize()[2] == 0).all()) and bool(torch.isfinite(quantized.scale).all())


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_only_what_has_a_spec_is_quantized(kind: str) -> None:
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    recipe = Recipe.read("quamba-w8a8")
    specs = recipe.resolve(config.blocks)
    quantized = quantize_tensors(recipe, tensors, specs, model_layouts(config))
    for name, tensor in tensors.items():
        if name in specs:
            assert isinstance(quantized[name], QTensor) and quantized[name].shape == tuple(tensor.shape)
        else:
            assert quantized[name] is tensor
    left = {name.split(".")[-2] for name, value in quantized.items() if not isinstance(value, QTensor)}
    assert left <= {"norm", "gate_norm", "final_norm"} | ({"mixer"} if kind == "mamba2" else set())  # dt_bias


def test_segments_of_in_proj_are_z_x_b_c_dt() -> None:
    config = config_of("mamba2")
    name = "layers.0.mixer.in_proj.weight"
    weight = perturbed_tensors(config)[name]
    quantized = round_to_nearest(weight, QuantSpec(bits=8, granularity="segment"), model_layouts(config)[name])
    start = 0
    for rows in (64, 64, 32, 32, 4):
        expected = weight[start : start + rows].abs().max() / 127
        torch.testing.assert_close(quantized.scale[start : start + rows], expected.expand(rows, 1), rtol=1e-6, atol=0)
        start += rows


def test_unknown_quantizers_and_parameters_are_named() -> None:
    with pytest.raises(SquamataError, match="did you mean 'rtn'"):
        check(Recipe.from_mapping({"name": "mine", "weights": "rtm"}))
    with pytest.raises(SquamataError, match="damping"):
        check(Recipe.from_mapping({"name": "mine", "weights": {"rtn": {"damping": 0.1}}}))
