"""The bundled model: what the fakes cannot show, that state, tokenizer and windows of a trained model fit together."""

import math

import pytest
import torch

import squamata
from squamata.evaluate import evaluate
from squamata.run import Chat, generate

TEXT = (
    "Snakes are elongated, limbless, carnivorous reptiles. Like all other squamates, snakes are ectothermic "
    "vertebrates covered in overlapping scales. Many species have skulls with more joints than their ancestors."
)


@pytest.fixture(scope="module")
def model():
    return squamata.load("bundled")


def test_perplexity_is_the_cross_entropy_of_one_forward_pass_in_both_modes(model):
    ids = torch.tensor([model.tokenizer.encode(TEXT)])
    with torch.no_grad():
        nats = float(torch.nn.functional.cross_entropy(model(ids)[0, :-1].double(), ids[0, 1:]))
    parallel, recurrent = (evaluate(model, [TEXT], mode=mode) for mode in ("parallel", "recurrent"))
    assert parallel.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert recurrent.nats_per_token == pytest.approx(nats, rel=1e-4)
    assert parallel.bits_per_byte == pytest.approx(nats * parallel.tokens / math.log(2) / len(TEXT), rel=1e-5)
    assert parallel.perplexity < 200  # it has learnt English


def test_chat_continues_what_generate_would_have_read_at_once(model):
    chat = Chat(model, max_new_tokens=6)
    first = "".join(chat.say("The snake is"))
    second = "".join(chat.say(" However,"))
    whole = generate(model, "The snake is", max_new_tokens=6)
    assert first == whole.text
    ids = [*model.tokenizer.encode("The snake is"), *whole.ids, *model.tokenizer.encode(" However,", begin=False)]
    assert second == generate(model, ids, max_new_tokens=6).text
