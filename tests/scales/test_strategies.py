"""Scales from statistics: closed forms, exact quantiles, and what is said of mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squamata import scales
from squamata.errors import SquamataError
from squamata.kernels.partition import Layout, Partition
from squamata.scales.statistics import quantile
from squamata.spec.quant import QuantSpec

CHANNELS = Layout(("channel",), (4,))


def scale_of(
    spec: QuantSpec, *batches: torch.Tensor, layout: Layout = CHANNELS
) -> tuple[torch.Tensor, torch.Tensor | None]:
    statistics = scales.gather_for(Partition(spec.granularity, layout), spec)
    for batch in batches:
        statistics.update(batch)
    return scales.compute(statistics, spec)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 3),
    count=st.integers(1, 300),
    alpha=st.one_of(st.sampled_from([0.0, 0.5, 0.99, 0.9999, 0.99999, 1.0]), st.floats(0, 1)),
    seed=st.integers(0, 2**30),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_quantile_equals_torch(rows: int, count: int, alpha: float, seed: int, levels: int) -> None:
    """Few levels give ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels, (rows, count), generator=generator).double() / 7
    torch.testing.assert_close(quantile(x, alpha), torch.quantile(x, alpha, dim=-1), rtol=1e-12, atol=1e-12)


def test_quantile_of_more_elements_than_torch_can() -> None:
    """A permutation of 0..n-1, n = 2^24 + 1000: the quantile is known exactly."""
    count = 2**24 + 1000
    x = (torch.arange(count, dtype=torch.int64) * 7919 % count).float()  # 7919 is prime and no divisor of n
    assert math.gcd(7919, count) == 1
    for alpha in (0.9999, 0.999999):
        expected = alpha * (count - 1)
        assert abs(float(quantile(x, alpha)) - expected) <= 2.0  # float32 spacing at 2^24
    assert quantile(x, 1.0) == x.max()


def test_minmax_of_every_batch_and_granularity() -> None:
    first = torch.tensor([[[1.0, -2.0, 3.0, 0.5]]])
    second = torch.tensor([[[-4.0, 1.0, 0.0, 0.25]], [[0.0, 0.0, -5.0, 0.0]]])
    scale, zero = scale_of(QuantSpec(bits=8), first, second)
    assert zero is None and scale.shape == () and scale == torch.tensor(5.0 / 127)
    scale, _ = scale_of(QuantSpec(bits=8, granularity="channel"), first, second)
    torch.testing.assert_close(scale, torch.tensor([4.0, 2.0, 5.0, 0.5]) / 127, rtol=1e-7, atol=0)
    scale, _ = scale_of(QuantSpec(bits=4, full_range=True), first)
    torch.testing.assert_close(scale, torch.tensor(2 * 3.0 / 15), rtol=1e-7, atol=0)


def test_a_tensor_of_zeros_has_a_usable_scale() -> None:
    scale, _ = scale_of(QuantSpec(bits=8, granularity="channel"), torch.zeros(1, 3, 4))
    assert bool((scale > 0).all()) and bool(torch.isfinite(1 / scale).all())


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [(-1.0, 3.0, 4 / 255, -64), (0.5, 2.55, 2.55 / 255, -128), (-2.55, -0.5, 2.55 / 255, 127)],
)
def test_asymmetric_range_holds_zero_and_both_ends(low: float, high: float, scale: float, zero: int) -> None:
    spec = QuantSpec(bits=8, symmetric=False)
    found, point = scale_of(spec, torch.tensor([[[low, high, high, low]]]))
    torch.testing.assert_close(found, torch.tensor(scale), rtol=1e-6, atol=0)
    assert float(point) == zero
    for end in (min(low, 0.0), max(high, 0.0)):
        code = max(-128, min(127, round(end / float(found)) + zero))
        assert abs((code - zero) * float(found) - end) <= 0.5 * float(found) + 1e-6


