from hypothesis import given
from hypothesis import strategies as st

from squamata.run.stops import StopFilter

letters = st.text(alphabet="ab", max_size=12)


def first_stop(text, stops):
    """By the definition: read letter by letter until some stop string is complete; its text, or all."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(letters, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_letter_by_letter_nothing_of_a_stop_string_gets_out(text, stops):
    before, stopped = first_stop(text, stops)
    guard, out = StopFilter(stops), ""
    for letter in text:
        out += guard.push(letter)
        assert before.startswith(out)
        if guard.stopped:
            break
    assert guard.stopped == stopped
    assert out + guard.finish() == before


@given(st.lists(letters, max_size=5), st.text(alphabet="ab", min_size=1, max_size=4))
def test_pieces_of_any_size_with_one_stop_string(pieces, stop):
    text = "".join(pieces)
    guard, out = StopFilter([stop]), ""
    for piece in pieces:
        out += guard.push(piece)
        if guard.stopped:
            break
    assert out + guard.finish() == text.split(stop)[0]


def test_only_what_may_begin_a_stop_string_is_held():
    guard = StopFilter(["\n\nUser:"])
    assert guard.push("one\n") == "one"
    assert guard.push("two") == "\ntwo"
    assert guard.push("\n\nUs") == ""
    assert guard.push("ed\n\nUser: no") == "\n\nUsed"
    assert guard.stopped and guard.finish() == ""
