"""Squared gradients of the loss, gathered a layer at a time: those of the whole graph, and of finite differences."""

from __future__ import annotations

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors
from torch.nn.functional import cross_entropy

from squamata.calibrate.gradients import squared_gradients
from squamata.calibrate.whole import streams
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend

KINDS = ["mamba1", "mamba2"]


def sequences_of(lengths: tuple[int, ...], vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_mean_of_the_squares_of_the_whole_graphs(kind: str) -> None:
    config = config_of(kind)
    tensors, sequences = perturbed_tensors(config), sequences_of((12, 7, 20), config.vocab_size)
    names = [name for name in tensors if name.endswith("_proj.weight")]
    steps: list[tuple[int, int]] = []
    found = squared_gradients(config, tensors, sequences, names, lambda *step: steps.append(step))
    assert found.keys() == set(names) and steps == [(1, 3), (2, 3), (3, 3)]
    assert not any(tensor.requires_grad for tensor in tensors.values())

    expected = {name: torch.zeros_like(tensors[name]) for name in names}
    for ids in sequences:
        leaves = {name: tensors[name].clone().requires_grad_() for name in names}
        model = float_model(config, tensors | leaves)
        with use_backend("ref"):
            logits = model.logits(streams(model, ids[None])[-1], None)
            cross_entropy(logits[0, :-1], ids[1:]).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            expected[name] += leaf.grad.square() / 3
    for name in names:
        assert float(expected[name].max()) > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max()))


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_sequence_they_are_finite_differences_squared(kind: str) -> None:
    config = config_of(kind)
    tensors, (ids,) = perturbed_tensors(config, dtype=torch.bfloat16), sequences_of((15,), config.vocab_size)
    name, step = "layers.0.mixer.out_proj.weight", 1e-4
    found = squared_gradients(config, tensors, [ids], [name])[name]
    assert found.dtype == torch.float32
    for place in found.flatten().topk(3).indices.tolist():
        losses = []
        for sign in (1, -1):
            moved = {other: tensor.double() for other, tensor in tensors.items()}
            moved[name].view(-1)[place] += sign * step
            with torch.no_grad(), use_backend("ref"):
                logits = float_model(config, moved, torch.float64)(ids[None])
            losses.append(float(cross_entropy(logits[0, :-1], ids[1:])))
        assert ((losses[0] - losses[1]) / (2 * step)) ** 2 == pytest.approx(float(found.view(-1)[place]), rel=1e-2)


def test_gradients_that_are_not_finite_are_refused() -> None:
    """k-means would take elements of weight NaN for those that the sparse part has."""
    config = config_of("mamba2")
    tensors, sequences = perturbed_tensors(config), sequences_of((12,), config.vocab_size)
    tensors["layers.0.mixer.in_proj.weight"][:] = 3e38
    with pytest.raises(SquamataError, match=r"^layers\.1\.mixer\.out_proj\.weight: gradients .* not finite"):
        squared_gradients(config, tensors, sequences, ["layers.1.mixer.out_proj.weight"])
