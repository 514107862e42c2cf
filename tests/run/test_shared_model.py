"""A model in the hands of a program: threads, copies, other processes, caches that are put back, inference mode."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import config_of, perturbed_tensors, quantized, random_ids
from torch import Tensor

from squamata.errors import SquamataError
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.run.device import DeviceModel
from squamata.run.model import Model
from squamata.spec.recipe import Recipe

KINDS = ("mamba1", "mamba2")


def make_model(kind: str, recipe: str = "quamba-w8a8", **overrides: object) -> Model:
    config = config_of(kind, **overrides)
    if recipe == "float":
        return Model(Checkpoint(config, perturbed_tensors(config), Recipe.read(recipe)), "float")
    batches = [random_ids(config, 2, 24, seed) for seed in range(2)]
    return Model(quantized(config, perturbed_tensors(config), Recipe.read(recipe), batches))


def steps(model: Model, cache: list, tokens: tuple[int, ...]) -> Tensor:
    return torch.cat([model.step(torch.tensor([token]), cache) for token in tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_model_do_not_meet(kind: str) -> None:
    model = make_model(kind, vocab_size=509)
    prompts = [[start, start + 7, start + 1] for start in range(4)]
    expected = [model.generate(prompt, max_new_tokens=60).ids for prompt in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda prompt: model.generate(prompt, max_new_tokens=60).ids, prompts)
            assert list(found) == expected
    finally:
        sys.setswitchinterval(before)


def test_a_thread_of_the_program_uses_as_many_threads_as_torch() -> None:
    model = make_model("mamba2", "float")

    def look() -> tuple[int, int, int]:
        torch.set_num_threads(1)
        model.step(torch.tensor([1]), model.new_cache())
        stepped = numba.get_num_threads()
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        model(torch.tensor([[1, 2]]))
        return stepped, numba.get_num_threads(), torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == (1, 1, 1)


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_threads_are_safe_on_whatever_threads_numba_has(layer: str) -> None:
    """``workqueue``, all there is without a library of OpenMP, ends a process in which two threads run kernels."""
    program = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
sys.path.append({str(Path(__file__).parents[1] / "load")!r})
from concurrent.futures import ThreadPoolExecutor
import torch, numba
from test_shared_model import make_model, random_ids
model = make_model("mamba2")
ids = random_ids(model.config, 2, 100)
expected = model(ids)
with ThreadPoolExecutor(4) as pool:
    assert all(torch.equal(found, expected) for found in pool.map(model, [ids] * 40))
assert numba.threading_layer() == {layer!r}
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"no {layer} here")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_what_to_do() -> None:
    model = make_model("mamba2")
    expected = model(torch.tensor([[1, 2]]))
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            found = repr(torch.equal(model(torch.tensor([[1, 2]])), expected))
        except SquamataError as error:
            found = str(error)
        os.write(writing, found.encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(reading, 1000).decode()
    assert "get_context('spawn')" in said if numba.threading_layer() == "omp" else said == "True"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_share_no_buffers(kind: str) -> None:
    """A plan is full of addresses: in a copy they would be those of the original, which may be gone."""
    model = make_model(kind)
    expected = steps(model, model.new_cache(), (1, 2, 3))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model._decoder is not None and twin._decoder is None
        assert torch.equal(steps(twin, twin.new_cache(), (1, 2, 3)), expected)
        assert twin._decoder is not None and twin._decoder.plan is not model._decoder.plan
        twin.blocks[0].sites["out"].mode = "float"  # a change is the copy's own
        assert not torch.equal(steps(twin, twin.new_cache(), (1, 2, 3)), expected)
        assert torch.equal(steps(model, model.new_cache(), (1, 2, 3)), expected)


def test_a_model_that_was_used_goes_to_another_process(tmp_path: Path) -> None:
    model = make_model("mamba2")
    expected = steps(model, model.new_cache(), (1, 2, 3))
    torch.save(expected, tmp_path / "expected")
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    program = f"""
import pathlib, pickle, torch
folder = pathlib.Path({str(tmp_path)!r})
model = pickle.loads((folder / "model").read_bytes())
cache = model.new_cache()
found = torch.cat([model.step(torch.tensor([token]), cache) for token in (1, 2, 3)])
assert torch.equal(found, torch.load(folder / "expected"))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_twin_on_a_gpu_stays_with_its_model() -> None:
    model = make_model("mamba2", "float")
    model.device_twin = DeviceModel.__new__(DeviceModel)  # type: ignore[attr-defined]
    assert copy.deepcopy(model).device_twin is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", ["float", "quamba-w8a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_put_back_is_gone_on_from(kind: str, recipe: str) -> None:
    """Whatever of a cache is replaced: the list, its layers, or their tensors."""
    model = make_model(kind, recipe)
    cache = model.new_cache()
    steps(model, cache, (1, 2, 3))
    saved = copy.deepcopy(cache)
    expected = steps(model, cache, (4, 5))
    assert not torch.equal(steps(model, cache, (4, 5)), expected)
    again = copy.deepcopy(saved)
    assert torch.equal(steps(model, again, (4, 5)), expected)
    again[:] = copy.deepcopy(saved)
    assert torch.equal(steps(model, again, (4, 5)), expected)
    for layer, before in zip(again, copy.deepcopy(saved), strict=True):
        layer.conv, layer.state = before.conv, before.state  # type: ignore[attr-defined]
    assert torch.equal(steps(model, again, (4, 5)), expected)


