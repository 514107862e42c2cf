"""SentencePiece models become a tokenizer.json with the same ids, or are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from squamata.errors import SquamataError
from squamata.load import sentencepiece as ours
from squamata.load.hub import bundled
from squamata.load.sentencepiece import PROBES, find_sentencepiece_model, write_tokenizer
from squamata.load.tokenizer import Tokenizer

TEXTS = [json.loads(line)["text"] for line in (bundled() / "calibration.jsonl").read_text().splitlines()]
TRAINED: dict[str, dict[str, Any]] = {
    "bpe-bytes": {"model_type": "bpe", "byte_fallback": True},
    "bpe": {"model_type": "bpe"},
    "bpe-plain": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "bpe-symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<t>"],
    },
    "bpe-symbols-prefix": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<t>", "[INST]"]},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "unigram": {"model_type": "unigram"},
}


def trained(folder: Path, name: str, **options: Any) -> Path:
    """A small model of the text that comes with the package."""
    lines = [line for text in TEXTS[:6] for line in text.splitlines() if line.strip()] + [
        probe for probe in PROBES if probe
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / name),
        vocab_size=900,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return folder / f"{name}.model"


@pytest.mark.parametrize("name", TRAINED)
def test_ids_and_text_are_those_of_sentencepiece(tmp_path: Path, name: str) -> None:
    path = trained(tmp_path, "tokenizer", **TRAINED[name])
    write_tokenizer(path, tmp_path)
    theirs, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.read(tmp_path)
    assert (tokenizer.begin_id, tokenizer.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert tokenizer.vocab_size == theirs.get_piece_size()
    for text in [*TEXTS[6:9], *PROBES, *TEXTS[6].splitlines(), "a <t> b"]:
        ids = theirs.encode(text)
        assert tokenizer.encode(text, begin=False) == ids
        if TRAINED[name].get("byte_fallback"):
            assert tokenizer.decode(ids) == theirs.decode(ids)


def test_what_would_give_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(tmp_path, "tokenizer", model_type="bpe")
    assemble = ours._assemble

    def without_prefix(proto: Any, where: Path) -> Any:
        proto.normalizer_spec.add_dummy_prefix = False
        return assemble(proto, where)

    monkeypatch.setattr(ours, "_assemble", without_prefix)
    with pytest.raises(SquamataError, match="cannot be said exactly"):
        write_tokenizer(path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    monkeypatch.undo()
    path.write_bytes(b"damaged")
    with pytest.raises(SquamataError, match="not a readable SentencePiece model"):
        write_tokenizer(path, tmp_path)
    words = trained(tmp_path, "words", model_type="char")
    with pytest.raises(SquamataError, match="neither a unigram nor a BPE model"):
        write_tokenizer(words, tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(SquamataError, match="pip install sentencepiece protobuf"):
        write_tokenizer(path, tmp_path)


def test_which_file_is_the_model(tmp_path: Path) -> None:
    assert find_sentencepiece_model(tmp_path) is None
    (tmp_path / "mt_nlg_plus_multilingual_256k.model").touch()
    assert find_sentencepiece_model(tmp_path) == tmp_path / "mt_nlg_plus_multilingual_256k.model"
    with pytest.raises(SquamataError, match="'squamata convert' makes a folder with one"):
        Tokenizer.read(tmp_path)
    (tmp_path / "other.model").touch()
    assert find_sentencepiece_model(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    assert find_sentencepiece_model(tmp_path) == tmp_path / "tokenizer.model"
