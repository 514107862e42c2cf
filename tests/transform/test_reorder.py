"""Sort and cluster: equal logits, the groups that were planted, and maps that a runtime can use."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MemorySource, config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.site import observing
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.spec.granularity import Granularity
from squamata.transform import apply, check
from squamata.transform.observed import Observed
from squamata.transform.reorder import cluster, find_order, noise, reorder, reorder_within, segment

SHAPES: dict[str, dict[str, Any]] = {
    "one-group": {"d_inner": 64, "head_dim": 16, "n_groups": 1},
    "odd-heads": {"d_inner": 84, "head_dim": 6, "n_groups": 2},  # 7 heads a group
    "few-heads": {"d_inner": 48, "head_dim": 6, "n_groups": 8, "d_state": 5},  # one head a group
    "eight-groups": {"d_inner": 120, "head_dim": 5, "n_groups": 8, "d_state": 7},  # 3 heads a group
    "biases": {"d_inner": 64, "head_dim": 8, "n_groups": 2, "projection_bias": True, "conv_bias": True},
}


def observed_u(config: ModelConfig, u: Tensor) -> dict[str, Observed]:
    """Statistics of ``u`` (samples, L, E)."""
    sizes = (config.n_heads, config.head_dim)
    statistics = Observed(Partition(Granularity(("head", "channel")), Layout(("head", "channel"), sizes)))
    statistics.update(u)
    return {"mixer.u": statistics}


def reordered(
    config: ModelConfig, tensors: dict[str, Tensor], transforms: list[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformed tensors of the whole model, and the maps; every layer sorted by random sizes."""
    recipe, changed, maps = recipe_of(transforms=transforms), dict(tensors), {}
    for layer, kind in enumerate(config.blocks):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        u = torch.randn(3, 9, config.d_inner, generator=torch.Generator().manual_seed(layer))
        for name, tensor in apply(recipe, config, kind, own, observed_u(config, u)).items():
            (maps if name.endswith(".index") else changed)[prefix + name] = tensor
    return changed, maps


@pytest.mark.parametrize("transforms", [["reorder"], ["reorder_within"], ["reorder", "hadamard"]], ids="+".join)
@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_the_logits_stay(shape: str, transforms: list[str]) -> None:
    config = config_of("mamba2", **SHAPES[shape])
    tensors = perturbed_tensors(config, dtype=torch.float64)
    ids = random_ids(config, 2, 19)
    changed, maps = reordered(config, tensors, transforms)
    name = "layers.0.mixer.in_proj.weight"
    assert not torch.equal(changed[name], tensors[name]) and maps
    before, after = (float_model(config, some, torch.float64)(ids) for some in (tensors, changed))
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9


