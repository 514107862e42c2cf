"""Partitions against brute force: for every granularity, every element must meet exactly its own group's number."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squamata.kernels.partition import Layout, Partition, gather
from squamata.kernels.qtensor import QTensor
from squamata.spec.granularity import Granularity
from squamata.spec.quant import QuantSpec

Key = Callable[[tuple[int, ...]], object]  # place of an element among the features -> its group


def segment_of(row: int, segments: tuple[int, ...]) -> int:
    return next(number for number, end in enumerate(itertools.accumulate(segments)) if row < end)


WEIGHT = {
    "tensor": lambda at: 0,
    "channel": lambda at: at[0],
    "out": lambda at: at[0],
    "group(3)": lambda at: (at[0], at[1] // 3),
    "group(128)": lambda at: (at[0], at[1] // 128),
    "segment": lambda at: segment_of(at[0], (2, 3, 1)),
}
HEADS = {
    "tensor": lambda at: 0,
    "head": lambda at: at[0],
    "channel": lambda at: at,
    "head,channel": lambda at: at,
    "group(2)": lambda at: (at[0], at[1] // 2),
}
STATE = {
    "tensor": lambda at: 0,
    "head": lambda at: at[0],
    "state": lambda at: at[2],
    "head,channel": lambda at: at[:2],
    "channel": lambda at: at[:2],
    "head,state": lambda at: (at[0], at[2]),
    "head,channel,state": lambda at: at,
    "group(2)": lambda at: (at[0], at[1], at[2] // 2),
}
CONV = {
    "tensor": lambda at: 0,
    "channel": lambda at: at[0],
    "tap": lambda at: at[1],
    "channel,tap": lambda at: at,
    "segment": lambda at: segment_of(at[0], (2, 3, 1)),
}
GROUPS = {"ssd_group": lambda at: at[0], "state": lambda at: at[1], "ssd_group,state": lambda at: at}
LAYOUTS = {
    "weight": (Layout(("out", "in"), (6, 7), (2, 3, 1), flat=False), WEIGHT),
    "heads": (Layout(("head", "channel"), (3, 5)), HEADS),
    "state": (Layout(("head", "channel", "state"), (3, 2, 5), flat=False), STATE),
    "mamba1-state": (
        Layout(("channel", "state"), (4, 3), flat=False),
        {"channel": lambda at: at[0], "tensor": lambda at: 0},
    ),
    "conv": (Layout(("channel", "tap"), (6, 4), (2, 3, 1), flat=False), CONV),
    "conv-bias": (
        Layout(("channel",), (6,), (2, 3, 1), flat=False),
        {"segment": lambda at: segment_of(at[0], (2, 3, 1))},
    ),
    "groups": (Layout(("ssd_group", "state"), (2, 5)), GROUPS),
}
CASES = [
    pytest.param(layout, text, key, id=f"{name}-{text}")
    for name, (layout, keys) in LAYOUTS.items()
    for text, key in keys.items()
]


def brute_force_maxima(x: torch.Tensor, layout: Layout, key: Key) -> dict[object, float]:
    """x (observations, *features) -> group -> largest magnitude."""
    largest: dict[object, float] = defaultdict(float)
    for at in itertools.product(*map(range, layout.sizes)):
        largest[key(at)] = max(largest[key(at)], float(x[(slice(None), *at)].abs().max()))
    return largest


def assert_groups_are(partition: Partition, key: Key, seed: int) -> None:
    """split finds every group's maximum, and expand puts it on exactly that group's elements."""
    layout = partition.layout
    x = torch.randn(2, *layout.sizes, generator=torch.Generator().manual_seed(seed)) + 0.01
    parts = partition.split(x.reshape(2, -1) if layout.flat else x)
    stored = gather([part.abs().amax(-1) for part in parts], partition.shape())
    expected = brute_force_maxima(x, layout, key)
    assert stored.numel() == len(expected)
    expanded = QTensor(
        x[0], partition.expand(stored), QuantSpec(bits=8, granularity=partition.granularity)
    ).element_scale()
    expanded = expanded.expand(layout.flat_size) if layout.flat else expanded.expand(layout.sizes)
    for at in itertools.product(*map(range, layout.sizes)):
        assert float(expanded.reshape(layout.sizes)[at]) == expected[key(at)], at


@pytest.mark.parametrize(("layout", "text", "key"), CASES)
def test_every_element_meets_its_own_group(layout: Layout, text: str, key: Key) -> None:
    assert_groups_are(Partition(Granularity.parse(text), layout), key, seed=3)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 40), group=st.integers(1, 50), seed=st.integers(0, 2**20))
def test_groups_that_need_not_divide(rows: int, columns: int, group: int, seed: int) -> None:
    partition = Partition(Granularity((), group), Layout(("out", "in"), (rows, columns), flat=False))
    assert partition.shape() == (rows, -(-columns // group))
    assert_groups_are(partition, lambda at: (at[0], at[1] // group), seed)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    channels=st.integers(1, 5),
    states=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_ragged_groups(heads: int, channels: int, states: int, seed: int, data: st.DataObject) -> None:
    """An index over (head, channel), alone at `u`, and with the state axis kept at the state."""
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=heads * channels, max_size=heads * channels))
    used = {value: place for place, value in enumerate(sorted(set(numbers)))}
    index = torch.tensor([used[value] for value in numbers]).reshape(heads, channels)
    ragged = Partition(Granularity.parse("index"), Layout(("head", "channel"), (heads, channels)), index)
    assert_groups_are(ragged, lambda at: int(index[at]), seed)
    state = Layout(("head", "channel", "state"), (heads, channels, states), flat=False)
    assert_groups_are(Partition(Granularity.parse("index"), state, index), lambda at: int(index[at[:2]]), seed)
    with_state = Partition(Granularity.parse("index,state"), state, index)
    assert with_state.shape() == (len(used), states)
    assert_groups_are(with_state, lambda at: (int(index[at[:2]]), at[2]), seed)


def test_stored_shapes() -> None:
    layout = Layout(("head", "channel", "state"), (3, 2, 5), flat=False)
    shapes = {"tensor": (), "head": (3,), "head,channel": (3, 2), "state": (5,), "head,state": (3, 5)}
    for text, shape in shapes.items():
        assert Partition(Granularity.parse(text), layout).shape() == shape
