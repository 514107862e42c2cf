import pytest
from fakes import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from squamata.errors import SquamataError
from squamata.evaluate.windows import Window, batches, cut

texts = st.lists(st.text(alphabet="abc\n é漢", max_size=40), min_size=1, max_size=6)


@given(texts, st.integers(1, 50), st.one_of(st.none(), st.integers(2, 100)), st.booleans())
def test_every_token_is_predicted_exactly_once(documents, window, max_tokens, begins):
    tokenizer = ByteTokenizer(begin_id=0 if begins else None)
    streams = [tokenizer.encode(document) for document in documents]
    expected = [(number, at, ids[at]) for number, ids in enumerate(streams) for at in range(1, len(ids))][:max_tokens]
    if len(expected) < 2:
        with pytest.raises(SquamataError, match="shorter than 2 tokens"):
            cut(documents, tokenizer, window, max_tokens)
        return
    corpus = cut(documents, tokenizer, window, max_tokens)
    position: dict[int, int] = {}
    predicted = []
    for piece in corpus.windows:
        start = position.get(piece.document, 0)
        assert piece.ids[0] == streams[piece.document][start]  # the token before is the context
        assert 1 <= piece.predicted <= window
        predicted += [(piece.document, start + k, piece.ids[k]) for k in range(1, len(piece.ids))]
        position[piece.document] = start + piece.predicted
    assert predicted == expected
    assert corpus.tokens == len(expected)
    assert corpus.documents == len({document for document, _, _ in expected})


@given(texts, st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_batches_hold_every_window_once_padded_only_at_the_end(documents, length, rows, mixed):
    windows = [Window(k, (0, *range(1, 2 + len(text) % length))) for k, text in enumerate(documents)]
    seen = []
    for batch in batches(windows, lambda _: rows, mixed_lengths=mixed):
        assert len(batch.windows) <= rows
        assert mixed or batch.mask.all()
        for row, place in enumerate(batch.windows):
            size = windows[place].predicted
            assert batch.mask[row].tolist() == [True] * size + [False] * (batch.ids.shape[1] - size)
            assert tuple(batch.ids[row, :size].tolist()) == windows[place].ids[:-1]
            assert tuple(batch.targets[row, :size].tolist()) == windows[place].ids[1:]
        seen += batch.windows
    assert sorted(seen) == list(range(len(windows)))


def test_rows_may_depend_on_the_length():
    windows = [Window(0, (0,) * 9), Window(1, (0,) * 9), Window(2, (0,) * 3), Window(3, (0,) * 3)]
    groups = [batch.windows for batch in batches(windows, lambda length: 1 if length == 8 else 2, mixed_lengths=True)]
    assert groups == [(0,), (1,), (2, 3)]


@pytest.mark.parametrize(
    ("document", "max_tokens", "begin_id", "spelled"),
    [("aé漢", None, 0, 6), ("aé漢", 3, 0, 3), ("aé漢", 5, 0, 3), ("aé漢", None, None, 5), ("abc漢", 2, None, 2)],
)
def test_bytes_are_those_of_the_predicted_text(document, max_tokens, begin_id, spelled):
    assert cut([document], ByteTokenizer(begin_id), 4, max_tokens).text_bytes == spelled


@pytest.mark.parametrize(("window", "max_tokens"), [(0, None), (-1, None), (8, 1), (8, 0)])
def test_bad_sizes(window, max_tokens):
    with pytest.raises(SquamataError, match="at least"):
        cut(["abc"], ByteTokenizer(), window, max_tokens)
