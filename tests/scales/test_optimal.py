"""Strategies that look for the best range: against brute force, closed forms and numerical integration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from squamata import scales
from squamata.errors import SquamataError
from squamata.kernels.codec import CODECS, Grid, range_to_scale
from squamata.kernels.partition import Layout, Partition
from squamata.scales import error
from squamata.scales.aciq import Distribution, clipping_error, optimal_clip
from squamata.scales.entropy import divergence
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.formats import FORMATS
from squamata.spec.quant import QuantSpec

HEADS = Layout(("head", "channel"), (4, 8))
RAGGED = torch.arange(32).reshape(4, 8) * 7 % 5
DENSITY = Needs(histogram=True, sample=True)


def gathered(spec: QuantSpec, x: Tensor, index: Tensor | None = None, layout: Layout = HEADS) -> Statistics:
    statistics = scales.gather_for(Partition(spec.granularity, layout, index), spec)
    for batch in x.split(2):
        statistics.update(batch)
    return statistics


def one_group(x: Tensor, spec: QuantSpec) -> Statistics:
    """Statistics of a tensor of any shape as one group, histogram and sample included."""
    statistics = Statistics(Partition(spec.granularity, Layout(("channel",), (1,))), DENSITY)
    statistics.update(x.reshape(1, -1, 1))
    return statistics


def scale_of(scale: Any, x: Tensor, **fields: Any) -> Tensor:
    """Scale of all of x as one group."""
    spec = QuantSpec(scale=scale, **fields)
    found, _ = scales.compute(gathered(spec, x.reshape(1, -1, 1), layout=Layout(("channel",), (1,))), spec)
    return found


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    codec = CODECS[spec.codec]
    grid = Grid.of(scale, zero)
    grid = grid if codec.live is None else codec.live(x, grid, spec)
    codes = codec.encode(x, grid, spec)
    point = zero if spec.linear_grid and zero is not None else 0.0
    return codec.decode(codes - point, scale, grid.second, spec, torch.float32)


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Student's t with three degrees of freedom: like activations, mostly small and now and then very large."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(4, *shape, generator=generator)
    return draws[0] / draws[1:].square().mean(0).sqrt()


@pytest.mark.parametrize("rounding", ["half-even", "truncate"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "power"), [(2, 2.0), (4, 2.0), (4, 2.4), (8, 2.0), (8, 1.0)])
def test_the_histograms_error_is_that_of_the_values(bits: int, power: float, symmetric: bool, rounding: Any) -> None:
    """200k values, clipped hard and not at all; the piecewise constant density is worth 1 %."""
    spec = QuantSpec(bits=bits, symmetric=symmetric, rounding=rounding)
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) + 0.5
    statistics = one_group(x, spec)
    assert not statistics.sample.complete(0)
    for ratio in (0.1, 0.5, 1.0):
        scale, zero = range_to_scale(ratio * x.min(), ratio * x.max(), spec)
        exact = (x - quantized(x, scale, zero, spec)).abs().double().pow(power).mean()
        found = error.mean_error(statistics, scale, zero, spec, power)
        torch.testing.assert_close(found[0], exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("codec", ["uniform", *FORMATS])
@pytest.mark.parametrize("count", [500, 100_000])
def test_the_error_of_few_values_is_exact_and_of_other_formats_the_samples(codec: Any, count: int) -> None:
    spec = QuantSpec(bits=5 if codec == "ltsq" else 6, codec=codec)
    x = heavy((count,))
    statistics = one_group(x, spec)
    assert statistics.sample.complete(0) == (count == 500)
    scale = x.abs().quantile(0.99) / spec.span
    fit = CODECS[codec].fit
    exact = (x - quantized(x, scale, None if fit is None else fit(scale, x.abs().max(), spec), spec)).abs()
    found = error.mean_error(statistics, scale, None, spec, 1.0)[0]
    torch.testing.assert_close(found, exact.mean(dtype=torch.float64), rtol=1e-5 if count == 500 else 0.03, atol=0)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "index"])
def test_every_strategy_serves_every_format(codec: Any, granularity: str) -> None:
    """Usable scales in stored form, and none has less error than that of the least error."""
    x = heavy((2, 300, 32))
    index = RAGGED if granularity == "index" else None
    errors = {}
    for strategy in ("mse", "minmax", "percentile", "aciq", "entropy", "outlier_aware"):
        spec = QuantSpec(bits=5, codec=codec, granularity=granularity, scale=strategy)
        scale, second = scales.compute(gathered(spec, x, index), spec)
        assert bool((scale > 0).all()) and (second is None) == (spec.second is None)
        judge = QuantSpec(bits=5, codec=codec, granularity=granularity, scale="mse")
        errors[strategy] = float(error.mean_error(gathered(judge, x, index), scale, None, judge).mean())
    assert min(errors.values()) >= 0.97 * errors["mse"]


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "group(16)", "index"])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_best_of_its_grid_by_brute_force(granularity: str, bits: int, symmetric: bool) -> None:
    """Few values, so that the sample is exact: for every group the ratio that brute force finds."""
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity, scale={"mse": {"grid": 24}})
    x = heavy((4, 50, 32)) * torch.logspace(-1, 1, 32)
    statistics = gathered(spec, x, RAGGED if granularity == "index" else None)
    scale, zero = scales.compute(statistics, spec)
    groups = [row for part in statistics.partition.split(x) for row in part]
    assert len(groups) == scale.numel()
    for number, members in enumerate(groups):
        tried = []
        for ratio in torch.linspace(1.0, 0.05, 24).tolist():
            parts = range_to_scale(ratio * members.min(), ratio * members.max(), spec)
            tried.append((float((members - quantized(members, *parts, spec)).square().mean()), *parts))
        own = (scale.reshape(-1)[number], None if zero is None else zero.reshape(-1)[number])
        found = float((members - quantized(members, *own, spec)).square().mean())
        assert found <= min(cost for cost, _, _ in tried) * (1 + 1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "index"])
def test_mse_from_histograms_is_within_a_percent_of_brute_force(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squamata.scales.sample.LARGEST", 100)  # nothing is complete: histograms alone
    spec = QuantSpec(bits=4, granularity=granularity, scale={"mse": {"grid": 48}})
    x = heavy((4, 500, 32))
    statistics = gathered(spec, x, RAGGED if granularity == "index" else None)
    scale, _ = scales.compute(statistics, spec)
    groups = [row for part in statistics.partition.split(x) for row in part]
    for own, members in zip(scale.reshape(-1), groups, strict=True):
        steps = torch.linspace(0.05, 1, 48) * members.abs().max() / 7
        tried = [float((members - quantized(members, step, None, spec)).square().mean()) for step in steps]
        found = float((members - quantized(members, own, None, spec)).square().mean())
        assert found <= min(tried) * 1.01


def test_uniform_values_are_not_clipped_and_gaussian_ones_where_theory_says() -> None:
    """Uniform on [-1, 1]: the best step puts the last code half a step inside the end, 1 / (Q + 1/2)."""
    uniform = torch.linspace(-1, 1, 300_001)
    gaussian = torch.erfinv(torch.linspace(-1, 1, 300_003)[1:-1].double()).float() * math.sqrt(2)
    for bits, largest in ((3, 3), (4, 7)):
        step = scale_of({"mse": {"grid": 2000}}, uniform, bits=bits)
        assert abs(float(step) * (largest + 0.5) - 1) < 2e-3
    step = scale_of({"mse": {"grid": 2000}}, gaussian, bits=3)
    assert abs(float(step) - best_step("gaussian", 3)) < 5e-3


def density(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Points and masses of the positive half: numerical integration by the midpoint rule."""
    x = (np.arange(2_000_000) + 0.5) * 2e-5
    f = np.exp(-x) if distribution == "laplace" else math.sqrt(2 / math.pi) * np.exp(-(x**2) / 2)
    return x, f * 2e-5


