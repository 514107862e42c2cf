import pytest
import torch
from fakes import BEGIN, ByteTokenizer, TableModel, chain_model, random_model

from squamata.errors import SquamataError
from squamata.run import Chat, Sampler, SamplingOptions, generate


def test_two_turns_are_one_document_with_the_state_kept():
    """Against a loop that runs the whole document again for every token."""
    model = random_model(memory=0.8)
    options = {"max_new_tokens": 6, "temperature": 0.7, "seed": 2}
    chat = Chat(model, **options)
    replies = ["".join(chat.say(text)) for text in ("Hello.", " And then?")]
    sampler, document, expected = Sampler(SamplingOptions(**options)), [BEGIN], []
    for text in ("Hello.", " And then?"):
        document += model.tokenizer.encode(text, begin=False)
        reply = []
        for _ in range(6):
            reply.append(sampler.pick(model(torch.tensor([document + reply]))[0, -1]))
        document += reply
        expected.append(model.tokenizer.decode(reply))
    assert BEGIN not in document[1:]
    assert replies == expected
    assert chat.tokens == len(document)
    assert chat._cache.taken_in == [document[:-1]]  # every token once; the last waits for the next turn


def test_end_of_text_ends_the_reply_but_not_the_document():
    model = chain_model("snake")
    chat = Chat(model)
    assert "".join(chat.say("s")) == "nake"
    assert "".join(chat.say("na")) == "ke"
    assert chat._cache.taken_in == [model.tokenizer.encode("snakenake")]
    assert chat.tokens == len("snakenake") + 1


def test_a_reply_that_is_not_read_to_its_end_is_as_long_as_what_was_read():
    chat = Chat(chain_model("snake"))
    reply = chat.say("s")
    assert next(reply) + next(reply) == "na"
    reply.close()
    "".join(chat.say("x"))
    assert chat._cache.taken_in[0][:5] == ByteTokenizer().encode("snax")


def test_stop_strings_end_a_turn():
    chat = Chat(chain_model("abcdefgh"), stop=("ef",))
    assert "".join(chat.say("a")) == "bcd"
    assert "".join(chat.say("f")) == "gh"


def test_reset_forgets():
    chat = Chat(random_model(memory=0.5), max_new_tokens=8, temperature=1.0)
    first = list(chat.say("Hello"))
    assert list(chat.say("Hello")) != first
    chat.reset()
    assert chat.tokens == 0
    assert list(chat.say("Hello")) == first


def test_an_empty_turn_lets_the_model_go_on():
    model = random_model(memory=0.5)
    chat = Chat(model, max_new_tokens=5)
    parts = "".join(chat.say("Hello")) + "".join(chat.say(""))
    assert parts == generate(model, "Hello", max_new_tokens=10).text


def test_bad_input():
    with pytest.raises(SquamataError, match="no sampling option"):
        Chat(random_model(), temp=1)
    chat = Chat(chain_model("snake"))
    list(chat.say("s"))
    with pytest.raises(SquamataError, match="nothing to say"):
        chat.say("")
    with pytest.raises(SquamataError, match="the prompt is empty"):
        Chat(TableModel(torch.zeros(257, 257), tokenizer=ByteTokenizer(begin_id=None))).say("")
    model = random_model()
    model.tokenizer = None
    with pytest.raises(SquamataError, match="no tokenizer"):
        Chat(model).say("a")
