import json
import math

import pytest
import torch
from fakes import ByteTokenizer, TableModel, chain_model, random_model

from squamata.errors import SquamataError
from squamata.evaluate import evaluate_lambada, evaluate_task, evaluate_with_lm_eval, tasks
from squamata.evaluate.scoring import request, score
from squamata.evaluate.tasks import read_questions


def log_p(model, context, continuation):
    """log p(continuation | context) by the definition, for a bigram model."""
    ids = model.tokenizer.encode(context + continuation)
    log_table = model.table.log_softmax(-1)
    return sum(float(log_table[ids[k - 1], ids[k]]) for k in range(len(ids) - len(continuation.encode()), len(ids)))


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_scores_are_the_closed_form_in_the_order_given():
    model = random_model()
    pairs = [("a long context here", " word"), ("", "x"), ("ab", " é漢"), ("ab", " is longer than its context")]
    scores = score(model, [request(model.tokenizer, *pair) for pair in pairs])
    assert [-item.nats for item in scores] == pytest.approx([log_p(model, *pair) for pair in pairs], rel=1e-12)
    assert model.shapes == [(4, 29)]  # side by side, padded at the end


def test_spaces_that_end_the_context_belong_to_the_continuation():
    tokenizer = ByteTokenizer()
    assert request(tokenizer, "ab ", "cd") == request(tokenizer, "ab", " cd")
    assert request(tokenizer, "ab", " cd").scored == 3


@pytest.mark.parametrize(
    ("continuation", "greedy"),
    [(" word", True), (" wor", True), (" words", False), (" work", False), (" sword", False), (" o", False)],
)
def test_greedy_needs_every_token_of_the_word(continuation, greedy):
    model = chain_model("x word")
    assert score(model, [request(model.tokenizer, "cox", continuation)])[0].greedy == greedy


def test_lambada(tmp_path):
    model = chain_model("x word")
    rows = [
        {"context": context, "continuation": word}
        for context, word in (
            ("some x", "word"),
            ("x", "work"),
            ("a much longer context x", "w"),
            ("é x", "wo"),
            ("y", "word"),
        )
    ]
    hits = (True, False, True, True, False)
    path = write_lines(tmp_path / "lambada.jsonl", rows)
    result = evaluate_lambada(model, path)
    assert (result.hits, result.examples, result.accuracy) == (hits, 5, 0.6)
    assert result.accuracy_stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    mean = sum(log_p(model, row["context"], " " + row["continuation"]) for row in rows) / len(rows)
    assert result.perplexity == pytest.approx(math.exp(-mean), rel=1e-12)
    assert evaluate_lambada(model, path, limit=2).hits == hits[:2]
    assert "hits" not in json.loads(json.dumps(result.to_dict()))


QUESTIONS = [
    {"query": "Question: why?\n", "choices": ["because", "nothing"], "gold": 0},
    {"query": "Question: who", "choices": ["a snake", "a viper", "a mamba"], "gold": 2},
    {"query": "Question: é", "choices": ["xyz", "yyzz"], "gold": 1},
]


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_choices_of_one_prompt(tmp_path, task):
    write_lines(tmp_path / f"{task}.jsonl", QUESTIONS)
    accuracy, normed = set(), set()
    for seed in range(6):
        model = random_model(seed)
        result = evaluate_task(model, task, tmp_path)
        chosen, normalized = [], []
        for row in QUESTIONS:
            prompt = row["query"].rstrip("\n") + "\nAnswer:"
            values = [log_p(model, prompt, " " + choice) for choice in row["choices"]]
            chosen.append(values.index(max(values)))
            values = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
            normalized.append(values.index(max(values)))
        assert result.predictions == tuple(chosen)
        assert result.accuracy == sum(c == row["gold"] for c, row in zip(chosen, QUESTIONS, strict=True)) / 3
        assert result.accuracy_norm == sum(c == row["gold"] for c, row in zip(normalized, QUESTIONS, strict=True)) / 3
        accuracy.add(result.accuracy)
        normed.add(result.accuracy_norm)
    assert len(accuracy) > 1 and len(normed) > 1  # the seeds did tell right from wrong


def test_prompts_of_one_continuation(tmp_path):
    model = chain_model("aba. x")
    model.table[ord("a") + 1, ord(" ") + 1] = 12.0  # 'a' is followed by a space, 'b' is not
    rows = [
        {"context_options": ["it was b", "it was a"], "continuation": "x", "gold": 1},
        {"context_options": ["it was a", "it was b"], "continuation": "x", "gold": 1},
    ]
    write_lines(tmp_path / "winogrande.jsonl", rows)
    result = evaluate_task(model, "winogrande", tmp_path)
    assert result.predictions == (1, 0)
    assert (result.accuracy, result.accuracy_stderr) == (0.5, 0.5)
    assert result.accuracy_norm is None and result.accuracy_norm_stderr is None
    assert evaluate_task(model, "winogrande", tmp_path, limit=1).accuracy_stderr is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "question 1: gold 2 is none of 2 choices"),
        ({"query": "q", "choices": ["a", " "], "gold": 0}, "question 1: 'choices' must be texts"),
        ({"query": "q", "choices": [], "gold": 0}, "question 1: 'choices' must be texts"),
        ({"query": "q", "choices": ["a"]}, "line 1: no field 'gold'"),
    ],
)
def test_bad_questions(tmp_path, row, message):
    write_lines(tmp_path / "piqa.jsonl", [row])
    with pytest.raises(SquamataError, match=message):
        read_questions("piqa", tmp_path)


def test_bad_input(tmp_path):
    model = random_model()
    with pytest.raises(SquamataError, match="did you mean 'piqa'"):
        evaluate_task(model, "piqua", tmp_path)
    with pytest.raises(SquamataError, match="no such file"):
        evaluate_task(model, "piqa", tmp_path)
    path = write_lines(tmp_path / "l.jsonl", [{"context": "a", "continuation": "b"}])
    with pytest.raises(SquamataError, match="limit must be at least 1"):
        evaluate_lambada(model, path, limit=0)
    with pytest.raises(SquamataError, match="not finite"):
        evaluate_lambada(TableModel(torch.full((257, 257), torch.nan)), path)
    with pytest.raises(SquamataError, match="no tokens of its own"):
        request(model.tokenizer, "ab", "")
    with pytest.raises(SquamataError, match="no begin token"):
        request(ByteTokenizer(begin_id=None), "", "b")


def test_without_lm_eval_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(SquamataError, match=r"pip install 'squamata\[eval\]'"):
        evaluate_with_lm_eval(random_model(), ["piqa"], tmp_path, generate=print)