def best_step(distribution: Distribution, largest: int) -> float:
    """The step of the grid -Q..Q with the least true squared error, by numerical integration."""
    x, mass = density(distribution)
    x, mass = x[::20], mass[::20] * 20
    steps = np.geomspace(0.3, 14, 400) / largest
    costs = [float((mass * (x - step * np.minimum(np.round(x / step), largest)) ** 2).sum()) for step in steps]
    return float(steps[int(np.argmin(costs))])


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 2.5, 6.0])
def test_clipping_error_is_the_integral(distribution: Distribution, alpha: float) -> None:
    x, mass = density(distribution)
    integral = float((mass * np.maximum(x - alpha, 0) ** 2).sum())
    assert abs(clipping_error(distribution, alpha) - integral) < 1e-6


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_aciq_constants_minimise_the_integrated_error(distribution: Distribution, bits: int) -> None:
    """Noise of a step squared over 12, clipping integrated numerically: no alpha on a fine grid is better."""
    steps = 2 ** (bits - 1)
    x, mass = density(distribution)
    x, mass = x[::20], mass[::20] * 20

    def cost(alpha: float) -> float:
        return float((mass * np.maximum(x - alpha, 0) ** 2).sum()) + (alpha / steps) ** 2 / 12

    best = optimal_clip(distribution, steps)
    grid = [cost(best * ratio) for ratio in np.linspace(0.8, 1.25, 46)]
    assert cost(best) <= min(grid) * (1 + 1e-6)