def sample_quantiles(batches: list[torch.Tensor], alpha: float) -> list[float]:
    return [float(torch.quantile(sample.abs().double(), alpha)) for batch in batches for sample in batch]


def test_percentile_is_the_mean_of_the_samples_quantiles() -> None:
    batches = [torch.randn(3, 50, 4), torch.randn(2, 30, 4) * 4]
    spec = QuantSpec(bits=8, scale={"percentile": {"alpha": 0.97}})
    quantiles = sample_quantiles(batches, 0.97)
    scale, _ = scale_of(spec, *batches)
    assert abs(float(scale) - sum(quantiles) / 5 / 127) <= 1e-6 * float(scale)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0])
def test_percentile_with_a_moving_average_starts_at_the_first_sample(sigma: float) -> None:
    batches = [torch.randn(3, 50, 4), torch.randn(2, 30, 4) * 4]
    expected, *rest = sample_quantiles(batches, 0.99)
    for value in rest:
        expected = (1 - sigma) * expected + sigma * value
    scale, _ = scale_of(QuantSpec(bits=8, scale={"percentile": {"alpha": 0.99, "ema": sigma}}), *batches)
    assert abs(float(scale) - expected / 127) <= 1e-6 * float(scale)


def test_percentile_of_everything_is_minmax_of_one_sample() -> None:
    x = torch.randn(1, 64, 4)
    for granularity in ("tensor", "channel"):
        clipped, _ = scale_of(QuantSpec(bits=8, granularity=granularity, scale={"percentile": {"alpha": 1.0}}), x)
        whole, _ = scale_of(QuantSpec(bits=8, granularity=granularity), x)
        torch.testing.assert_close(clipped, whole, rtol=1e-6, atol=0)


def test_percentile_clips_an_outlier_per_channel() -> None:
    x = torch.ones(1, 1000, 4)
    x[0, 5, 2] = 1000.0
    scale, _ = scale_of(QuantSpec(bits=8, granularity="channel", scale={"percentile": {"alpha": 0.99}}), x)
    torch.testing.assert_close(scale, torch.full((4,), 1 / 127), rtol=1e-6, atol=0)


def test_percentile_of_a_last_group_that_is_not_full_ignores_the_padding() -> None:
    """A row of 10 ones in groups of 8: the second group has 2 members, and its median magnitude is 1, not 0."""
    layout = Layout(("out", "in"), (1, 10), flat=False)
    spec = QuantSpec(bits=4, granularity="group(8)", scale={"percentile": {"alpha": 0.5}})
    scale, _ = scale_of(spec, torch.ones(1, 1, 10), layout=layout)
    torch.testing.assert_close(scale, torch.full((1, 2), 1 / 7), rtol=1e-6, atol=0)


def test_float16_scales_are_what_is_used() -> None:
    x = torch.full((1, 1, 4), 0.3)
    scale, _ = scale_of(QuantSpec(bits=4, scale_dtype="float16"), x)
    assert scale.dtype == torch.float32 and scale == torch.tensor(0.3 / 7).half().float()


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ("minmaxx", ["layers.0.mixer.u", "minmaxx", "did you mean 'minmax'"]),
        ({"percentile": {"alfa": 0.9}}, ["layers.0.mixer.u", "alfa", "did you mean 'alpha'"]),
        ({"minmax": {"alpha": 0.9}}, ["layers.0.mixer.u", "minmax", "alpha"]),
        ({"percentile": {"alpha": 99.99}}, ["layers.0.mixer.u", "alpha", "99.99"]),
        ({"percentile": {"alpha": "high"}}, ["layers.0.mixer.u", "alpha", "high"]),
        ({"percentile": {"ema": 0}}, ["layers.0.mixer.u", "ema", "0"]),
    ],
)
def test_mistakes_are_named_before_any_work(scale: object, words: list[str]) -> None:
    with pytest.raises(SquamataError) as caught:
        scales.check(QuantSpec(bits=8, scale=scale), "layers.0.mixer.u")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
