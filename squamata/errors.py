"""The one kind of error a user can cause: a line that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class SquamataError(Exception):
    """Raised for anything the user can put right; the command line prints it and exits with status 2."""


@contextmanager
def about(subject: str) -> Iterator[None]:
    """A SquamataError raised within the block begins with ``subject: ``."""
    try:
        yield
    except SquamataError as error:
        raise SquamataError(f"{subject}: {error}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known word, or the list of known words."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"