@pytest.mark.parametrize("recipe", ["float", "quamba-w8a8"])
def test_inference_mode_leaves_nothing_behind(recipe: str) -> None:
    model = make_model("mamba2", recipe)
    model.set_mode("simulate")
    ids = random_ids(model.config, 2, 6)
    with torch.inference_mode():
        cache = model.new_cache(2)
        inside = model.forward(ids, cache), model.forward(ids, cache)
    assert torch.equal(model(ids), inside[0])
    cache = model.new_cache(2)
    model.forward(ids, cache)
    assert torch.equal(model.forward(ids, cache), inside[1])
    with torch.inference_mode():
        cache = model.new_cache(2)
    model.forward(ids, cache)  # a cache that was made there is written to here
    _gradient(model, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_batch_are_those_of_its_rows(kind: str) -> None:
    """The cache is written to while the graph is still needed."""
    model = make_model(kind, "float", d_state=20)
    for length in (1, 3, 40):
        ids = random_ids(model.config, 2, length)
        rows = sum(_gradient(model, row[None]) for row in ids)
        torch.testing.assert_close(2 * _gradient(model, ids), rows, rtol=1e-4, atol=1e-4)


def _gradient(model: Model, ids: Tensor) -> Tensor:
    weight = model.blocks[0].norm.requires_grad_(True)
    model(ids).square().mean().backward()
    found, weight.grad = weight.grad, None
    weight.requires_grad_(False)
    assert found is not None and float(found.abs().sum()) > 0
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_states_that_are_rounded_at_random(kind: str) -> None:
    model = make_model(kind, "quamba-w8a8-stochastic-state", vocab_size=509)
    options = {"max_new_tokens": 40, "temperature": 3.0}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate([1, 2, 3], seed=1, **options).ids
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws are taken
    torch.rand(3)
    assert model.generate([1, 2, 3], seed=1, **options).ids == first != model.generate([1, 2, 3], seed=2, **options).ids
    logits = [_last_logits(model, seed) for seed in (1, 1, 2)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def _last_logits(model: Model, seed: int) -> Tensor:
    """What the model says after a greedy generation: the noise is in the state whatever was drawn."""
    seen: list[Tensor] = []
    step = model.step
    model.step = lambda ids, cache: seen.append(step(ids, cache)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    try:
        model.generate([1, 2, 3], max_new_tokens=8, seed=seed)
    finally:
        del model.step  # type: ignore[method-assign]
    return seen[-1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, -1]]), "token id -1 is outside the model's vocabulary of 61"),
        (torch.tensor([[1, 61]]), "token id 61 is outside the model's vocabulary of 61"),
        (torch.tensor([[1.0]]), "must be whole numbers .* not torch.float32"),
        (torch.tensor([[True]]), "must be whole numbers .* not torch.bool"),
        (torch.tensor([1, 2]), r"must be a tensor \(B, L\), a row a sequence, not of shape \(2,\)"),
        ([[1, 2]], "not a list"),
    ],
)
@pytest.mark.parametrize("recipe", ["float", "quamba-w8a8"])
def test_ids_that_are_none_are_refused(recipe: str, ids: Tensor, message: str) -> None:
    with pytest.raises(SquamataError, match=message):
        make_model("mamba2", recipe)(ids)


def test_ids_of_a_step_and_a_batch_are_looked_at() -> None:
    model = make_model("mamba2")
    cache = model.new_cache(2)
    for ids, message in (
        (torch.tensor([1, -1]), "token id -1 is outside"),
        (torch.tensor([[1], [2]]), r"one token id a sequence, \(B,\), not \(2, 1\)"),
    ):
        with pytest.raises(SquamataError, match=message):
            model.step(ids, cache)
    with pytest.raises(SquamataError, match="1 rows of token ids for a cache of 2 sequences"):
        model.forward(torch.tensor([[1]]), cache)
    assert torch.equal(model(torch.tensor([[1, 2]], dtype=torch.uint8)), model(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("recipe", ["float", "quamba-w8a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_not_hidden_by_codes(kind: str, recipe: str) -> None:
    """Of a token whose residual stream holds NaN or infinity, and of no other in the batch."""
    for bad in (torch.nan, torch.inf):
        model = make_model(kind, recipe)
        table = model.embedding.dequantize() if recipe != "float" else model.embedding.clone()  # type: ignore[union-attr]
        table[7, 3] = bad
        model.embedding = table
        ids = torch.tensor([[1, 2, 3], [1, 7, 3]])
        logits = model(ids)
        assert bool(logits[0].isfinite().all() and logits[1, 0].isfinite().all()) and bool(logits[1, 1].isnan().all())
        cache = model.new_cache(2)
        for place in range(2):
            stepped = model.step(ids[:, place], cache)
        assert model._decoder is not None
        assert bool(stepped[0].isfinite().all()) and bool(stepped[1].isnan().all())
        with pytest.raises(SquamataError, match="not finite"):
            model.generate([7], max_new_tokens=2)


SPLIT_MODELS: dict[str, Model] = {}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(KINDS), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 3))
def test_any_split_of_a_prompt_gives_the_same_logits(kind: str, sizes: list[int], seed: int) -> None:
    """Fast kernels, float: parts of one token are the compiled token, of a few the recurrence, else chunks."""
    model = SPLIT_MODELS.setdefault(kind, make_model(kind, "float", d_conv=3))
    ids = random_ids(model.config, 3, sum(sizes), seed)
    cache, parts = model.new_cache(3), []
    for part in ids.split(sizes, dim=1):
        parts.append(model.step(part[:, 0], cache)[:, None] if part.shape[1] == 1 else model.forward(part, cache))
    exact = LanguageModel(model.checkpoint, "float", torch.float64)(ids)
    torch.testing.assert_close(torch.cat(parts, dim=1).double(), exact, rtol=2e-5, atol=float(2e-5 * exact.abs().max()))
