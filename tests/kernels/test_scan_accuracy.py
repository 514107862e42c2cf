"""Long chunks with fast heads: decays are small differences of large sums, which float32 alone would spoil."""

from __future__ import annotations

import pytest
import torch

from squamata.kernels.ssd_scan import HeadLayout, ssd_scan


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_error_does_not_grow_with_the_sum_of_decays(backend: str) -> None:
    """Against float64: sums of dt A reach hundreds in a chunk of 256, the error stays that of one product."""
    H, P, N, L = 4, 8, 16, 512
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layout = HeadLayout(H, P, 1, N, 256, (0.0, float("inf")))
    A = -torch.tensor([0.5, 2.0, 8.0, 30.0])
    inputs = (draw(1, L, H * P), draw(1, L, H) - 1, A, draw(1, L, N), draw(1, L, N), draw(H), draw(H) - 2)
    arguments = (*inputs, draw(1, H, P, N))
    y, state = ssd_scan(*arguments, layout, backend=backend)
    exact_y, exact_state = ssd_scan(*(tensor.double() for tensor in arguments), layout, backend="ref")
    largest = exact_state.abs().amax(-1, keepdim=True)
    assert float(((state - exact_state).abs() / largest).max()) < 5e-7  # with float32 sums alone 1.5e-6 and more
    assert float((y - exact_y).abs().max() / exact_y.abs().max()) < 1e-6  # 2.7e-6 and more
