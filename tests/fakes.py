"""A tiny language model whose every number is known in closed form, and a tokenizer of single bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

BEGIN = 0  # also ends a text
VOCABULARY = 257


class ByteTokenizer:
    """Id 0 begins and ends a text, id b + 1 is the byte b: any text, one token a UTF-8 byte."""

    eos_id = BEGIN

    def __init__(self, begin_id: int | None = BEGIN) -> None:
        self.begin_id = begin_id

    def encode(self, text: str, begin: bool = True) -> list[int]:
        start = [self.begin_id] if begin and self.begin_id is not None else []
        return start + [byte + 1 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token - 1 for token in ids if token != BEGIN).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream()


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(b"" if token == BEGIN else bytes([token - 1]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


@dataclass
class FakeCache:
    previous: torch.Tensor  # (B,) the token before the last one taken in, -1 at the start
    taken_in: list[list[int]] = field(default_factory=list)  # by row, for tests to look at


class TableModel:
    """logits[t] = table[id_t] + memory * table[id_(t-1)], the second term only from a state that has seen a token.

    With ``memory`` 0 it is a bigram model; otherwise parallel and recurrent agree only if the state is kept and reset
    where it should be. ``shapes`` records every forward pass.
    """

    def __init__(self, table: torch.Tensor, memory: float = 0.0, tokenizer: ByteTokenizer | None = None) -> None:
        self.table = table  # float (V, V): row = the token before, column = the next
        self.memory = memory
        self.tokenizer: ByteTokenizer | None = tokenizer or ByteTokenizer()
        self.config = SimpleNamespace(vocab_size=len(table))
        self.shapes: list[tuple[int, ...]] = []

    def new_cache(self, batch: int = 1) -> FakeCache:
        return FakeCache(torch.full((batch,), -1), [[] for _ in range(batch)])

    def forward(self, ids: torch.Tensor, cache: FakeCache, last_only: bool = False) -> torch.Tensor:
        self.shapes.append(tuple(ids.shape))
        before = torch.cat([cache.previous[:, None], ids[:, :-1]], 1)  # (B, L)
        remembered = torch.where(before[..., None] >= 0, self.table[before.clamp(min=0)], 0.0)
        logits = self.table[ids] + self.memory * remembered
        cache.previous = ids[:, -1]
        for row, tokens in zip(cache.taken_in, ids.tolist(), strict=True):
            row.extend(tokens)
        return logits[:, -1:] if last_only else logits

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.forward(ids, self.new_cache(len(ids)))

    def step(self, ids: torch.Tensor, cache: FakeCache) -> torch.Tensor:
        return self.forward(ids[:, None], cache)[:, 0]


def random_table(seed: int, spread: float = 2.0) -> torch.Tensor:
    """Random logits float64 (V, V)."""
    return spread * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)).double()


def random_model(seed: int = 0, memory: float = 0.0, spread: float = 2.0) -> TableModel:
    return TableModel(random_table(seed, spread), memory)


def chain_model(path: str) -> TableModel:
    """A bigram model that greedily follows each byte of ``path`` by the next, and ends the text after the last.

    A byte that comes twice is followed as at its last place.
    """
    table = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    tokens = [byte + 1 for byte in path.encode()]
    for token, successor in zip(tokens, [*tokens[1:], BEGIN], strict=True):
        table[token] = 0.0
        table[token, successor] = 10.0
    return TableModel(table)