def test_aciq_constants_of_the_paper_and_its_closed_form() -> None:
    """Published: Laplace 2.83, 3.89, 5.03 and Gaussian 1.71, 2.15, 2.55 at 2, 3, 4 bits. alpha e^alpha = 3 4^bits."""
    published: dict[Distribution, tuple[float, ...]] = {"laplace": (2.83, 3.89, 5.03), "gaussian": (1.71, 2.15, 2.55)}
    for distribution, constants in published.items():
        for bits, constant in zip((2, 3, 4), constants, strict=True):
            assert abs(optimal_clip(distribution, 2 ** (bits - 1)) - constant) < 0.011
    for bits in range(2, 9):
        alpha = optimal_clip("laplace", 2 ** (bits - 1))
        assert abs(alpha * math.exp(alpha) / (3 * 4**bits) - 1) < 1e-9


@pytest.mark.parametrize(("bits", "tolerance"), [(2, 0.45), (3, 0.2), (4, 0.1), (6, 0.04), (8, 0.04)])
@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_aciq_is_near_the_true_optimum_of_the_grid(distribution: Distribution, bits: int, tolerance: float) -> None:
    """Its noise model is poor at 2 bits (three levels) and good from 4 on."""
    largest = 2 ** (bits - 1) - 1
    own = optimal_clip(distribution, largest) / largest
    assert abs(own / best_step(distribution, largest) - 1) < tolerance


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "index"])
@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_aciq_recognises_the_distribution_in_every_group(distribution: Distribution, granularity: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (4, 4000, 32)
    x = torch.randn(shape, generator=generator)
    if distribution == "laplace":
        x = -torch.log(torch.rand(shape, generator=generator)) * torch.sign(x)
    spread = torch.logspace(-1, 1, 5)[RAGGED.reshape(-1)] if granularity == "index" else torch.ones(32)
    spec = QuantSpec(bits=4, granularity=granularity, scale="aciq")
    scale, _ = scales.compute(gathered(spec, x * spread, RAGGED if granularity == "index" else None), spec)
    expected = optimal_clip(distribution, 7) / 7 * (torch.logspace(-1, 1, 5) if granularity == "index" else 1.0)
    torch.testing.assert_close(scale, torch.as_tensor(expected).expand_as(scale), rtol=0.06, atol=0)


def test_aciq_of_an_asymmetric_format_is_about_the_mean() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) * 0.1 + 5
    spec = QuantSpec(bits=4, symmetric=False, scale="aciq")
    scale, zero = scales.compute(gathered(spec, x.reshape(1, -1, 1), layout=Layout(("channel",), (1,))), spec)
    reach = 0.1 * optimal_clip("gaussian", 7.5)
    torch.testing.assert_close(scale, torch.tensor((5 + reach) / 15), rtol=1e-3, atol=0)  # the range holds zero
    assert float(zero) == -8


