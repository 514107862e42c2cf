"""Losses and divergence by the distance from a window's start, against sums over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import random_model

from squamata.evaluate import evaluate
from squamata.evaluate.positions import BLOCK, cell_places
from squamata.evaluate.uncertainty import ratio_interval

LONG = [("word " * 300)[: 40 * number + 7] for number in (1, 5, 9, 30)] + ["a b"]  # 47 to 1207 tokens, one a byte


def per_token(document: str, model, against, window: int):  # type: ignore[no-untyped-def]
    """(window of the document, place in it, nats, kl) of every predicted token, by the definition."""
    ids = model.tokenizer.encode(document)
    for at in range(1, len(ids)):
        place = (at - 1) % window
        rows = []
        for each in (model, against):
            logits = each.table[ids[at - 1]] + (each.memory * each.table[ids[at - 2]] if place else 0)
            rows.append(logits - logits.exp().sum().log())
        log_q, log_p = rows
        yield (at - 1) // window, place, -float(log_q[ids[at]]), float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
@pytest.mark.parametrize("window", [2048, 300, 128, 50])
def test_spans_are_sums_over_their_tokens(mode: str, window: int) -> None:
    model, against = random_model(1, memory=0.3), random_model(1, memory=0.0)
    found = evaluate(model, LONG, against, window=window, mode=mode, batch=2)
    tokens = [token for document in LONG for token in per_token(document, model, against, window)]
    longest = max(place for _, place, _, _ in tokens) + 1
    edges = [0] + [BLOCK * 2**power for power in range(12) if BLOCK * 2**power < longest]
    assert [span.start for span in found.by_position] == edges
    assert [span.stop for span in found.by_position] == [*edges[1:], longest]
    for span in found.by_position:
        inside = [(nats, kl) for _, place, nats, kl in tokens if span.start <= place < span.stop]
        assert span.tokens == len(inside)
        np.testing.assert_allclose((span.nats_per_token, span.kl), np.mean(inside, axis=0), rtol=1e-10)
    assert sum(span.tokens for span in found.by_position) == found.tokens


def test_intervals_are_over_windows_where_there_are_six_and_over_blocks_else() -> None:
    model = random_model(2, memory=0.2)
    documents = [("the snake " * 60)[start : start + 150 + start] for start in range(7)]  # 150 to 156 tokens and more
    found = evaluate(model, documents, window=2048)
    sums = [list(per_token(document, model, model, 2048)) for document in documents]
    nats = np.array([sum(nats for _, place, nats, _ in tokens if place < BLOCK) for tokens in sums])
    assert found.by_position[0].nats_ci == pytest.approx(ratio_interval(nats, np.full(7, float(BLOCK))))
    one = evaluate(model, documents[:1], window=2048)
    assert [span.nats_ci for span in one.by_position] == [None, None]  # a block each says nothing of the spread


def test_cells_are_numbered_window_by_window() -> None:
    first, window, block = cell_places([1, 128, 129, 400])
    assert first.tolist() == [0, 1, 2, 4]
    assert window.tolist() == [0, 1, 2, 2, 3, 3, 3, 3] and block.tolist() == [0, 0, 0, 1, 0, 1, 2, 3]