@pytest.mark.parametrize("statistic", ["maximum", "mean"])
@pytest.mark.parametrize("shape", list(SHAPES))
@torch.no_grad()
def test_every_head_comes_out_sorted_and_the_map_never_falls(shape: str, statistic: str) -> None:
    """Observed again on the model in its new order; the SSD groups share no number, none is left out."""
    config = config_of("mamba2", **SHAPES[shape], blocks=("mamba2",))
    tensors = perturbed_tensors(config)
    ids = random_ids(config, 3, 21)
    u = collected(config, tensors, ids)
    own = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    changed = reorder(config, "mamba2", own, observed_u(config, u), 3, 2, statistic)  # type: ignore[arg-type]
    again = collected(
        config,
        {f"layers.0.{name}" if name in own else name: t for name, t in changed.items()}
        | {name: tensors[name] for name in tensors if not name.startswith("layers.")},
        ids,
    )
    sizes = again.abs().mean(1).amax(0) if statistic == "mean" else again.abs().amax((0, 1))
    sizes = sizes.reshape(config.n_heads, config.head_dim)
    assert bool((sizes.diff(dim=1) >= -1e-6).all())
    index = changed["mixer.u.index"]
    assert index.dtype == torch.int64 and torch.equal(changed["mixer.state.index"], index)
    by_group = index.reshape(config.n_groups, -1, config.head_dim)
    assert bool((by_group.diff(dim=2) >= 0).all()) and bool((by_group.diff(dim=1)[..., 0] >= 0).all())
    assert torch.equal(torch.unique(index), torch.arange(int(index.max()) + 1))
    apart = [set(part.flatten().tolist()) for part in by_group]
    assert all(not one & other for one, other in itertools.combinations(apart, 2))
    heads = min(3, config.n_heads // config.n_groups)
    assert int(index.max()) + 1 == config.n_groups * heads * 2


def collected(config: ModelConfig, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What lands on u of the first layer, (B, L, E)."""
    model, seen = float_model(config, tensors), []
    with observing([model.blocks[0].sites["u"]], lambda _, x: seen.append(x)):
        model(ids)
    return seen[0]


def test_the_mean_is_the_largest_of_the_samples_means() -> None:
    config = config_of("mamba2")
    u = torch.zeros(3, 4, 64)
    u[0, :, 5], u[1, 0, 5], u[2, :, 9] = torch.tensor([-1.0, 1.0, -2.0, 2.0]), 5.0, -0.5
    statistics = observed_u(config, u)["mixer.u"]
    statistics.update(torch.full((1, 2, 64), -0.25))
    assert statistics.mean is not None
    expected = torch.full((64,), 0.25)
    expected[5], expected[9] = 1.5, 0.5
    assert torch.equal(statistics.mean.flatten(), expected)
    assert float(statistics.magnitude()[1].max()) == 5.0


@pytest.mark.parametrize("groups", [1, 2])
def test_planted_groups_are_found(groups: int) -> None:
    """Heads of four shapes, each a staircase of four steps of its own heights, dealt out at random."""
    rng = np.random.default_rng(groups)
    heads, width = 20, 16
    steps = np.array([[1, 2, 3, 4], [1, 1.5, 2, 40], [1, 30, 31, 32], [0.01, 10, 50, 51]])
    shape_of = np.concatenate([rng.permutation(np.arange(10) % 4) for _ in range(2)])
    step_of = np.stack([rng.permutation(np.repeat(np.arange(4), 4)) for _ in range(heads)])
    if groups == 1:
        shape_of = shape_of[:10]
    sizes = steps[shape_of[:, None], step_of[: len(shape_of)]] * rng.uniform(1, 5, (len(shape_of), 1))
    sizes *= 1 + 1e-4 * rng.standard_normal(sizes.shape)
    order = find_order(sizes, groups, 4, 4)
    per_group = len(sizes) // groups
    old = order.channels.reshape(len(sizes), width)
    assert sorted(old.flatten().tolist()) == list(range(sizes.size))
    planted: dict[int, set[tuple[int, int, int]]] = {}
    for place, head in enumerate(order.heads.tolist()):
        assert place // per_group == head // per_group  # no head leaves its SSD group
        for number, channel in zip(order.groups[place].tolist(), old[place].tolist(), strict=True):
            assert channel // width == head
            kind = (head // per_group, int(shape_of[head]), int(step_of[head, channel % width]))
            planted.setdefault(number, set()).add(kind)
    assert len(planted) == groups * 16 and all(len(kinds) == 1 for kinds in planted.values())
    assert len(set.union(*planted.values())) == groups * 16


def test_without_normalizing_loud_and_quiet_heads_part() -> None:
    sizes = np.outer([1.0, 100.0, 1.1, 99.0], np.arange(1, 9))
    alone = find_order(sizes, 1, 2, 1, normalize=False)
    assert alone.heads.tolist() == [0, 2, 1, 3] and alone.groups[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_scikit_learn(seed: int) -> None:
    points = np.random.default_rng(seed).random((17, 6))
    learned = pytest.importorskip("sklearn.cluster").AgglomerativeClustering(5, linkage="ward").fit_predict(points)
    found = cluster(points, 5)
    assert {frozenset(members) for members in found} == {
        frozenset(np.flatnonzero(learned == label).tolist()) for label in range(5)
    }
    assert [members[0] for members in found] == sorted(members[0] for members in found)
    assert cluster(points, 40) == [[row] for row in range(17)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_segments_are_the_best_of_all(count: int) -> None:
    points = np.sort(np.random.default_rng(count).random((9, 3)) ** 3, axis=0)
    labels = segment(points, count)
    assert labels[0] == 0 and set(np.diff(labels)) <= {0, 1} and labels[-1] == count - 1

    def spread(cuts: tuple[int, ...]) -> float:
        runs = itertools.pairwise((0, *cuts, 9))
        return sum(float(((points[a:b] - points[a:b].mean(0)) ** 2).sum()) for a, b in runs)

    best = min(spread(cuts) for cuts in itertools.combinations(range(1, 9), count - 1))
    assert spread(tuple(np.flatnonzero(np.diff(labels)) + 1)) == pytest.approx(best, abs=1e-12)


def test_lloyd_from_any_start_is_never_better() -> None:
    kmeans = pytest.importorskip("sklearn.cluster").KMeans
    points = np.sort(np.random.default_rng(0).lognormal(size=(64, 5)), axis=0)
    labels = segment(points, 4)
    ours = sum(((points[labels == n] - points[labels == n].mean(0)) ** 2).sum() for n in range(4))
    assert ours <= kmeans(4, init=points[0::16], n_init=1).fit(points).inertia_ * (1 + 1e-9)


def test_sizes_that_are_all_equal_or_zero_make_groups_too() -> None:
    for value in (0.0, 1.0):
        order = find_order(np.full((5, 6), value), 1, 4, 4)
        assert int(order.groups.max()) + 1 == 16 and sorted(order.channels.tolist()) == list(range(30))
    assert segment(np.ones((2, 3)), 4).tolist() == [0, 1]


@torch.no_grad()
def test_scales_of_groups_cover_what_was_seen_and_two_runs_are_equal() -> None:
    config = config_of("mamba2", d_inner=96, head_dim=8, n_groups=2)
    tensors, batches = perturbed_tensors(config), [random_ids(config, 2, 30)]
    recipe = recipe_of(
        {"site": "*.mixer.[uxy]", "spec": {"bits": 8, "granularity": "index"}},
        {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state"}},
        transforms=[{"reorder": {"head_groups": 3, "channel_groups": 2}}, "hadamard"],
    )
    checkpoint, twin = (quantized(config, tensors, recipe, batches) for _ in range(2))
    assert checkpoint.site_tensors.keys() == twin.site_tensors.keys()
    assert all(torch.equal(checkpoint.site_tensors[name], twin.site_tensors[name]) for name in twin.site_tensors)
    model, largest = LanguageModel(checkpoint, "float"), {}
    for site in model.sites():
        site.observer = lambda x, name=site.name: largest.update({name: x.abs()})
    model(batches[0])
    for name in ("layers.1.mixer.u", "layers.0.mixer.x", "layers.1.mixer.y"):
        index, scale = (checkpoint.site_tensors[f"{name}.{part}"] for part in ("index", "scale"))
        seen = largest[name].amax((0, 1))
        assert scale.shape == (12,) and bool((127 * scale[index].flatten() * (1 + 1e-5) >= seen).all())
        got = torch.stack([largest[name].reshape(-1, 12, 8)[:, index == n].max() for n in range(12)])
        torch.testing.assert_close(scale * 127, got, rtol=1e-4, atol=1e-6)
    assert checkpoint.site_tensors["layers.0.mixer.state.scale"].shape == (12, 16)


def test_noise_is_what_rounding_with_the_groups_scales_costs() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.1, 4.0, (6, 8))
    order = find_order(sizes, 2, 2, 3)
    values = rng.uniform(-1, 1, (4000, 48)) * sizes.reshape(-1)[order.channels.numpy()]
    groups = order.groups.numpy().reshape(-1)
    members = np.abs(values).max(0)
    largest = np.array([members[groups == group].max() for group in groups])

    def error(most: np.ndarray) -> float:
        scale = most / 127
        return float(((np.rint(values / scale) * scale - values) ** 2).mean())

    assert noise(sizes, order) == pytest.approx(error(largest) / error(members), rel=0.02)
    assert noise(sizes, find_order(sizes, 2, 3, 8)) == 1.0  # a head group a head, a scale a channel


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5, 3.0, 1e9])
def test_as_few_groups_as_a_layer_needs(factor: float) -> None:
    config = config_of("mamba2", d_inner=120, head_dim=10, n_groups=2)  # 6 heads a group
    u = torch.randn(5, 30, 120, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, 120).flip(0).exp()
    statistics = observed_u(config, u)
    sizes = u.abs().amax((0, 1)).double().numpy().reshape(12, 10)
    own = perturbed_tensors(config)
    tensors = {name.removeprefix("layers.0."): tensor for name, tensor in own.items() if name.startswith("layers.0.")}
    found = reorder_within(config, "mamba2", tensors, statistics, factor, head_groups=6, channel_groups=10)
    noises = {
        (heads, channels): noise(sizes, find_order(sizes, 2, heads, channels))
        for heads in (1, 2, 4, 6)
        for channels in (1, 2, 4, 8, 10)
    }
    fewest = min((heads * channels for (heads, channels), each in noises.items() if each <= factor), default=60)
    best = min((each, pair) for pair, each in noises.items() if pair[0] * pair[1] == fewest)[1]
    expected = reorder(config, "mamba2", tensors, statistics, *best)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mamba1_and_the_given_tensors_stay() -> None:
    config = config_of("mamba1")
    tensors = {"norm.weight": torch.ones(32)}
    assert apply(recipe_of(transforms=["reorder"]), config, "mamba1", tensors, {}) == tensors
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    reordered(config, tensors, ["reorder"])
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_what_cannot_be_is_refused() -> None:
    config = config_of("mamba2")
    with pytest.raises(SquamataError, match="before hadamard"):
        reordered(config, perturbed_tensors(config), ["hadamard", "reorder"])
    for wrong in ({"head_groups": 0}, {"statistic": "median"}, {"heads": 4}):
        with pytest.raises(SquamataError, match="transform reorder: "):
            check(recipe_of(transforms=[{"reorder": wrong}]))


@torch.no_grad()
def test_what_sorts_is_what_the_model_as_it_came_has_at_u() -> None:
    """Also where a later transform rotates the stream: its layers, as they came, cannot read that one."""
    config = config_of("mamba2")
    source, ids = MemorySource(config, perturbed_tensors(config)), random_ids(config, 4, 40)
    found = []
    for transforms in (["reorder"], ["reorder", "fold_norm", "rotate_residual", "hadamard"]):
        parts = QuantizedParts(source, recipe_of(transforms=transforms), [ids])
        found.append({name: value for part in parts.each() for name, value in part.items()})
    for layer in range(config.n_layers):
        for name in ("mixer.A_log", "mixer.D", "mixer.conv.weight"):
            assert torch.equal(found[1][f"layers.{layer}.{name}"], found[0][f"layers.{layer}.{name}"])  # type: ignore[arg-type]
