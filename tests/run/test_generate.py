import json

import pytest
import torch
from fakes import BEGIN, ByteTokenizer, TableModel, chain_model, random_model

from squamata.errors import SquamataError
from squamata.run import SamplingOptions, generate, generate_stream


def stream(model, prompt, **options):
    return list(generate_stream(model, prompt, SamplingOptions(**options)))


def test_greedy_follows_the_chain_to_the_end_of_text():
    result = generate(chain_model("the snake"), "th")
    assert result.text == "e"  # 'e' comes twice; after its last place the text ends
    result = generate(chain_model("snake"), "s")
    assert (result.text, result.prompt, result.stopped_by) == ("nake", "s", "eos")
    assert result.ids == (*(byte + 1 for byte in b"nake"), BEGIN)
    assert (result.prompt_tokens, result.new_tokens) == (2, 5)
    assert result.ttft_ms > 0 and result.tpot_ms > 0
    assert json.loads(json.dumps(result.to_dict()))["text"] == "nake"


def test_every_piece_is_shown_as_it_comes():
    pieces = []
    result = generate(chain_model("snake"), "s", on_piece=pieces.append, max_new_tokens=3)
    assert [piece.text for piece in pieces] == ["n", "a", "k"] and result.text == "nak"
    assert [piece.stopped_by for piece in pieces] == [None, None, "length"]


def test_length_ends_it():
    result = generate(chain_model("snake"), "s", max_new_tokens=2)
    assert (result.text, result.stopped_by, result.new_tokens) == ("na", "length", 2)
    assert generate(chain_model("snake"), "s", max_new_tokens=1).tpot_ms is None


def test_prompt_is_one_forward_pass_then_single_steps():
    model = chain_model("snakes!")
    generate(model, "sna", max_new_tokens=4)
    assert model.shapes == [(1, 4), (1, 1), (1, 1), (1, 1)]  # the last token is not fed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_state_is_used(temperature):
    """Against a loop that runs the whole text again for every token."""
    model = random_model(memory=0.8)
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 4}
    ids = model.tokenizer.encode("ab")
    from squamata.run import Sampler

    sampler = Sampler(SamplingOptions(**options))
    expected = []
    while len(expected) < 20 and BEGIN not in expected:
        expected.append(sampler.pick(model(torch.tensor([ids + expected]))[0, -1]))
    assert generate(model, "ab", **options).ids == tuple(expected)


def test_seeds():
    texts = {seed: generate(random_model(), "ab", temperature=1.0, seed=seed).ids for seed in (1, 2)}
    assert generate(random_model(), "ab", temperature=1.0, seed=1).ids == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("stop", "text", "stopped_by"),
    [
        (("de",), "bc", "stop"),
        (("gh", "cdef"), "b", "stop"),
        (("b",), "", "stop"),
        (("cx", "hi"), "bcdefgh", "eos"),  # 'h' is held for 'hi' until the end
    ],
)
def test_stop_strings_across_pieces(stop, text, stopped_by):
    pieces = stream(chain_model("abcdefgh"), "a", stop=stop)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.stopped_by for piece in pieces] == [None] * (len(pieces) - 1) + [stopped_by]
    written = ""
    for piece in pieces:
        written += piece.text
        assert text.startswith(written)


def test_a_held_beginning_of_a_stop_string_comes_out_at_the_length():
    result = generate(chain_model("abcdefgh"), "a", max_new_tokens=3, stop=("cdx",))
    assert (result.text, result.stopped_by) == ("bcd", "length")


def test_characters_of_many_bytes_come_whole():
    model = chain_model("a漢é")
    pieces = stream(model, "a")
    assert [piece.text for piece in pieces] == ["", "", "漢", "", "é", ""]
    cut = generate(model, "a", max_new_tokens=2)
    assert cut.text == "\N{REPLACEMENT CHARACTER}"


def test_token_ids_are_used_as_they_are_and_need_no_tokenizer():
    model = chain_model("snake")
    assert generate(model, [ord("n") + 1]).text == "ake"
    assert generate(model, torch.tensor([ord("n") + 1])).prompt == "n"
    model.tokenizer = None
    result = generate(model, [ord("n") + 1], max_new_tokens=3)
    assert (result.text, result.prompt, result.ids) == ("", "", tuple(byte + 1 for byte in b"ake"))
    assert result.stopped_by == "length"


def test_an_empty_prompt_is_the_begin_token():
    model = chain_model("snake")
    model.table[BEGIN, ord("s") + 1] = 10.0
    assert generate(model, "", max_new_tokens=5).text == "snake"


def test_repetition_penalty_counts_the_prompt():
    model = chain_model("snake")
    model.table[ord("s") + 1, ord("k") + 1] = 9.0
    assert generate(model, "ns", max_new_tokens=1, repetition_penalty=1.2).text == "k"


def without_tokenizer():
    model = random_model()
    model.tokenizer = None
    return model


@pytest.mark.parametrize(
    ("model", "prompt", "options", "message"),
    [
        (random_model(), "a", {"temprature": 1.0}, "no sampling option 'temprature'.*did you mean 'temperature'"),
        (random_model(), "a", {"top_p": 2.0}, "top-p must be"),
        (random_model(), [], {}, "the prompt is empty"),
        (TableModel(torch.zeros(257, 257), tokenizer=ByteTokenizer(begin_id=None)), "", {}, "the prompt is empty"),
        (random_model(), [3, 257], {}, "token id 257 is outside the model's vocabulary of 257"),
        (random_model(), [-1], {}, "token id -1 is outside"),
        (random_model(), [1.5], {}, "one row of token ids, which are whole numbers"),
        (random_model(), torch.tensor([[1, 2]]), {}, "one row of token ids"),
        (random_model(), None, {}, "a prompt is a text, or one row of token ids"),
        (without_tokenizer(), "a", {}, "no tokenizer"),
        (without_tokenizer(), [1], {"stop": ("x",)}, "cannot find stop strings"),
        (TableModel(torch.full((257, 257), torch.nan)), "a", {}, "not finite"),
    ],
)
def test_bad_input(model, prompt, options, message):
    with pytest.raises(SquamataError, match=message):
        generate(model, prompt, **options)


def test_a_bad_prompt_is_refused_before_the_first_piece_is_asked_for():
    with pytest.raises(SquamataError, match="outside"):
        generate_stream(random_model(), [999])
