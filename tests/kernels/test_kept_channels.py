"""Channels of a product's input that are kept in more bits: against the published formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from squamata.errors import SquamataError
from squamata.kernels.landing import landing
from squamata.kernels.linear import Linear
from squamata.kernels.ops import linear
from squamata.kernels.packing import pack_kept, unpack_kept
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Mode, Site
from squamata.models.lm import LanguageModel
from squamata.quantize.rtn import round_to_nearest
from squamata.run.decode_plan import NotPlannableError, plan_model
from squamata.run.gpu_refusals import check_site
from squamata.save.read import read_checkpoint
from squamata.spec.quant import QuantSpec

ABOVE = QuantSpec.model_validate({"bits": 8, "granularity": "token", "dynamic": True, "keep": {"above": 6.0}})
TOKEN = ABOVE.model_copy(update={"keep": None})
ROWS = QuantSpec.model_validate({"bits": 8, "granularity": "channel"})

INT4 = {"bits": 4, "full_range": True, "granularity": "group(128)", "clip": 0.85, "keep": {"channels": 128}}
GROUPS = QuantSpec.model_validate(INT4)
GROUPS_OF_TOKEN = QuantSpec.model_validate(
    INT4 | {"granularity": "token,group(128)", "dynamic": True, "clip": 0.9 * 7.5 / 7}
)


def site_of(spec: QuantSpec, features: int, mode: Mode = "integer", order: torch.Tensor | None = None) -> Site:
    return Site("in", Layout(("channel",), (features,)), spec, mode=mode, order=order)


def with_outliers(seed: int = 0) -> torch.Tensor:
    """Two sequences of five tokens: channel 3 reaches 6 in one token, channel 17 in all, channel 40 not quite."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    x[1, 2, 3] = -6.0
    x[..., 17] += 60
    x[0, 0, 40] = 5.999
    return x


def int8_rows(seed: int = 1) -> QTensor:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    scale = weight.abs().amax(1, keepdim=True) / 127
    return QTensor(torch.round(weight / scale).to(torch.int8), scale, ROWS)


