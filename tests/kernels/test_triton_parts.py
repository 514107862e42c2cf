"""FalconMamba's norms of dt_low, B and C in the GPU's kernels, in Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
pytest.importorskip("triton", reason="the GPU kernels need triton")

from test_triton_decode import DEVICE, recipe
from tiny import config_of, perturbed_tensors, quantized, random_ids

from squamata.kernels.dispatch import use_backend
from squamata.kernels.gpu.gemm import permuted
from squamata.kernels.gpu.gemv import Landing
from squamata.kernels.gpu.parts import PartNorms, norm_parts, norm_parts_apart
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder

SIZES = (64, 16, 16)


def norms(quantized: bool) -> PartNorms:
    """A scale of its own for every row, and codes for all of them or none."""
    scale = 0.01 + 0.02 * torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    inverse, bound = (1 / scale if quantized else 0 * scale), torch.full_like(scale, 127.0)
    landing = Landing(inverse, -bound, bound, any_codes=quantized, any_values=not quantized, scale=scale)
    return PartNorms(1e-5, SIZES, landing)


def expected(x: torch.Tensor, norms: PartNorms) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and values as landed, by the definition, in float64."""
    parts = [part * (part.square().mean(-1, keepdim=True) + norms.epsilon).rsqrt()
             for part in x.double().split(SIZES, dim=1)]  # fmt: skip
    values = torch.cat(parts, 1)
    if not norms.landing.any_codes:
        return values, values
    assert norms.landing.scale is not None
    scale = norms.landing.scale.cpu().double()
    codes = (values / scale).round().clamp(-127, 127)
    return codes, codes * scale


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("format", [0, 2, 3, 5])
def test_every_part_is_divided_by_its_own_length(coded: bool, format: int) -> None:
    x = torch.randn(5, sum(SIZES), generator=torch.Generator().manual_seed(2))
    x *= torch.tensor([1, 10, 0.1, 3, 1])[:, None]
    planned = norms(coded)
    codes, values = expected(x, planned)
    kind = torch.int8 if coded else torch.float32
    out = torch.full(x.shape, 99, dtype=kind, device=DEVICE)
    norm_parts(x.to(DEVICE), planned, out if coded else None, None if coded else out)
    torch.testing.assert_close(out.cpu().double(), codes, rtol=1e-5, atol=1e-5)
    low = torch.full((5, SIZES[0]), 99, dtype=kind, device=DEVICE)
    rest = torch.full((5, sum(SIZES[1:])), float("nan"), device=DEVICE)
    norm_parts_apart(x.to(DEVICE), planned, low, rest, format)
    order = permuted.fn(torch.arange(SIZES[0]), format)
    torch.testing.assert_close(low.cpu().double()[:, order], codes[:, : SIZES[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.cpu().double(), values[:, SIZES[0] :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["float", "w8a8", "w4a8"] if DEVICE == "cuda" else ["w8a8"])
def test_a_falcon_agrees_with_the_reference(case: str) -> None:
    config = config_of("mamba1", d_model=64, d_inner=128, dt_rank=16, bcdt_norm_epsilon=1e-5)
    checkpoint = quantized(config, perturbed_tensors(config), recipe(case), [random_ids(config, 2, 24)])
    model = LanguageModel(checkpoint)
    ids = random_ids(config, 2, 12, seed=1)
    with use_backend("ref"), torch.no_grad():
        cache = model.new_cache(2)
        decoder = CapturedDecoder(model, 2, DEVICE, weights="float32", pdl=False)
        wanted = model.forward(ids[:, :9], cache, last_only=True)[:, -1]
        found = [(decoder.prefill(ids[:, :9].to(DEVICE)).cpu().clone(), wanted)]
        for token in range(9, 12):
            found.append((decoder.step(ids[:, token].to(DEVICE)).cpu().clone(), model.step(ids[:, token], cache)))
    for got, wanted in found:
        assert float((got - wanted).norm() / wanted.norm()) < (1e-5 if case == "float" else 3e-2)
