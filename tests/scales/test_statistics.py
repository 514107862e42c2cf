"""What one pass gathers: counts that no order of the data can change, fair samples, bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout, Partition, gather
from squamata.scales.gram import Gram
from squamata.scales.histogram import COUNTS, Histogram
from squamata.scales.sample import Sample
from squamata.scales.statistics import Needs, Statistics
from squamata.spec.granularity import Granularity

HEADS = Layout(("head", "channel"), (2, 3))
EVERYTHING = Needs(quantiles=(0.9,), moments=True, histogram=True, sample=True)


def filled(*batches: torch.Tensor) -> Histogram:
    """Each batch (groups, members)."""
    histogram = Histogram(len(batches[0]))
    for batch in batches:
        histogram.update([batch], batch.abs().amax(1))
    return histogram


def brute_force(values: torch.Tensor, half: int) -> tuple[int, list[int]]:
    """Exponent and counts by exact integer arithmetic, one group."""
    largest = float(values.abs().max())
    exponent = math.frexp(largest)[1] if largest else -100
    counts = [0] * (2 * half)
    for value in values.double().tolist():
        counts[math.floor(value * half / 2.0**exponent) + half] += 1
    return exponent, counts


@settings(max_examples=100, deadline=None)
@given(
    magnitudes=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    members=st.integers(1, 40),
    seed=st.integers(0, 2**30),
)
def test_merged_counts_are_those_of_filling_at_the_last_width(magnitudes: list[float], members: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, members, generator=generator) * size for size in magnitudes]
    batches[0][1] = 0.0  # a group that is silent at first
    histogram = filled(*batches)
    for group in range(2):
        values = torch.cat([batch[group] for batch in batches])
        exponent, counts = brute_force(values, histogram.half)
        assert int(histogram.exponent[group]) == exponent and histogram.counts[group].tolist() == counts
    other_way = filled(*reversed(batches))
    assert torch.equal(histogram.counts, other_way.counts) and torch.equal(histogram.exponent, other_way.exponent)


def test_powers_of_two_and_their_neighbours_fall_on_the_right_side_of_an_edge() -> None:
    one = torch.tensor(1.0)
    values = torch.stack([one, torch.nextafter(one, one * 2), torch.nextafter(one, one * 0), -one, one * 0, -one * 0])
    histogram = filled(values[None])
    assert int(histogram.exponent) == 1
    index = [math.floor(float(value) * histogram.half / 2) + histogram.half for value in values]
    assert histogram.counts.sum() == 6 and all(histogram.counts[0, place] > 0 for place in index)
    assert float(histogram.edges()[0, index[0]]) == 1.0 and index[2] == index[0] - 1


def test_a_histogram_of_many_groups_is_coarse_and_small() -> None:
    assert Histogram(1).half == 4096 and Histogram(5120).half >= 512
    for groups in (1, 80, 5120, 100_000):
        assert Histogram(groups).counts.numel() <= max(COUNTS, 16 * groups)


@pytest.mark.parametrize("needs", [Needs(), Needs(quantiles=(0.9,)), Needs(moments=True), EVERYTHING])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused_whoever_asks(bad: float, needs: Needs) -> None:
    """One of them would make a scale of NaN, which a checkpoint would keep."""
    x = torch.ones(1, 4, 6)
    Statistics(Partition(Granularity(("head",)), HEADS), needs).update(x * 3e38)  # large is not infinite
    x[0, 2, 3] = bad
    with pytest.raises(SquamataError, match="not finite"):
        Statistics(Partition(Granularity(("head",)), HEADS), needs).update(x)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e25])
def test_second_moments_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(2, 3)
    x[1, 1] = bad
    with pytest.raises(SquamataError, match="not finite"):
        Gram(3).update(x)


def ragged() -> Partition:
    return Partition(Granularity.parse("index"), HEADS, torch.tensor([[0, 1, 1], [2, 1, 0]]))


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "group(4)", "index"])
def test_every_group_gets_its_own_members(granularity: str) -> None:
    """Histogram, moments and sample of every group against its members, gathered by hand."""
    partition = ragged() if granularity == "index" else Partition(Granularity.parse(granularity), HEADS)
    if granularity == "group(4)":
        partition = Partition(Granularity.parse(granularity), Layout(("channel",), (8,)))
    features = partition.layout.flat_size
    batches = [torch.randn(3, 5, features) * torch.logspace(-1, 1, features) * size for size in (0.1, 7.0)]
    statistics = Statistics(partition, EVERYTHING)
    for batch in batches:
        statistics.update(batch)
    assert statistics.histogram and statistics.moments and statistics.sample
    members = [row for part in partition.split(torch.cat(batches)) for row in part]
    sampled = [row for part in statistics.sample.values for row in part]
    assert len(members) == len(statistics.histogram.counts) == len(sampled) == math.prod(partition.shape())
    for group, values in enumerate(members):
        exponent, counts = brute_force(values, statistics.histogram.half)
        assert int(statistics.histogram.exponent[group]) == exponent
        assert statistics.histogram.counts[group].tolist() == counts
        assert torch.equal(sampled[group].sort().values, values.sort().values)  # few values: all of them
        assert float(statistics.moments.count[group]) == len(values)
        sums = [values.double().sum(), values.double().abs().sum(), values.double().square().sum()]
        found = [statistics.moments.total, statistics.moments.magnitude, statistics.moments.square]
        for expected, one in zip(sums, found, strict=True):
            assert abs(float(one[group]) - float(expected)) <= 1e-6 * float(values.double().square().sum() + 1)
    for alpha, found in statistics.quantiles.items():
        for sample, value in zip(torch.cat(batches), found, strict=True):  # one a sample
            parts = [torch.quantile(part.abs(), alpha, dim=1) for part in partition.split(sample)]
            torch.testing.assert_close(value, gather(parts, partition.shape()))


def test_a_sample_is_fair_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0..9999 in batches of 100, 1000 are kept: early and late ones alike, each once, the same every time."""
    monkeypatch.setattr("squamata.scales.sample.LARGEST", 1000)
    first, second = Sample(1), Sample(1)
    for sample in (first, second):
        for batch in torch.arange(10_000.0).split(100):
            sample.update([batch[None]])
    kept = first.values[0][0]
    assert torch.equal(kept, second.values[0][0]) and len(kept.unique()) == 1000 and not first.complete(0)
    assert abs(float(kept.mean()) - 4999.5) < 4 * 10_000 / math.sqrt(12 * 1000)
    quarters = torch.histc(kept, 4, 0, 10_000)
    assert bool(((quarters - 250).abs() < 4 * math.sqrt(250 * 0.75)).all())


def test_what_nobody_needs_is_not_gathered() -> None:
    statistics = Statistics(Partition(Granularity(), HEADS))
    statistics.update(torch.randn(2, 3, 6))
    assert statistics.histogram is statistics.moments is statistics.sample is None and not statistics.quantiles