def as_published(x: NDArray[np.float64], weight: QTensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What bitsandbytes computes of (tokens, K), and its codes; in float64."""
    outlying = np.abs(x) >= 6.0
    kept = outlying.any(0)
    scale = np.abs(np.where(outlying, 0, x)).max(1, keepdims=True) / 127
    codes = np.rint(x / scale)
    codes[:, kept] = 0
    w_codes, w_scale = weight.data.double().numpy(), weight.scale.double().numpy()
    y = (codes @ w_codes.T) * scale * w_scale.T + x[:, kept] @ (w_codes * w_scale)[:, kept].T
    return y, codes


@pytest.mark.parametrize("mode", ["integer", "simulate"])
def test_codes_and_products_are_those_of_bitsandbytes(mode: Mode) -> None:
    x, weight = with_outliers(), int8_rows()
    value = site_of(ABOVE, 64, mode).land(x)
    assert isinstance(value, QTensor) and value.kept is not None
    y, codes = as_published(x.double().reshape(-1, 64).numpy(), weight)
    np.testing.assert_array_equal(value.codes().reshape(-1, 64).double().numpy(), codes)
    kept = value.kept.reshape(-1, 64).any(0)
    assert kept.nonzero().flatten().tolist() == [3, 17]
    (found,) = linear(value, Linear(weight), (None,))
    np.testing.assert_allclose(found.reshape(-1, 24).double().numpy(), y, rtol=2e-6, atol=2e-5)


def test_the_two_modes_agree_exactly_and_no_backend_takes_it_for_plain_integers() -> None:
    x, layer = with_outliers(), Linear(int8_rows(), torch.linspace(-1, 1, 24))
    found = []
    for mode in ("integer", "simulate"):
        for backend in ("cpu", "ref"):
            (y,) = linear(site_of(ABOVE, 64, mode).land(x), layer, (None,), backend=backend)
            found.append(y)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert landing(site_of(ABOVE, 64), 2, 5, 64, per_token=True).target.rounding < 0  # float: the site lands it itself
    with pytest.raises(SquamataError, match="that reach 6 in float"):
        check_site(site_of(ABOVE, 64))


def test_values_stay_within_half_a_step_and_kept_ones_exact() -> None:
    x = with_outliers()
    value = site_of(ABOVE, 64).land(x)
    assert isinstance(value, QTensor)
    step = torch.where(x.abs() < 6, x.abs(), 0).amax(-1, keepdim=True) / 127
    assert torch.equal(value.dequantize()[..., [3, 17]], x[..., [3, 17]])
    assert bool(((value.dequantize() - x).abs() <= step * 0.5001).all())


def test_without_outliers_it_is_a_scale_a_token() -> None:
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2)).clamp(-5.9, 5.9)
    kept, plain = site_of(ABOVE, 64).land(x), site_of(TOKEN, 64).land(x)
    assert isinstance(kept, QTensor) and isinstance(plain, QTensor) and kept.kept is not None
    assert torch.equal(kept.data, plain.data) and torch.equal(kept.scale, plain.scale) and not kept.kept.any()
    layer = Linear(int8_rows())
    assert torch.equal(linear(kept, layer, (None,), backend="ref")[0], linear(plain, layer, (None,), backend="ref")[0])


def test_all_tokens_of_a_call_decide_together() -> None:
    x = with_outliers()
    together, alone = site_of(ABOVE, 64).land(x), site_of(ABOVE, 64).land(x[:1, :1])
    assert isinstance(together, QTensor) and isinstance(alone, QTensor)
    assert together.kept is not None and alone.kept is not None
    assert bool(together.kept[0, 0, 3]) and not bool(alone.kept[0, 0, 3]) and bool(alone.kept[0, 0, 17])


def test_an_outlier_ruins_the_others_unless_it_is_kept() -> None:
    """One channel of 60 beside values of 1: the plain token's step is fifteen times as large."""
    x, weight = with_outliers(), int8_rows()
    exact = x.double() @ weight.dequantize(torch.float64).T
    errors = [
        float((linear(site_of(spec, 64).land(x), Linear(weight), (None,))[0] - exact).abs().mean())
        for spec in (TOKEN, ABOVE)
    ]
    assert errors[1] < errors[0] / 8


def test_gradients_pass_codes_and_kept_channels_alike() -> None:
    x = with_outliers().requires_grad_()
    value = site_of(ABOVE, 64, "simulate").land(x)
    assert isinstance(value, QTensor)
    value.dequantize().sum().backward()
    assert x.grad is not None and torch.equal(x.grad[..., [3, 17]], torch.ones(2, 5, 2))
    assert bool(torch.isfinite(x.grad).all()) and float(x.grad.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("recipe", ["llm-int8", "atom-w4a4"])
@torch.no_grad()
def test_such_models_have_no_compiled_token_and_are_near_float(
    kind: str, recipe: str, shipped: Callable[[str, str], Path], real_ids: torch.Tensor
) -> None:
    model = LanguageModel(read_checkpoint(shipped(kind, recipe)))
    with pytest.raises(NotPlannableError):
        plan_model(model)
    quantized = model(real_ids)
    exact = LanguageModel(read_checkpoint(shipped(kind, "float")), "float")(real_ids)
    share = 0.05 if recipe == "llm-int8" else 0.25
    assert 0 < float((quantized - exact).abs().mean()) < share * float(exact.std())


def fake(x: NDArray[np.float64], bits: int, factor: float, lowest: int) -> NDArray[np.float64]:
    """Rows rounded to scale = factor * max |x|, codes from ``lowest`` on, as Atom's ``quantize_tensor`` has it."""
    scale = factor * np.abs(x).max(-1, keepdims=True).clip(1e-8)
    return np.clip(np.rint(x / scale), lowest, 2 ** (bits - 1) - 1) * scale


def atoms(x: NDArray[np.float64], order: NDArray[np.int64], factor: float) -> NDArray[np.float64]:
    """Atom's mixed precision of the last axis in float64: permuted, groups of 128 in int4, the last 128 in int8."""
    x = x[..., order]
    rest = max(x.shape[-1] - 128, 0)
    parts = [fake(x[..., start : min(start + 128, rest)], 4, factor, -8) for start in range(0, rest, 128)]
    return np.concatenate([*parts, fake(x[..., rest:], 8, 1 / 127, -127)], -1)


def sorted_problem(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of very different channels (2, 7, K), a weight (11, K), and the order of the channels by size."""
    generator = torch.Generator().manual_seed(columns)
    size = 30 ** torch.rand(columns, generator=generator)
    x = torch.randn(2, 7, columns, generator=generator) * size
    return x, torch.randn(11, columns, generator=generator), size.argsort()


@pytest.mark.parametrize("columns", [512, 384, 300, 129, 128, 50])
@pytest.mark.parametrize("mode", ["integer", "simulate"])
def test_products_in_groups_are_atoms(columns: int, mode: Mode) -> None:
    """Also where groups are not full, and where all channels are kept."""
    x, weight, order = sorted_problem(columns)
    layout = Layout(("out", "in"), (11, columns), flat=False)
    stored = replace(round_to_nearest(weight[:, order], GROUPS, layout), order=order)
    value = site_of(GROUPS_OF_TOKEN, columns, mode, order).land(x)
    assert isinstance(value, QTensor)
    x_atom, w_atom = (
        atoms(one.double().numpy(), order.numpy(), factor) for one, factor in ((x, 0.9 / 7), (weight, 0.85 / 7.5))
    )
    back = order.argsort().numpy()
    np.testing.assert_allclose(value.dequantize().numpy(), x_atom[..., back], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored.dequantize().numpy(), w_atom[..., back], rtol=1e-5, atol=1e-6)
    for backend in ("cpu", "ref"):
        (y,) = linear(value, Linear(stored), (None,), backend=backend)
        np.testing.assert_allclose(y.numpy(), x_atom @ w_atom.T, rtol=1e-4, atol=1e-4 * np.abs(x_atom @ w_atom.T).max())
    kept = min(128, columns)
    assert stored.data.dtype == torch.uint8 and stored.data.shape[1] == -(-(columns - kept) // 2) + kept
    assert int(value.codes().abs().max()) > 100  # of those that are kept
    assert not bool((value.codes()[..., order[:-kept]].abs() > 8).any())


def test_integers_are_summed_group_by_group_exactly() -> None:
    """Against int64 sums, and the same with codes carried in float."""
    x, weight, order = sorted_problem(512)
    stored = replace(
        round_to_nearest(weight[:, order], GROUPS, Layout(("out", "in"), (11, 512), flat=False)), order=order
    )
    value, carried = (site_of(GROUPS_OF_TOKEN, 512, mode, order).land(x) for mode in ("integer", "simulate"))
    assert isinstance(value, QTensor) and isinstance(carried, QTensor) and carried.simulated
    assert torch.equal(value.codes().float(), carried.codes())
    (y,), (z,) = (linear(one, Linear(stored), (None,)) for one in (value, carried))
    assert torch.equal(y, z)
    codes, columns = value.codes_in_order().reshape(-1, 512).numpy(), stored.codes_in_order().numpy()
    total = np.zeros((14, 11), np.float32)
    for group in range(4):
        inside = slice(128 * group, 128 * group + 128)
        sums = codes[:, inside].astype(np.int64) @ columns[:, inside].astype(np.int64).T
        total += sums.astype(np.float32) * (value.scale.reshape(14, 4)[:, group, None] * stored.scale[:, group]).numpy()
    np.testing.assert_array_equal(y.reshape(14, 11).numpy(), total)


def test_groups_without_kept_channels_are_neighbours() -> None:
    x, weight, _ = sorted_problem(300)
    spec = QuantSpec.model_validate({"bits": 4, "granularity": "token,group(64)", "dynamic": True, "symmetric": False})
    rows = QuantSpec.model_validate({"bits": 4, "granularity": "group(64)"})
    stored = round_to_nearest(weight, rows, Layout(("out", "in"), (11, 300), flat=False))
    value = site_of(spec, 300).land(x)
    assert isinstance(value, QTensor) and value.scale.shape == (2, 7, 5) and value.order is None
    (y,) = linear(value, Linear(stored), (None,), backend="ref")
    expected = value.dequantize(torch.float64) @ stored.dequantize(torch.float64).T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    (found,) = linear(value, Linear(stored), (None,))
    assert torch.equal(found, y)  # no other backend takes it


@pytest.mark.parametrize("rest", [0, 1, 6, 7])
@pytest.mark.parametrize("kept", [1, 5])
def test_kept_columns_are_bytes_behind_the_nibbles(rest: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(rest)
    codes = torch.randint(-8, 8, (3, rest + kept), generator=generator).to(torch.int8)
    codes[:, rest:] = torch.randint(-127, 128, (3, kept), generator=generator).to(torch.int8)
    packed = pack_kept(codes, kept)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-rest // 2) + kept)
    assert torch.equal(unpack_kept(packed, rest + kept, kept), codes)


def test_a_site_that_does_not_know_its_order_says_so() -> None:
    with pytest.raises(SquamataError, match="add the transform 'sort_inputs'"):
        site_of(GROUPS_OF_TOKEN, 300).land(torch.ones(1, 1, 300))
    with pytest.raises(SquamataError, match="128 channels in int8"):
        check_site(site_of(GROUPS_OF_TOKEN, 300))
