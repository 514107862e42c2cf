import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from fakes import ByteTokenizer, TableModel, random_model, random_table

from squamata.errors import SquamataError
from squamata.evaluate import evaluate, paired_difference, uncertainty
from squamata.evaluate import measure as measure_module
from squamata.evaluate.measure import measure
from squamata.evaluate.perplexity import UnitSums, difference_of_sums
from squamata.evaluate.uncertainty import ratio_interval, tail

DOCUMENTS = [
    "The snake sheds its skin.",
    "é漢 and more",
    "x",
    "A longer document, of several windows at small sizes.",
    "The fifth.",
    "And a sixth.",
]


def plain_log_probabilities(model, document, window):
    """(log p over V of every predicted token, target) by the definition, one token at a time."""
    ids = model.tokenizer.encode(document)
    for at in range(1, len(ids)):
        previous, first = ids[at - 1], (at - 1) % window == 0
        logits = model.table[previous] + (0 if first else model.memory * model.table[ids[at - 2]])
        yield logits - logits.exp().sum().log(), ids[at]


def plain_nats(model, documents, window):
    return [sum(-float(log_p[t]) for log_p, t in plain_log_probabilities(model, d, window)) for d in documents]


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
@pytest.mark.parametrize(("window", "batch"), [(2048, None), (7, None), (7, 2), (1, 3)])
@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_perplexity_and_bits_per_byte_are_the_closed_form(mode, window, batch, memory):
    model = random_model(memory=memory)
    nats = plain_nats(model, DOCUMENTS, window)
    tokens = sum(len(document.encode()) for document in DOCUMENTS)
    result = evaluate(model, DOCUMENTS, window=window, mode=mode, batch=batch)
    assert (result.tokens, result.documents, result.mode, result.window) == (tokens, 6, mode, window)
    assert result.nats_per_token == pytest.approx(sum(nats) / tokens, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(sum(nats) / tokens / math.log(2), rel=1e-12)  # one token a byte
    np.testing.assert_allclose(result.sums.nats, nats, rtol=1e-12)
    assert result.kl is None and result.top1_agreement is None and result.kl_ci is None


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
def test_divergence_and_agreement_are_the_closed_form(mode):
    model, against = random_model(1, memory=0.3), random_model(1, memory=0.0)
    kl, agrees, tokens = 0.0, 0, 0
    for document in DOCUMENTS:
        pairs = zip(
            plain_log_probabilities(model, document, 9), plain_log_probabilities(against, document, 9), strict=True
        )
        for (log_q, _), (log_p, _) in pairs:
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agrees += int(log_p.argmax() == log_q.argmax())
            tokens += 1
    result = evaluate(model, DOCUMENTS, against, window=9, mode=mode)
    assert result.kl == pytest.approx(kl / tokens, rel=1e-12)
    assert result.top1_agreement == pytest.approx(agrees / tokens)
    assert 0 < result.top1_agreement < 1
    assert result.kl_ci[0] <= result.kl <= result.kl_ci[1]
    assert result.top1_agreement_ci[0] <= result.top1_agreement <= result.top1_agreement_ci[1]


def test_a_model_does_not_diverge_from_itself():
    result = evaluate(random_model(), DOCUMENTS, random_model())
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    model = TableModel(torch.zeros(257, 257))
    result = evaluate(model, DOCUMENTS)
    assert result.perplexity == pytest.approx(257, rel=1e-6)
    assert result.perplexity_ci == pytest.approx((257, 257), rel=1e-6)


def test_recurrent_steps_windows_side_by_side_and_parallel_runs_equal_lengths_together():
    model = random_model()
    evaluate(model, ["abcdef", "abc"], window=2048, mode="recurrent")
    assert model.shapes == [(2, 1)] * 6
    model = random_model()
    evaluate(model, ["abcdefgh", "abcdef"], window=3, batch=8)
    assert model.shapes == [(4, 3), (1, 2)]


def test_max_tokens_keeps_the_first_tokens():
    model = random_model(memory=0.5)
    whole, cut = (evaluate(model, documents, window=6) for documents in (["abcdefghij"], ["abcdefghijklm"]))
    assert evaluate(model, ["abcdefghijklm"], window=6, max_tokens=10).perplexity == pytest.approx(whole.perplexity)
    assert cut.perplexity != pytest.approx(whole.perplexity)


def test_units_are_documents_or_the_windows_of_a_few():
    many = evaluate(random_model(), DOCUMENTS, window=5)
    assert (many.sums.kind, len(many.sums.tokens)) == ("documents", 6)
    few = evaluate(random_model(), DOCUMENTS[:5], window=5)
    assert few.sums.kind == "windows" and len(few.sums.tokens) == sum(-(-len(d.encode()) // 5) for d in DOCUMENTS[:5])
    assert few.sums.tokens.sum() == few.tokens and few.sums.nats.sum() == pytest.approx(few.nats_per_token * few.tokens)
    single = evaluate(random_model(), [DOCUMENTS[3]], window=5)
    assert (single.sums.kind, single.sums.tokens.tolist()) == (
        "windows",
        [5] * (len(DOCUMENTS[3]) // 5) + [len(DOCUMENTS[3]) % 5],
    )
    assert single.perplexity_ci[0] < single.perplexity < single.perplexity_ci[1]
    alone = evaluate(random_model(), [DOCUMENTS[3]])
    assert alone.perplexity_ci is None


def test_documents_that_predict_nothing_are_no_units():
    model = TableModel(random_table(0), tokenizer=ByteTokenizer(begin_id=None))
    result = evaluate(model, ["x", "abc", "", "abcd"])
    assert (result.documents, result.tokens, result.sums.tokens.tolist()) == (2, 5, [2, 3])


def test_files_and_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    result = evaluate(random_model(), str(path))
    written = json.loads(json.dumps(result.to_dict()))
    assert "sums" not in written
    assert written["perplexity"] == evaluate(random_model(), DOCUMENTS).perplexity
    assert written["perplexity_ci"] == list(result.perplexity_ci)


def test_progress_counts_tokens_to_the_end():
    calls = []
    result = evaluate(random_model(), DOCUMENTS, window=8, batch=2, progress=lambda done, of: calls.append((done, of)))
    assert calls == sorted(calls) and calls[-1] == (result.tokens, result.tokens) and len(calls) > 2


def test_measuring_in_pieces_changes_nothing(monkeypatch):
    logits, reference = random_table(3), random_table(4)
    targets = torch.arange(257).flip(0)
    whole = measure(logits, targets, reference)
    monkeypatch.setattr(measure_module, "_SOFTMAX_AT_ONCE", 1000)
    pieces = measure(logits, targets, reference)
    for name in ("nats", "kl", "agrees"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


def test_half_precision_logits_are_measured_in_float32():
    logits = random_table(3).bfloat16()
    nats = measure(logits, torch.arange(257)).nats
    assert torch.allclose(nats, measure(logits.double(), torch.arange(257)).nats, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "recurent"}, "did you mean 'recurrent'"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"window": 0}, "window must hold at least 1"),
        ({"text": ["a"]}, "shorter than 2 tokens"),
        ({"text": "nowhere.txt"}, "no such file"),
        ({"against": TableModel(torch.zeros(300, 300))}, "vocabularies of 257 and 300"),
        ({"model": TableModel(torch.full((257, 257), torch.nan))}, "not finite"),
        ({"model": TableModel(random_table(0) * 1e5)}, "loses [0-9]+ nats a token, too many for a perplexity"),
        ({"against": TableModel(torch.full((257, 257), torch.nan))}, "KL is not finite: the reference"),
        ({"text": ["\N{SNAKE}"], "max_tokens": 2}, "spell not one whole character: judge more"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(SquamataError, match=message):
        evaluate(**{"model": random_model(), "text": DOCUMENTS, **arguments})


def test_a_model_without_tokenizer_is_refused():
    model = random_model()
    model.tokenizer = None
    with pytest.raises(SquamataError, match="no tokenizer"):
        evaluate(model, DOCUMENTS)


@pytest.mark.parametrize("documents", [6, 7, 15, 60])
def test_bootstrap_intervals_cover_the_truth(documents):
    """Documents of random length whose tokens have a known mean: about 95 of 100 intervals hold it, also of few."""
    generator = np.random.default_rng(1)
    covered, runs = 0, 400
    for run in range(runs):
        tokens = generator.integers(10, 200, size=documents)
        topic = generator.normal(3.0, 0.5, size=documents)  # documents differ; within one, tokens are alike
        low, high = ratio_interval(topic * tokens, tokens, seed=run, resamples=1000)
        covered += low <= 3.0 <= high
    assert 0.91 <= covered / runs <= 0.985


@pytest.mark.parametrize("units, t", [(6, 2.5706), (7, 2.4469), (16, 2.1314), (31, 2.0423)])
def test_the_tails_are_those_of_students_t(units, t):
    assert NormalDist().inv_cdf(tail(units)) == pytest.approx(-t * math.sqrt(units / (units - 1)), rel=2e-3)
    assert tail(10**6) == pytest.approx(0.025, rel=1e-4)


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    values, tokens = np.random.default_rng(3).normal(size=(2, 40)) ** 2
    found = ratio_interval(values, tokens)
    monkeypatch.setattr(uncertainty, "COUNTS_AT_ONCE", 1000)
    assert ratio_interval(values, tokens) == pytest.approx(found, rel=1e-12)


def test_bootstrap_width_is_that_of_the_normal_approximation_and_is_seeded():
    generator = np.random.default_rng(2)
    values = generator.normal(size=500)
    ones = np.ones(500)
    low, high = ratio_interval(values, ones)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(500), rel=0.1)
    assert ratio_interval(values, ones) == (low, high)
    assert ratio_interval(values, ones, seed=1) != (low, high)
    assert ratio_interval(values[:1], ones[:1]) is None


def test_paired_difference_sees_what_unpaired_intervals_hide():
    documents = [text * (1 + k % 5) for k in range(12) for text in DOCUMENTS]
    table = random_table(0)
    first = evaluate(TableModel(table), documents)
    worse = evaluate(TableModel(table * 1.01), documents)
    assert worse.perplexity_ci[0] < first.perplexity < worse.perplexity_ci[1]  # the texts differ more than the models
    difference = paired_difference(first, worse)
    assert difference.verdict == "worse"
    assert difference.nats_per_token == pytest.approx(worse.nats_per_token - first.nats_per_token)
    assert difference.ci[0] <= difference.nats_per_token <= difference.ci[1]
    assert difference.perplexity_ratio == pytest.approx(worse.perplexity / first.perplexity)
    assert paired_difference(worse, first).verdict == "better"
    same = paired_difference(first, evaluate(TableModel(table), documents))
    assert (same.verdict, same.nats_per_token) == ("not significant", 0.0)


def test_paired_difference_needs_the_same_text():
    first, second = evaluate(random_model(), DOCUMENTS), evaluate(random_model(), DOCUMENTS[:3])
    with pytest.raises(SquamataError, match="different texts"):
        paired_difference(first, second)


def test_five_units_show_no_difference_however_alike_they_are():
    """All of five would agree in sign by chance more often than once in twenty."""
    tokens = np.ones(6)
    for units, verdict in ((5, "not significant"), (6, "worse")):
        first, second = (UnitSums("windows", tokens[:units], nats * tokens[:units]) for nats in (2.0, 3.0))
        assert difference_of_sums(first, second).verdict == verdict
        assert difference_of_sums(first, second).nats_per_token == 1.0


def test_differences_of_kl_need_a_reference():
    ones = np.ones(8)
    first, second = (UnitSums("documents", ones, ones, kl * ones) for kl in (0.5, 0.25))
    assert difference_of_sums(first, second, "kl").verdict == "better"
    with pytest.raises(SquamataError, match="no KL"):
        difference_of_sums(first, UnitSums("documents", ones, ones), "kl")
