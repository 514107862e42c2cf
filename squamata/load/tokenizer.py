"""Tokenizer: text to ids and back, over the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from squamata.errors import SquamataError
from squamata.load.sentencepiece import find_sentencepiece_model
from squamata.load.tensor_files import read_json
from squamata.models.config import ModelConfig

_USUAL_ENDS = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer:
    """A ``tokenizer.json`` with its document-start and end-of-text tokens.

    ``begin_id``: put before a document (the tokenizer's bos token, or else its eos token, as GPT-NeoX's
    ``<|endoftext|>``). ``eos_id``: ends a text. Either is None if the tokenizer has no such token.
    ``vocab_size``: largest id plus one.
    """

    def __init__(self, folder: Path, inner: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
        self._inner = inner
        self._inner.no_truncation()
        self._inner.no_padding()
        self.folder = folder
        ids = inner.get_vocab(with_added_tokens=True)
        usual = next((word for word in _USUAL_ENDS if word in ids), None)
        self.eos_id = ids.get(special.get("eos_token", usual or ""))
        self.begin_id = ids.get(special.get("bos_token", ""), self.eos_id)
        self.vocab_size = max(ids.values(), default=-1) + 1

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and the names of its special tokens; SquamataError if it is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file() and find_sentencepiece_model(folder):
            raise SquamataError(
                f"{folder}: has a SentencePiece model but no tokenizer.json; 'squamata convert' makes a folder with one"
            )
        if not path.is_file():
            raise SquamataError(
                f"{folder}: no tokenizer.json; copy the tokenizer the model was trained with into this folder "
                f"(EleutherAI/gpt-neox-20b for the published state-spaces models)"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise SquamataError(f"{path}: not a readable tokenizer ({str(error).splitlines()[0]})") from None
        return cls(folder, inner, _special_tokens(folder))

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Ids of ``text``; ``begin`` puts the document-start token before them. SquamataError for what has no UTF-8."""
        try:
            return self._begin(begin) + self._inner.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise SquamataError(
                "the text is not Unicode (half a surrogate pair, as of bytes that are not UTF-8)"
            ) from None

    def encode_all(self, texts: Sequence[str], begin: bool = True) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._begin(begin) + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self._inner)

    def _begin(self, begin: bool) -> list[int]:
        return [self.begin_id] if begin and self.begin_id is not None else []


class StreamDecoder:
    """Text of ids that come one at a time: ``push`` returns what is complete, ``finish`` the broken rest."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes: empty while a character's bytes are still incomplete."""
        text = self._stream.step(self._inner, token)
        self._held = [] if text else [*self._held, token]
        return text or ""

    def finish(self) -> str:
        """What was held back because its last bytes never came, with U+FFFD in their place."""
        return self._inner.decode(self._held, skip_special_tokens=True) if self._held else ""


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role -> token (``eos_token``, ``bos_token``) of special_tokens_map.json, then tokenizer_config.json."""
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            special |= {role: _token(content[role]) for role in ("eos_token", "bos_token") if content.get(role)}
    return special


def _token(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer that can produce an id the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise SquamataError(
            f"{tokenizer.folder / 'tokenizer.json'}: has ids up to {tokenizer.vocab_size - 1}, but the model's "
            f"vocabulary ends at {config.vocab_size - 1}; this is the tokenizer of another model"
        )
