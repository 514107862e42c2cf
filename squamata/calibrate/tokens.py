"""Calibration data: documents sampled with a seed, and a record exact enough to repeat it."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from squamata.errors import SquamataError
from squamata.spec.recipe import Calibration
from squamata.text import read_fingerprinted

CHARACTERS_A_TOKEN = 40  # a document is cut to this many a token before it is tokenised: some are megabytes long


class Encoder(Protocol):
    """What calibration needs of a tokenizer."""

    def encode(self, text: str, begin: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of every sample, each starting with the document-start token, and where they came from.

    ``sha256``: of the text file; ``tokenizer_sha256``: of tokenizer.json, None if unknown.
    """

    sequences: tuple[tuple[int, ...], ...]
    sha256: str
    settings: Calibration
    seed: int
    tokenizer_sha256: str | None = None

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def batches(self) -> list[Tensor]:
        """int64 (B, L): one at a time in the order drawn; or shortest first, equal lengths in the order drawn, at most
        ``settings.batch`` at once.
        """
        if self.settings.batch == 1:
            return [torch.tensor([sequence]) for sequence in self.sequences]
        batches = []
        for _, group in itertools.groupby(sorted(self.sequences, key=len), key=len):
            batches += [torch.tensor(rows) for rows in _batched(group, self.settings.batch)]
        return batches

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers: counts, settings, and fingerprints of file, tokenizer and tokens drawn."""
        drawn = hashlib.sha256(repr(self.sequences).encode()).hexdigest()
        return {
            "samples": len(self.sequences),
            "tokens": self.tokens,
            "sha256": self.sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "tokens_sha256": drawn,
            "seed": self.seed,
            "settings": self.settings.model_dump(),
        }


def joined(batches: Sequence[Tensor], tokens: int, unequal: bool) -> tuple[list[Tensor], list[list[int] | None]]:
    """Neighbours as one batch (B, L) of at most so many tokens; a larger batch stays as it is.

    Those of one length, or with ``unequal`` any, filled up with zeros to the longest. Also the tokens of every
    sequence of each batch, None where all are as long as the batch.
    """
    groups: list[list[Tensor]] = []
    for ids in batches:
        together = [*(groups[-1] if groups else []), ids]
        longest = max(one.shape[1] for one in together)
        alike = unequal or all(one.shape[1] == longest for one in together)
        if groups and alike and longest * sum(map(len, together)) <= tokens:
            groups[-1] = together
        else:
            groups.append([ids])
    found, lengths = [], []
    for group in groups:
        own = [ids.shape[1] for ids in group for _ in ids]
        found.append(torch.cat([pad(ids, (0, max(own) - ids.shape[1])) for ids in group]))
        lengths.append(None if len(set(own)) == 1 else own)
    return found, lengths


def _batched(items: Iterator[tuple[int, ...]], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    while batch := tuple(itertools.islice(items, size)):
        yield batch


def sample(
    path: Path, tokenizer: Encoder, settings: Calibration, seed: int, tokenizer_sha256: str | None = None
) -> CalibrationSet:
    """Draw ``settings.samples`` documents of at most ``settings.length`` tokens each.

    With fewer documents than samples (a .txt file is one document) consecutive pieces of them are drawn instead.
    SquamataError if the file cannot be read or holds no text.
    """
    documents, sha256 = read_fingerprinted(path)
    if len(documents) >= settings.samples:
        order = list(range(len(documents)))
        if settings.order == "shuffled":
            random.Random(seed).shuffle(order)
        pieces: Iterator[list[int]] = (
            tokenizer.encode(documents[number][: settings.length * CHARACTERS_A_TOKEN])[: settings.length]
            for number in order
        )
    else:
        pieces = iter(_shuffled_pieces(documents, tokenizer, settings, seed))
    sequences = tuple(itertools.islice((tuple(piece) for piece in pieces if len(piece) > 1), settings.samples))
    if not sequences:
        raise SquamataError(f"{path}: holds no document of at least two tokens to calibrate with")
    return CalibrationSet(sequences, sha256, settings, seed, tokenizer_sha256)


def _shuffled_pieces(documents: list[str], tokenizer: Encoder, settings: Calibration, seed: int) -> list[list[int]]:
    pieces = []
    begin = tokenizer.encode("")  # the document-start token, if the tokenizer has one
    step = settings.length - len(begin)
    for document in documents:
        ids = tokenizer.encode(document, begin=False)
        pieces += [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    if settings.order == "shuffled":
        random.Random(seed).shuffle(pieces)
    return pieces