def test_aciq_never_reaches_beyond_what_was_seen() -> None:
    assert float(scale_of("aciq", torch.tensor([1.0, -1.0] * 50), bits=8)) == pytest.approx(1 / 127, rel=1e-6)


def test_entropy_cuts_the_lone_outlier_and_keeps_what_is_spread() -> None:
    """A Gaussian bulk that ends at 4.4 and one value at 60: cut near the bulk. Uniform values: nothing is cut."""
    bulk = torch.erfinv(torch.linspace(-1, 1, 100_003)[1:-1].double()).float() * math.sqrt(2)
    assert float(bulk.max()) < 4.4
    cut = float(scale_of("entropy", torch.cat([bulk, torch.tensor([60.0])]), bits=8)) * 127
    assert 2.5 < cut < 10
    assert float(scale_of("entropy", torch.linspace(-1, 1, 100_000), bits=8)) * 127 > 0.97


def test_divergence_against_a_plain_loop() -> None:
    counts = torch.randint(0, 6, (2, 40), generator=torch.Generator().manual_seed(5)).double()
    for kept in (8, 13, 40):
        expected = [plain_divergence(row.tolist(), kept, 8) for row in counts]
        torch.testing.assert_close(
            divergence(counts, kept, 8), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )


def plain_divergence(counts: list[float], kept: int, levels: int) -> float:
    reference = counts[:kept]
    reference[-1] += sum(counts[kept:])
    candidate = [0.0] * kept
    for level in range(levels):
        bins = [j for j in range(kept) if j * levels // kept == level]
        occupied = [j for j in bins if reference[j] > 0]
        for j in occupied:
            candidate[j] = sum(counts[k] for k in bins) / len(occupied)
    total = 0.0
    for p, q in zip(reference, candidate, strict=True):
        if p > 0:
            if q == 0:
                return math.inf
            total += p / sum(reference) * math.log(p / sum(reference) / (q / sum(candidate)))
    return total


def test_entropy_refuses_more_groups_than_it_can_tell_apart() -> None:
    spec = QuantSpec(bits=8, granularity="channel,state", scale="entropy")
    layout = Layout(("channel", "state"), (1024, 64), flat=False)
    statistics = gathered(spec, torch.randn(1, 1024, 64), layout=layout)
    with pytest.raises(SquamataError, match=r"entropy .* coarser granularity"):
        scales.compute(statistics, spec)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "index"])
def test_outlier_aware_is_the_quantile_over_120(granularity: str) -> None:
    spec = QuantSpec(bits=8, granularity=granularity, scale="outlier_aware")
    x = heavy((1, 400, 32))
    statistics = gathered(spec, x, RAGGED if granularity == "index" else None)
    scale, zero = scales.compute(statistics, spec)
    groups = [row for part in statistics.partition.split(x) for row in part]
    expected = torch.stack([torch.quantile(members.abs().double(), 0.99) for members in groups]).float() / 120
    torch.testing.assert_close(scale.reshape(-1), expected, rtol=1e-6, atol=0)
    assert zero is None
    share = (x.reshape(-1)[None] if granularity == "tensor" else torch.empty(0)).abs() <= 120.0001 * scale.max()
    assert granularity != "tensor" or abs(float(share.float().mean()) - 0.99) < 1e-3


