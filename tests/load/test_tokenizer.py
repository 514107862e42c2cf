"""Text to ids and back, whole and as a stream."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from layout_writers import REAL_MODELS, SHARED, tiny_config

from squamata.errors import SquamataError
from squamata.load.hub import bundled
from squamata.load.source import open_source
from squamata.load.tokenizer import Tokenizer, check_fits

FOLDERS = [bundled(), *sorted((SHARED / "tokenizers").glob("gpt-neox-20b"))]
TEXTS = ["The snake", "", " naïve  café\n\tx", "日本語とÅ", "👩‍👩‍👧 fam🐍ily", "a\u0000b", "𝄞 é́"]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.read(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.begin_id == tokenizer.eos_id == 0
    assert ids[1:] == tokenizer.encode(text, begin=False)
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids) == text


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    for begin in (True, False):
        assert tokenizer.encode_all(TEXTS, begin) == [tokenizer.encode(text, begin) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_emits_whole_characters_as_soon_as_they_are_complete(tokenizer: Tokenizer, text: str) -> None:
    stream, emitted, ids = tokenizer.stream(), "", tokenizer.encode(text)
    for count, token in enumerate(ids, 1):
        piece = stream.push(token)
        emitted += piece
        assert "\ufffd" not in piece
        assert emitted == tokenizer.decode(ids[:count]).rstrip("\ufffd")
    assert emitted == text and stream.finish() == ""


def test_a_stream_of_any_ids_gives_the_same_text_as_decoding_them_at_once(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    lone_bytes = tokenizer.encode("🐍é日", begin=False) + list(range(1, 260))
    for _ in range(300):
        ids = [
            draw.choice(lone_bytes) if draw.random() < 0.6 else draw.randrange(tokenizer.vocab_size) for _ in range(9)
        ]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_an_unfinished_character_is_held_back_and_shown_broken_at_the_end() -> None:
    tokenizer = Tokenizer.read(bundled())
    ids = tokenizer.encode("ok 🐍", begin=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)).rstrip() == "ok"
    assert set(stream.finish().strip()) == {"\ufffd"}


def test_vocabulary_sizes() -> None:
    sizes = {"mamba2-5m": 8192, "gpt-neox-20b": 50277}
    for folder in FOLDERS:
        assert Tokenizer.read(folder).vocab_size == sizes[folder.name]


@pytest.mark.parametrize("folder", REAL_MODELS, ids=lambda folder: folder.name)
def test_the_tokenizers_of_the_real_models_fit(folder: Path) -> None:
    check_fits(Tokenizer.read(folder), open_source(folder).config)


def test_a_tokenizer_with_too_many_ids_is_refused() -> None:
    tokenizer = Tokenizer.read(bundled())
    check_fits(tokenizer, tiny_config("mamba1", vocab_size=8192))
    with pytest.raises(SquamataError, match=r"has ids up to 8191, but the model's vocabulary ends at 8190; .*another"):
        check_fits(tokenizer, tiny_config("mamba1", vocab_size=8191))


def test_stored_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    content = json.loads((bundled() / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    plain, stored = Tokenizer.read(bundled()), Tokenizer.read(tmp_path)
    text = "one two three four five six seven"
    assert stored.encode(text) == plain.encode(text)
    assert stored.encode_all([text, "x"]) == plain.encode_all([text, "x"])


@pytest.mark.parametrize("form", ["the", {"content": "the", "lstrip": False}])
def test_begin_and_end_come_from_the_configuration(tmp_path: Path, form: object) -> None:
    shutil.copy(bundled() / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": form, "eos_token": "<|endoftext|>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    tokenizer = Tokenizer.read(tmp_path)
    (the,) = tokenizer.encode("the", begin=False)
    assert (tokenizer.begin_id, tokenizer.eos_id) == (the, 0)


def test_a_missing_tokenizer_says_where_to_put_one(tmp_path: Path) -> None:
    with pytest.raises(SquamataError, match=r"no tokenizer\.json; copy the tokenizer .*gpt-neox-20b"):
        Tokenizer.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "nonsense"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(SquamataError, match=r"tokenizer\.json: not a readable tokenizer \(.+\)$"):
        Tokenizer.read(tmp_path)
