"""The reference ops: integers are exact, rounding and scales are what the spec says, simulation is the integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from judged import ON_THEIR_KINDS
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.kernels import dispatch
from squamata.kernels.causal_conv1d import empty_state, factored
from squamata.kernels.codec import CODECS, Codec
from squamata.kernels.dispatch import sibling, use_backend
from squamata.kernels.grid import seeded
from squamata.kernels.linear import Linear
from squamata.kernels.ops import linear, norm_linear
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, as_float
from squamata.kernels.site import Site, observed, observing
from squamata.load.tokenizer import Tokenizer
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.save.read import read_checkpoint
from squamata.spec.quant import QuantSpec
from squamata.text import read_documents


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with use_backend("ref"):
        yield


def codes(*shape: int, seed: int = 0, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """x W^T in int64, then one rounding to float32."""
    return (x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 7, 1024, 1025, 4096, 70000])
@pytest.mark.parametrize("extreme", [False, True])
def test_int8_products_are_exact_at_any_depth(columns: int, extreme: bool) -> None:
    """All codes 127: the sum passes 2^24 from K = 1041 on, where float32 sums go wrong."""
    x, weight = codes(3, columns), codes(5, columns, seed=1)
    if extreme:
        x, weight = torch.full_like(x, 127), torch.full_like(weight, 127)
        weight[:, ::1001] = 1
    scale_x, scale_w = torch.tensor(0.013), torch.rand(5, 1) + 0.1
    layer = Linear(QTensor(weight, scale_w, QuantSpec(bits=8, granularity="channel")))
    (y,) = linear(QTensor(x, scale_x, QuantSpec(bits=8)), layer, (None,))
    expected = exact_product(x, weight) * (np.float32(0.013) * scale_w.numpy().reshape(-1))
    assert y.dtype == torch.float32 and np.array_equal(y.numpy(), expected)


def test_products_of_asymmetric_codes_take_the_zero_point_off_first() -> None:
    x, weight = codes(4, 600, low=-128), codes(6, 600, seed=2)
    spec = QuantSpec(bits=8, symmetric=False)
    zero = torch.tensor(-128.0)
    layer = Linear(QTensor(weight, torch.tensor(0.5), QuantSpec(bits=8)), bias=torch.arange(6.0))
    (y,) = linear(QTensor(x, torch.tensor(0.25), spec, zero), layer, (None,))
    expected = exact_product(x.int() + 128, weight) * np.float32(0.125) + np.arange(6, dtype=np.float32)
    assert np.array_equal(y.numpy(), expected)


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (130, 64), (7, 3), (5, 128)])
def test_grouped_int4_adds_the_groups_in_order(columns: int, group: int) -> None:
    x, weight = codes(3, columns), codes(4, columns, seed=5, low=-8, high=7)
    scale = torch.rand(4, -(-columns // group)) + 0.05
    spec = QuantSpec(bits=4, granularity=f"group({group})", full_range=True)
    packed = QTensor(pack_int4(weight), scale, spec, None, columns)
    (y,) = linear(QTensor(x, torch.tensor(0.02), QuantSpec(bits=8)), Linear(packed), (None,))
    expected = np.zeros((3, 4), np.float32)
    for number, start in enumerate(range(0, columns, group)):
        cut = slice(start, start + group)
        expected += exact_product(x[:, cut], weight[:, cut]) * scale[:, number].numpy()
    assert np.array_equal(y.numpy(), expected * np.float32(0.02))
    (weight_only,) = linear(torch.eye(columns), Linear(packed), (None,))
    dequantized = weight.double() * scale.double().repeat_interleave(group, 1)[:, :columns]
    torch.testing.assert_close(weight_only.double(), dequantized.T, rtol=1e-6, atol=0)


def test_segments_go_to_their_own_sites() -> None:
    weight = torch.randn(7, 4)
    sites = [Site(name, Layout(("channel",), (size,)), None) for name, size in (("a", 2), ("b", 4), ("c", 1))]
    sites[1] = Site("b", sites[1].layout, QuantSpec(bits=8), torch.tensor(0.1), mode="integer")
    x = torch.randn(2, 3, 4)
    a, b, c = linear(x, Linear(weight, torch.ones(7), (2, 4, 1)), sites)
    y = x @ weight.T + 1
    torch.testing.assert_close(a, y[..., :2])
    torch.testing.assert_close(c, y[..., 6:])
    assert isinstance(b, QTensor) and (as_float(b) - y[..., 2:6].clamp(-12.7, 12.7)).abs().max() <= 0.05001


def landing(
    spec: QuantSpec, size: int, mode: Any = "integer", scale: float | torch.Tensor = 1.0, zero: Any = None
) -> Site:
    return Site("s", Layout(("channel",), (size,)), spec, torch.as_tensor(scale), zero, mode=mode)


TIES = [-200.0, -127.5, -126.5, -2.5, -1.5, -0.5, -0.49, 0.0, 0.49, 0.5, 1.5, 2.5, 2.51, 126.5, 127.5, 200.0]
ROUNDED = {
    "half-even": [-127, -127, -126, -2, -2, 0, 0, 0, 0, 0, 2, 2, 3, 126, 127, 127],
    "half-away": [-127, -127, -127, -3, -2, -1, 0, 0, 0, 1, 2, 3, 3, 127, 127, 127],
    "truncate": [-127, -127, -126, -2, -1, 0, 0, 0, 0, 0, 1, 2, 2, 126, 127, 127],
}


@pytest.mark.parametrize("rounding", list(ROUNDED))
@pytest.mark.parametrize("mode", ["simulate", "integer"])
def test_rounding_at_ties(rounding: str, mode: str) -> None:
    spec = QuantSpec(bits=8, rounding=rounding)
    landed = landing(spec, len(TIES), mode, 0.5).land(torch.tensor(TIES) * 0.5)
    assert landed.data.to(torch.int64).tolist() == ROUNDED[rounding]
    assert landed.data.dtype == (torch.int8 if mode == "integer" else torch.float32)
    assert landed.dequantize().tolist() == [code * 0.5 for code in ROUNDED[rounding]]


@pytest.mark.parametrize("mode", ["float", "observe", "simulate", "integer"])
def test_an_observer_sees_what_lands_in_every_mode(mode: str) -> None:
    site, x = landing(QuantSpec(bits=8), 3, mode, 0.5), torch.tensor([0.2, 1.3, 99.0])
    before: list[torch.Tensor] = []
    site.observer = before.append
    expected = as_float(site.land(x))
    seen: list[tuple[Site, torch.Tensor]] = []
    with observing([site], lambda *what: seen.append(what)):
        assert torch.equal(as_float(site.land(x)), expected)
    assert len(before) == 1 and before[0] is x
    assert len(seen) == 1 and seen[0][0] is site and seen[0][1] is x
    assert site.observer == before.append


def test_what_a_site_means_has_a_revision() -> None:
    site = landing(QuantSpec(bits=8), 3, scale=0.5)
    assert site.static and float(site.expanded()[0]) == 0.5
    changes: list[Callable[[], None]] = [
        lambda: setattr(site, "scale", torch.tensor(2.0)),
        lambda: site.set_scale(torch.tensor(4.0)),
        lambda: setattr(site, "spec", QuantSpec(bits=4)),
        lambda: setattr(site, "observer", print),
        lambda: setattr(site, "mode", "simulate"),
        lambda: setattr(site, "index", torch.zeros(3)),
    ]
    for change in changes:
        before = site.revision.number
        change()
        assert site.revision.number > before
    last = site.revision.number
    site.mode = "simulate"  # as it was
    assert site.revision.number == last
    site.mode, site.index = "integer", None
    assert not site.static  # observed
    site.observer = None
    assert site.static and float(site.expanded()[0]) == 4.0


def test_a_fused_op_leaves_observed_sites_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(package: str, backend: str) -> Any:
        if backend == "cpu" and package.endswith(".norm_linear"):
            return SimpleNamespace(accepts=lambda *_: True, run=lambda *_: "fused")
        return sibling(package, "ref") if backend == "ref" else None

    monkeypatch.setattr(dispatch, "sibling", fused)
    sites = [landing(QuantSpec(bits=8), 3, scale=0.1) for _ in range(2)]
    arguments = (torch.randn(1, 2, 3), None, torch.ones(3), 1e-5, Linear(torch.eye(3)))
    with use_backend(None):
        assert norm_linear(*arguments, sites[0], [sites[1]]) == "fused"
        for site in sites:
            seen: list[torch.Tensor] = []
            with observing([site], lambda _, x, seen=seen: seen.append(x)):
                (landed,), _ = norm_linear(*arguments, sites[0], [sites[1]])
            assert isinstance(landed, QTensor) and len(seen) == 1
    assert observed({"a": sites[0]}) is False
    sites[0].observer = print
    assert observed({"a": sites[0]}) and observed([None, (sites[0],)]) and not observed(torch.ones(1))


def test_a_backend_without_its_library_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda name: name == "ref")
    x, layer = torch.ones(1, 3), Linear(torch.eye(3))
    for name, library in (("triton", "triton"), ("cpu", "numba")):
        with pytest.raises(SquamataError, match=f"'{name}' needs the library '{library}'"), use_backend(name):
            pass
        with pytest.raises(SquamataError, match=library):
            linear(x, layer, (None,), backend=name)
    with pytest.raises(SquamataError, match="did you mean 'ref'"):
        linear(x, layer, (None,), backend="reff")
    assert torch.equal(linear(x, layer, (None,), backend="ref")[0], x)


def test_a_backend_without_the_op_leaves_it_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "installed", lambda name: True)
    site = Site("s", Layout(("channel",), (3,)))
    with use_backend("triton"):
        (y,), _ = norm_linear(torch.full((1, 1, 3), 2.0), None, torch.ones(3), 0.0, Linear(torch.eye(3)), site, (None,))
    assert torch.equal(y, torch.ones(1, 1, 3))


def test_codes_of_a_grid_that_is_not_linear_are_decoded_before_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    squares = Codec(
        lambda x, *_: x,
        lambda c, scale, _, spec, dtype: (c.to(dtype) ** 2 * c.sign()) * scale.to(dtype),
        lambda x, *_: torch.zeros_like(x, dtype=torch.bool),
    )
    monkeypatch.setitem(CODECS, "squares", squares)
    spec = QuantSpec.model_construct(**{**dict(QuantSpec(bits=8)), "codec": "squares"})
    x = QTensor(torch.tensor([[2, -3]], dtype=torch.int8), torch.tensor(0.5), spec)
    weight = QTensor(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor(1.0), QuantSpec(bits=8))
    for backend in ("ref", "cpu"):
        (y,) = linear(x, Linear(weight), (None,), backend=backend)
        assert as_float(y).tolist() == [[-7.0]]  # 0.5 * (4 * 1 - 9 * 2)
    site = Site("x", Layout(("channel",), (2,)), spec, torch.tensor(0.5), mode="integer")
    assert not site.static and isinstance(empty_state(1, 4, [site], torch.float32), torch.Tensor)
    taps, scale = factored(
        QTensor(torch.tensor([[2, -3]], dtype=torch.int8), torch.tensor([[0.5]]), spec),
        QTensor(torch.zeros(1, 1, 1), torch.tensor([[3.0]]), QuantSpec(bits=8)),
    )
    assert taps.tolist() == [[2.0, -4.5]] and scale.tolist() == [[3.0]]


def test_code_ranges() -> None:
    wide = torch.tensor([-1000.0, 1000.0])
    ranges = {
        (8, True, False): [-127, 127],
        (8, True, True): [-128, 127],
        (4, True, False): [-7, 7],
        (4, True, True): [-8, 7],
        (2, True, False): [-1, 1],
    }
    for (bits, symmetric, full_range), ends in ranges.items():
        spec = QuantSpec(bits=bits, symmetric=symmetric, full_range=full_range)
        assert landing(spec, 2).land(wide).data.tolist() == ends
    asymmetric = landing(QuantSpec(bits=8, symmetric=False), 2, zero=torch.tensor(-20.0))
    assert asymmetric.land(wide).data.tolist() == [-128, 127]


def test_simulation_has_a_straight_through_gradient() -> None:
    x = torch.tensor([-3.0, -1.27, -0.633, 0.0, 0.4, 1.26, 1.5], requires_grad=True)
    simulated = landing(QuantSpec(bits=8), 7, "simulate", 0.01).land(x)
    weights = torch.arange(1.0, 8.0)
    (simulated.dequantize() * weights).sum().backward()
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(x.grad, weights * inside, rtol=1e-5, atol=0)
    with torch.no_grad():
        assert torch.equal(simulated.data, landing(QuantSpec(bits=8), 7, "integer", 0.01).land(x).data.float())


def test_a_gradient_reaches_the_embedding_through_a_simulated_model() -> None:
    config = config_of("mamba2")
    rules = {"site": "*.mixer.*", "spec": {"bits": 8}}
    checkpoint = quantized(config, perturbed_tensors(config), recipe_of(rules), [random_ids(config, 2, 20)])
    checkpoint.tensors["embedding.weight"].requires_grad_()
    LanguageModel(checkpoint, "simulate")(random_ids(config, 1, 6)).logsumexp(-1).sum().backward()
    gradient = checkpoint.tensors["embedding.weight"].grad
    assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_scales_of_every_token_and_of_the_tensor(symmetric: bool) -> None:
    x = torch.randn(2, 5, 6) * torch.logspace(-2, 2, 5)[:, None]
    low, high = x.amin(-1, True), x.amax(-1, True)
    for granularity in ("token", "tensor"):
        if granularity == "tensor":
            low, high = x.amin(), x.amax()
        spec = QuantSpec(bits=8, symmetric=symmetric, granularity=granularity, dynamic=True)
        landed = Site("s", Layout(("channel",), (6,)), spec, mode="integer").land(x)
        expected = (
            torch.maximum(low.abs(), high.abs()) / 127 if symmetric else (high.clamp_min(0) - low.clamp_max(0)) / 255
        )
        torch.testing.assert_close(landed.scale.expand_as(x), expected.expand_as(x), rtol=1e-6, atol=0)
        assert ((landed.dequantize() - x).abs() <= 0.5001 * landed.scale).all()
    assert landed.data.dtype == torch.int8


def test_dynamic_scale_of_a_channel() -> None:
    x = torch.randn(2, 5, 6) * torch.logspace(-2, 2, 6)
    spec = QuantSpec(bits=8, granularity="channel", dynamic=True)
    landed = Site("s", Layout(("channel",), (6,)), spec, mode="integer").land(x)
    torch.testing.assert_close(landed.scale.expand_as(x), (x.abs().amax((0, 1)) / 127).expand_as(x), rtol=1e-6, atol=0)


def test_asymmetric_static_site() -> None:
    x = torch.rand(1, 4, 3) * 3 - 0.5
    site = landing(QuantSpec(bits=8, symmetric=False), 3, scale=3 / 255, zero=torch.tensor(-85.0))
    landed = site.land(x)
    assert landed.data.dtype == torch.int8
    assert (landed.dequantize() - x).abs().max() <= 0.5001 * 3 / 255


def real_text(folder: Path, tokens: int) -> torch.Tensor:
    document = read_documents(folder / "excerpt.jsonl")[0]
    return torch.tensor([Tokenizer.read(folder).encode(document[:2000])[:tokens]])


def run_and_record(
    checkpoint: Checkpoint, mode: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """Logits of prefill and steps, and the integers of everything that landed."""
    model = LanguageModel(checkpoint, mode)
    landed: dict[str, list[torch.Tensor]] = {}

    def recording(site: Site, land: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def record(x: torch.Tensor) -> Any:
            value = land(x)
            if isinstance(value, QTensor):
                landed.setdefault(site.name, []).append(value.codes().to(torch.int32))
            return value

        return record

    for site in model.sites():
        site.land = recording(site, site.land)  # type: ignore[method-assign]
    cache = model.new_cache()
    with seeded(0):  # of a state that is rounded stochastically
        prefill = model.forward(ids[:, :-3], cache)
        logits = torch.cat([prefill, *(model.step(ids[:, t], cache)[:, None] for t in (-3, -2, -1))], 1)
    return logits, landed


@pytest.mark.parametrize(("kind", "recipe"), ON_THEIR_KINDS)
@torch.no_grad()
def test_simulation_and_integers_are_the_same(
    kind: str, recipe: str, shipped: Callable[[str, str], Path], bundled_folder: Path
) -> None:
    """Identical integers on every site and identical logits, on real text, prefill and decode."""
    checkpoint = read_checkpoint(shipped(kind, recipe))
    ids = real_text(bundled_folder, 40)
    simulated, simulated_codes = run_and_record(checkpoint, "simulate", ids)
    integer, integer_codes = run_and_record(checkpoint, "integer", ids)
    specified = {name for name in checkpoint.recipe.resolve(checkpoint.config.blocks) if "weight" not in name}
    sites = {site.name for site in LanguageModel(checkpoint).sites()} & specified
    assert set(integer_codes) == set(simulated_codes) == sites
    for name, values in integer_codes.items():
        assert all(torch.equal(a, b) for a, b in zip(values, simulated_codes[name], strict=True)), name
    assert torch.equal(simulated, integer)
    plain = LanguageModel(checkpoint, "float")(ids)
    assert (not sites) == torch.equal(plain, LanguageModel(checkpoint)(ids))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_integer_caches_hold_int8(kind: str, shipped: Callable[[str, str], Path]) -> None:
    checkpoint = read_checkpoint(shipped(kind, "quamba-w8a8"))
    config = checkpoint.config
    channels = config.d_inner + (2 * config.n_groups * config.d_state if kind == "mamba2" else 0)
    for layer in LanguageModel(checkpoint).new_cache(batch=3):
        for value, elements in (
            (layer.conv, channels * (config.d_conv - 1)),
            (layer.state, config.d_inner * config.d_state),
        ):
            assert isinstance(value, QTensor) and value.data.dtype == torch.int8
            assert value.data.nbytes == 3 * elements
            assert bool((value.dequantize() == 0).all())
    for layer in LanguageModel(checkpoint, "float").new_cache():
        assert layer.state.dtype == layer.conv.dtype == torch.float32


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param([{"site": "*.mixer.*", "spec": {"bits": 8, "symmetric": False}}], id="asymmetric"),
        pytest.param([{"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "state"}}], id="state-index"),
        pytest.param([{"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "group(4)"}}], id="state-groups"),
        pytest.param([{"site": "*.mixer.state", "spec": {"bits": 8, "dynamic": True}}], id="dynamic-state"),
        pytest.param(
            [
                {"site": "*.mixer.*", "spec": {"bits": 8}},
                {"site": "*.conv.weight", "spec": {"bits": 4, "granularity": "channel,tap"}},
            ],
            id="conv-tap",
        ),
        pytest.param(
            [
                {"site": "*.mixer.in", "spec": {"bits": 8, "granularity": "token", "dynamic": True}},
                {"site": "*.in_proj.weight", "spec": {"bits": 4, "granularity": "group(8)"}},
            ],
            id="w4a8-token",
        ),
        pytest.param(
            [{"site": "*_proj.weight", "spec": {"bits": 4, "granularity": "group(7)", "symmetric": False}}],
            id="asymmetric-groups",
        ),
        *[
            pytest.param(
                [
                    {"site": "*.mixer.*", "spec": {"bits": 8}, "kind": "activation"},
                    {"site": "*.mixer.u", "spec": {"scale": {"percentile": {"alpha": 0.97}}} | spec},
                    {"site": "*.mixer.u_proj", "spec": {"bits": 8}, "architectures": ["mamba1"]},
                    *({"site": f"*.mixer.{site}", "spec": spec} for site in others),
                ],
                id="-".join(map(str, spec.values())),
            )
            for spec, others in (
                ({"bits": 5, "codec": "dual-scale"}, ("z",)),
                ({"bits": 9, "codec": "dual-scale", "granularity": "channel"}, ("state",)),
                ({"bits": 9, "codec": "dynamic-outlier"}, ("z", "x")),
                ({"bits": 8, "codec": "soft-edge"}, ("conv.weight", "dt", "state")),
                ({"bits": 9, "codec": "half-scale"}, ("z", "state")),
                ({"bits": 9, "codec": "quarter-scale"}, ("x", "dt")),
                ({"bits": 7, "codec": "quarter-log2"}, ("conv.bias", "y")),
                ({"bits": 8, "codec": "outlier-piecewise", "granularity": "channel"}, ("D", "x", "state")),
                ({"bits": 6, "codec": "log2"}, ("z",)),
                ({"bits": 12}, ("state", "z", "x")),
                ({"bits": 16, "symmetric": False}, ("dt", "state")),
            )
        ],
    ],
)
@torch.no_grad()
def test_legal_recipes_that_are_not_shipped_run_and_agree(kind: str, rules: list[dict]) -> None:
    """Simulation equals integers in prefill and steps, and both are near float."""
    config = config_of(kind)
    ids = random_ids(config, 1, 24)
    recipe = recipe_of(*rules)
    checkpoint = quantized(config, perturbed_tensors(config), recipe, [ids])
    integer, integer_codes = run_and_record(checkpoint, "integer", ids)
    simulated, simulated_codes = run_and_record(checkpoint, "simulate", ids)
    assert torch.equal(integer, simulated)
    for name, values in integer_codes.items():
        assert all(torch.equal(a, b) for a, b in zip(values, simulated_codes[name], strict=True)), name
    plain = float_model(config, perturbed_tensors(config))(ids)
    error = float((integer - plain).norm() / plain.norm())
    assert 0 < error < 0.25, error