def test_outlier_aware_takes_quantile_and_level() -> None:
    x = torch.linspace(-1, 1, 2001)
    scale = scale_of({"outlier_aware": {"quantile": 0.5, "level": 4}}, x, bits=4)
    torch.testing.assert_close(scale, torch.tensor(0.5 / 4), rtol=1e-6, atol=0)
    narrow = scale_of({"outlier_aware": {"quantile": 0.5}}, x, bits=4)
    torch.testing.assert_close(narrow, torch.tensor(0.5 / (7 * 120 / 127)), rtol=1e-6, atol=0)


CANDIDATES = ["minmax", {"percentile": {"alpha": 0.99}}, {"percentile": {"alpha": 0.9}}, "aciq"]


@pytest.mark.parametrize("by", ["mse", "codes", "kl"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "index"])
def test_search_is_the_cheapest_of_its_candidates(by: str, granularity: str) -> None:
    index = RAGGED if granularity == "index" else None
    spec = QuantSpec(bits=4, granularity=granularity, scale={"search": {"over": CANDIDATES, "by": by}})
    x = heavy((4, 300, 32))
    statistics = gathered(spec, x, index)
    found, _ = scales.compute(statistics, spec)
    cost = error.mean_error if by in ("mse", "kl") else error.information_lost  # kl: until the model is whole
    members = torch.tensor([float(row.numel()) for part in statistics.partition.split(x) for row in part])
    tried = []
    for candidate in CANDIDATES:
        alone = QuantSpec(bits=4, granularity=granularity, scale=candidate)
        scale, _ = scales.compute(gathered(alone, x, index), alone)
        tried.append((float((cost(statistics, scale, None, spec) * members).sum()), scale))
    torch.testing.assert_close(found, min(tried, key=lambda pair: pair[0])[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", ["mse", "codes"])
def test_the_forms_of_a_search_are_one(by: str) -> None:
    """The issue's, with values of a parameter; each candidate by itself; the list alone. A value given is kept."""
    x = heavy((4, 300, 32))
    alphas = [0.9, 0.99, 0.999]
    each: list[Any] = [{"percentile": {"alpha": alpha}} for alpha in alphas]
    fixed = {"percentile": {"alpha": 0.5}}
    forms: list[Any] = [
        {"search": ["percentile", "aciq", fixed], "over": {"alpha": alphas}, "by": by},
        {"search": [*each, "aciq", fixed], "by": by},
        {"search": {"over": [*each, "aciq", fixed], "by": by}},
        {"search": {"candidates": ["percentile", "aciq", fixed], "over": {"alpha": alphas}, "by": by}},
    ]
    specs = [QuantSpec(bits=4, scale=form) for form in forms]
    assert QuantSpec.model_validate(specs[0].model_dump()) == specs[0]
    tried = [[float(scale) for scale, _ in scales.choices(gathered(spec, x), spec)] for spec in specs]
    alone = [QuantSpec(bits=4, scale=one) for one in (*each, "aciq", fixed)]
    expected = [float(scales.compute(gathered(one, x), one)[0]) for one in alone]
    assert all(found == pytest.approx(expected) for found in tried)
    chosen = [float(scales.compute(gathered(spec, x), spec)[0]) for spec in specs]
    assert len(set(chosen)) == 1 and chosen[0] in tried[0]


@pytest.mark.parametrize(("rare", "lost"), [(8, 0.0), (4, 0.75 * math.log(1.5) + 0.25 * math.log(0.5))])
def test_information_lost_in_closed_form(rare: int, lost: float) -> None:
    """Two values that share a code: it says nothing of how often each comes. With a code each they lose nothing."""
    spec = QuantSpec(bits=3)
    statistics = one_group(torch.tensor([0.9] * (16 - rare) + [1.0] * rare), spec)
    together, apart = torch.tensor(1.0), torch.tensor(0.63)  # codes 1 and 1, 1 and 2
    assert float(error.information_lost(statistics, together, None, spec)) == pytest.approx(lost, rel=1e-9, abs=1e-12)
    assert float(error.information_lost(statistics, apart, None, spec)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "scale", ["mse", "lnorm", "aciq", "entropy", {"search": {"over": ["mse", "entropy"], "by": "codes"}}]
)
def test_the_order_of_the_batches_changes_nothing(scale: Any) -> None:
    spec = QuantSpec(bits=8, granularity="head", scale=scale)
    x = heavy((6, 3000, 32)) * torch.logspace(-2, 2, 6)[:, None, None]
    forwards, _ = scales.compute(gathered(spec, x), spec)
    backwards, _ = scales.compute(gathered(spec, x.flip(0)), spec)
    torch.testing.assert_close(forwards, backwards, rtol=0 if scale != "aciq" else 1e-6, atol=0)


@pytest.mark.parametrize("scale", ["minmax", "percentile", "mse", "lnorm", "aciq", "entropy", "outlier_aware"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_silence_gets_a_usable_scale(scale: str, symmetric: bool) -> None:
    spec = QuantSpec(bits=8, granularity="head", symmetric=symmetric, scale=scale)
    found, zero = scales.compute(gathered(spec, torch.zeros(2, 9, 32)), spec)
    assert bool((found > 0).all()) and bool(torch.isfinite(1 / found).all())
    assert zero is None or bool(torch.isfinite(zero).all())


def test_warm_up_holds_until_its_sample() -> None:
    values = [1.0, 3.0, 2.0, 8.0, 5.0]
    expected = values[0]
    for sigma, value in zip((0.5, 0.2, 0.2, 0.1), values[1:], strict=True):
        expected += sigma * (value - expected)
    x = torch.tensor(values)[:, None, None].expand(5, 7, 32)
    given = {"alpha": 1.0, "ema": 0.1, "warmup": {"2": 0.5, 4: 0.2}}  # JSON has keys of text
    spec = QuantSpec(bits=8, scale={"percentile": given})
    scale, _ = scales.compute(gathered(spec, x), spec)
    torch.testing.assert_close(scale, torch.tensor(expected / 127), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({"percentile": {"warmup": {50: 0.5}}}, ["site", "warmup", "ema"]),
        ({"percentile": {"ema": 0.1, "warmup": {0: 0.5}}}, ["site", "warmup"]),
        ({"search": {"over": []}}, ["site", "over"]),
        ({"search": {}}, ["site", "over", "missing"]),
        ({"search": {"over": ["mse", "entropi"]}}, ["site", "over", "did you mean 'entropy'"]),
        ({"search": {"over": [{"percentile": {"alfa": 1}}]}}, ["site", "over", "did you mean 'alpha'"]),
        ({"search": {"over": ["mse"], "by": "logits"}}, ["site", "by", "mse"]),
        ({"search": []}, ["site", "over", "missing"]),
        ({"search": ["mse"], "over": ["aciq"]}, ["site", "two lists"]),
        ({"search": ["percentile"], "over": {"alfa": [0.9]}}, ["site", "over", "did you mean 'alpha'"]),
        ({"search": ["mse", "minmax"], "over": {"alpha": [0.9]}}, ["site", "over", "'alpha'"]),
        ({"search": ["percentile"], "over": {"alpha": []}}, ["site", "over", "no values"]),
        ({"search": ["percentile"], "over": {"alpha": [0.9, 2.0]}}, ["site", "over", "alpha", "2.0"]),
        ({"search": ["percentile"], "bye": "kl"}, ["site", "did you mean 'by'"]),
        ({"mse": {"grid": 1}}, ["site", "grid"]),
        ({"lnorm": {"p": 0}}, ["site", "p"]),
        ({"aciq": {"distribution": "cauchy"}}, ["site", "distribution"]),
    ],
)
def test_mistakes_in_the_new_strategies_are_named(scale: Any, words: list[str]) -> None:
    with pytest.raises(SquamataError) as caught:
        scales.check(QuantSpec(bits=8, scale=scale), "site")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
