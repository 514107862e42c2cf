"""Channels of a product's input that are kept in more bits: against bitsandbytes' formulas written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from squamata.errors import SquamataError
from squamata.kernels.landing import landing
from squamata.kernels.linear import Linear
from squamata.kernels.ops import linear
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Mode, Site
from squamata.models.lm import LanguageModel
from squamata.run.decode_plan import NotPlannableError, plan_model
from squamata.run.gpu_plan import check_site
from squamata.save.read import read_checkpoint
from squamata.spec.quant import QuantSpec

ABOVE = QuantSpec.model_validate({"bits": 8, "granularity": "token", "dynamic": True, "keep": {"above": 6.0}})
TOKEN = ABOVE.model_copy(update={"keep": None})
ROWS = QuantSpec.model_validate({"bits": 8, "granularity": "channel"})


def site_of(spec: QuantSpec, features: int, mode: Mode = "integer") -> Site:
    return Site("in", Layout(("channel",), (features,)), spec, mode=mode)


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
@torch.no_grad()
def test_llm_int8_has_no_compiled_token_and_is_near_float(
    kind: str, shipped: Callable[[str, str], Path], real_ids: torch.Tensor
) -> None:
    model = LanguageModel(read_checkpoint(shipped(kind, "llm-int8")))
    with pytest.raises(NotPlannableError):
        plan_model(model)
    quantized = model(real_ids)
    exact = LanguageModel(read_checkpoint(shipped(kind, "float")), "float")(real_ids)
    assert 0 < float((quantized - exact).abs().mean()) < 0.05 * float(exact.std())
