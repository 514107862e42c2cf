"""A SentencePiece model (``tokenizer.model``) as a ``tokenizer.json`` that gives the same ids.

The model is taken apart by the ``sentencepiece`` package, put together again from the parts of ``tokenizers``, and
believed only if both give the same ids for ``PROBES``. As in every ``tokenizer.json``, a control token that is written
out in a text (``</s>``) becomes that token, which SentencePiece itself would spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from squamata.errors import SquamataError

UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4
_SPACE = "▁"

PROBES = (
    "The snake (Squamata) shed its skin.",
    "  leading, trailing and   inner   spaces  ",
    "line one\nline two\r\n\n\ttab",
    "def f(x: int) -> int:\n    return x**2 + 1  # comment",
    "naïve café, œuvre, Straße, Å, ﬁ ligature, ½, ①",
    "日本語の文章と漢字、ひらがな。中文句子。한국어 문장",
    "Привет мир! Γειά σου Κόσμε. שלום עולם مرحبا",
    "emoji 🐍🧪👩‍🔬 and rare 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b zero width",
    "1234567890 3.14159 1,000,000 2026-11-22",
    "[MASK] <|endoftext|>x a<b>c </div>",
    "aaaaaaaaaaaaaaaaaaaaaaaa zzzzzzzz qqq!!!???...",
    "",
    " ",
    "x",
)


def find_sentencepiece_model(folder: Path) -> Path | None:
    """The SentencePiece model of a folder: ``tokenizer.model``, or the only file that ends so."""
    found = sorted(folder.glob("*.model"))
    named = [path for path in found if path.name == "tokenizer.model"]
    return named[0] if named else (found[0] if len(found) == 1 else None)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for a SentencePiece model into a folder.

    SquamataError if the package that reads it is not installed, or its ids would not be the same.
    """
    processor, proto = _read(path)
    tokenizer = _assemble(proto, path)
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED][:3]
    for text in (*PROBES, *(probe for symbol in symbols for probe in (f"a {symbol} b{symbol}c", f"x {symbol}"))):
        ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ours != theirs:
            raise SquamataError(
                f"{path}: cannot be said exactly as a tokenizer.json ({text[:20]!r} gives other ids); put a "
                f"tokenizer.json of this model into the folder"
            )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    named = {role: processor.id_to_piece(number) for role, number in special.items() if number >= 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=1) + "\n")


def _read(path: Path) -> tuple[Any, Any]:
    """The package's processor, and the model as parsed data."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise SquamataError(
            f"{path}: reading a SentencePiece model needs two more packages: pip install sentencepiece protobuf"
        ) from None
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
        return sentencepiece.SentencePieceProcessor(model_file=str(path)), proto
    except Exception as error:  # protobuf and sentencepiece have no common base, and raise RuntimeError among others
        raise SquamataError(f"{path}: not a readable SentencePiece model ({str(error).splitlines()[0]})") from None


def _assemble(proto: Any, path: Path) -> tokenizers.Tokenizer:
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if trained.model_type == UNIGRAM:
        model: Any = models.Unigram(scores, trained.unk_id, trained.byte_fallback)
    elif trained.model_type == BPE:
        vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
        merges = list(_merges(dict(scores)))
        model = models.BPE(
            vocabulary, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback
        )
    else:
        raise SquamataError(f"{path}: is neither a unigram nor a BPE model, which are supported")
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if normal.add_dummy_prefix:  # symbols are found in the normalized text, and normalized themselves: no prefix there
        alone = "|".join(map(re.escape, symbols))
        steps.append(
            normalizers.Replace(Regex(f"\\A(?!(?:{alone})\\z)(?=.)"), _SPACE)
            if symbols
            else normalizers.Prepend(_SPACE)
        )
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            *([decoders.ByteFallback()] if trained.byte_fallback else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == CONTROL])
    tokenizer.add_tokens([AddedToken(symbol, normalized=True) for symbol in symbols])
    return tokenizer


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a piece, best score first: SentencePiece merges whichever pair makes the best piece."""
    order = {piece: number for number, piece in enumerate(scores)}
    for piece in sorted(scores, key=lambda piece: (-scores[piece], order[piece])):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in cuts if left in scores and right in scores]
        yield from sorted(known, key=lambda pair: (order[pair[0]], order[pair[1]]))
