"""Runs where the extra ``eval`` is installed."""

import json
import math
from types import SimpleNamespace

import pytest
from fakes import chain_model, random_model

pytest.importorskip("lm_eval")

from squamata.errors import SquamataError
from squamata.evaluate import evaluate, evaluate_lambada, evaluate_task, evaluate_with_lm_eval
from squamata.evaluate.lm_eval_adapter import SquamataLM, local_tasks
from squamata.run import generate

ROWS = {
    "piqa": [{"query": f"Question: {k}\n", "choices": ["ab", f"c{k}defg"], "gold": k % 2} for k in range(12)],
    "arc_easy": [{"query": f"Question: {k}", "choices": ["a", f"b{k}", "cdef"], "gold": k % 3} for k in range(12)],
    "winogrande": [{"context_options": [f"a{k}", f"b{k}"], "continuation": "c.", "gold": k % 2} for k in range(12)],
    "lambada_openai": [{"context": f"x{k}", "continuation": f"word{k}"} for k in range(12)],
}


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def instances(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_lm_eval_finds_what_our_own_scorer_finds(folder):
    model = random_model()
    found = evaluate_with_lm_eval(model, list(ROWS), folder, generate)
    assert sorted(found) == sorted(ROWS) == local_tasks()
    for task in ("piqa", "arc_easy", "winogrande"):
        ours = evaluate_task(model, task, folder)
        assert found[task]["acc"] == pytest.approx(ours.accuracy)
        assert found[task]["acc_stderr"] == pytest.approx(ours.accuracy_stderr)
        assert found[task].get("acc_norm") == pytest.approx(ours.accuracy_norm)
        assert 0 < ours.accuracy < 1
    ours = evaluate_lambada(model, folder / "lambada_openai.jsonl")
    assert found["lambada_openai"]["acc"] == pytest.approx(ours.accuracy)
    assert found["lambada_openai"]["perplexity"] == pytest.approx(ours.perplexity, rel=1e-9)


def test_limit(folder):
    found = evaluate_with_lm_eval(random_model(), ["piqa"], folder, generate, limit=5)
    assert found["piqa"]["acc"] == pytest.approx(evaluate_task(random_model(), "piqa", folder, limit=5).accuracy)


def test_rolling_loglikelihood_is_that_of_our_windows():
    model, text = random_model(memory=0.5), "A text of more than one window."
    ours = evaluate(model, [text], window=8)
    found = SquamataLM(model, generate, window=8).loglikelihood_rolling(instances((text,)))
    assert found == pytest.approx([-ours.nats_per_token * ours.tokens], rel=1e-12)


def test_rolling_loglikelihood_of_a_token_and_of_nothing():
    """A harness goes through texts that others chose: none of them may end the run."""
    model = chain_model("ab")
    single, nothing = SquamataLM(model, generate).loglikelihood_rolling(instances(("a",), ("",)))
    assert single == SquamataLM(model, generate).loglikelihood(instances(("", "a")))[0][0]
    assert nothing == 0.0


def test_generate_until_stops_before_its_strings():
    lm = SquamataLM(chain_model("abcdefgh"), generate)
    options = [{"until": ["fg"]}, {"until": "d", "max_gen_toks": 9}, {"until": [], "max_gen_toks": 2}]
    assert lm.generate_until(instances(*(("xa", some) for some in options))) == ["bcde", "bc", "bc"]


def test_loglikelihood_is_the_closed_form():
    model = chain_model("ab")
    value, greedy = SquamataLM(model, generate).loglikelihood(instances(("a", "b")))[0]
    assert greedy and value == pytest.approx(10 - math.log(math.exp(10) + 256))


def test_bad_input(folder):
    with pytest.raises(SquamataError, match="did you mean 'piqa'"):
        evaluate_with_lm_eval(random_model(), ["piqa_"], folder, generate)
    (folder / "piqa.jsonl").unlink()
    with pytest.raises(SquamataError, match=r"no such file: .*piqa.jsonl"):
        evaluate_with_lm_eval(random_model(), ["piqa"], folder, generate)
