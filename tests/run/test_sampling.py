import math

import pytest
import torch

from squamata.errors import SquamataError
from squamata.run.sampling import Sampler, SamplingOptions, draw, penalize, trim

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.1, -3.0])


def draws(logits, count, **options):
    """Relative frequency of every id."""
    sampler = Sampler(SamplingOptions(**options))
    counts = torch.zeros(len(logits))
    for _ in range(count):
        counts[sampler.pick(logits)] += 1
    return counts / count


def chi_square(frequencies, probabilities, count):
    kept = probabilities > 0
    assert (frequencies[~kept] == 0).all()
    return float((count * (frequencies - probabilities)[kept] ** 2 / probabilities[kept]).sum())


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert Sampler(SamplingOptions()).pick(LOGITS) == 1
    assert Sampler(SamplingOptions()).pick(torch.tensor([0.0, 3.0, 3.0])) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    count = 4000
    frequencies = draws(LOGITS, count, temperature=temperature, seed=3)
    assert chi_square(frequencies, (LOGITS / temperature).softmax(-1), count) < 20.5  # 99.9 % of chi-square(5)


def test_trimmed_draws_follow_the_renormalized_rest():
    count = 4000
    expected = torch.zeros(6)
    expected[[1, 3]] = LOGITS[[1, 3]].softmax(-1)
    for trimmed in ({"top_k": 2}, {"top_p": 0.65}):
        frequencies = draws(LOGITS, count, temperature=1.0, **trimmed)
        assert chi_square(frequencies, expected, count) < 10.8  # 99.9 % of chi-square(1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "ids"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (3, 1.0, {1, 3, 0}),
        (99, 1.0, {0, 1, 2, 3, 4}),
        (0, 0.399, {1}),
        (0, 0.401, {1, 3}),
        (0, 0.701, {0, 1, 3}),
        (0, 1e-9, {1}),
        (2, 0.572, {1, 3}),  # of the two kept, the first has 4/7 = 0.571 of the mass
        (2, 0.571, {1}),
    ],
)
def test_support_is_exact(top_k, top_p, ids):
    probabilities = torch.tensor([0.2, 0.4, 0.04, 0.3, 0.06]).double()
    kept, found = trim(probabilities.log(), top_k, top_p)
    found = torch.arange(5) if found is None else found
    kept, found = kept[kept > 0], found[kept > 0]
    assert set(found.tolist()) == ids
    assert torch.allclose(kept / kept.sum(), probabilities[found] / probabilities[found].sum())


def test_a_seed_repeats_and_another_differs():
    first, again, other = [Sampler(SamplingOptions(temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    sequences = [[sampler.pick(LOGITS) for _ in range(50)] for sampler in (first, again, other)]
    assert sequences[0] == sequences[1] != sequences[2]


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    Sampler(SamplingOptions(temperature=1.0)).pick(LOGITS)
    assert torch.equal(before, torch.random.get_rng_state())


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    expected = torch.tensor([0.1, 2.0 / 1.5, -1.0 * 1.5, 1.5, 0.1, -3.0])
    seen = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor([1, 2]), True)
    assert torch.allclose(penalize(LOGITS, seen, 1.5), expected)
    assert penalize(LOGITS, seen, 1.0) is LOGITS
    assert torch.equal(LOGITS, torch.tensor([0.1, 2.0, -1.0, 1.5, 0.1, -3.0]))  # the model's logits are not touched


def test_penalty_counts_the_prompt_and_every_pick():
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    sampler.see([1])
    assert [sampler.pick(LOGITS) for _ in range(3)] == [3, 1, 1]  # 2/2 < 1.5; then 1.5/2 < 2/2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.1}, "top-p must be above 0 and at most 1"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be 1e-6 to 1e6"),
        ({"repetition_penalty": 1e-40}, "repetition-penalty must be 1e-6 to 1e6"),
        ({"max_new_tokens": 4.5}, "max-new-tokens must be a whole number, not 4.5"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"stop": None}, "stop must be a tuple of strings, not None"),
        ({"stop": (3,)}, "stop must be a tuple of strings"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"seed": 2**63}, "seed must be 0 or more"),
        ({"stop": "word"}, "stop must be a tuple"),
        ({"stop": ("a", "")}, "stop string must not be empty"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(SquamataError, match=message):
        SamplingOptions(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(SquamataError, match="not finite"):
        Sampler(SamplingOptions(temperature=temperature)).pick(torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature):
    assert draws(torch.tensor([1.0, -math.inf, 30.0, 29.0]), 20, temperature=temperature).tolist() == [0, 0, 1, 0]
    assert draws(torch.tensor([-1e30, -2e30, 1e30]), 20, temperature=temperature).tolist() == [0, 0, 1]


def test_a_forbidden_token_is_never_drawn():
    assert draws(torch.tensor([-math.inf, 0.0, -math.inf]), 20, temperature=3.0).tolist() == [0, 1, 0]


def test_rows_are_drawn_apart_and_ties_at_the_edge_keep_exactly_k():
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0, -1.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    options = SamplingOptions(temperature=1.0, top_k=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([draw(logits, options, generator) for _ in range(400)])
    assert len(set(ids[:, 0].tolist())) == 2 and set(ids[:, 0].tolist()) < {1, 2, 3}
    assert (ids[:, 1] == 0).float().mean() > 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 2}, {"top_p": 0.65}])
def test_a_gpu_draws_the_same_distribution_from_one_graph(options):
    options = {"temperature": 1.0, "repetition_penalty": 1.0} | options
    count, logits = 3000, LOGITS.cuda()
    sampler, counts = Sampler(SamplingOptions(**options)), torch.zeros(6)
    for _ in range(count):
        counts[sampler.pick(logits)] += 1
    expected, ids = trim(LOGITS / options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0))
    placed = expected if ids is None else torch.zeros(6).scatter(0, ids, expected)
    assert chi_square(counts / count, placed / placed.sum(), count) < 20.5
    greedy = Sampler(SamplingOptions(repetition_penalty=2.0))
    greedy.see([1])
    assert [greedy.pick(logits) for _ in range(3)] == [3, 1, 1]
    with pytest.raises(SquamataError, match="not finite"):
        greedy.pick(torch.full((6,), math.nan, device="cuda"))


@pytest.mark.parametrize("temperature", [1e-6, 1e-45, 1e-300])
def test_the_coldest_draw_is_the_likeliest(temperature):
    """Division by a number that float32 does not have would leave nothing but NaN to draw from."""
    logits = 50 * LOGITS
    assert Sampler(SamplingOptions(temperature=temperature)).pick(logits) == int(logits.argmax())
