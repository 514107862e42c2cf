"""Where the names of points go in a picture: beside them, never over one another; what finds no room is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1100, 310  # pixels of a picture's plane, about: it is as wide as the page
LETTER, LINE = 6.0, 14.0  # pixels of the words' size
APART = 7.0  # pixels between a point and its name


@dataclass(frozen=True)
class Place:
    """Which side of a point its name is on, in plotly's words."""

    xanchor: str
    yanchor: str

    @property
    def shift(self) -> dict[str, float]:
        right, below = self.xanchor == "left", self.yanchor == "top"
        return {"xshift": APART if right else -APART, "yshift": -APART / 2 if below else APART / 2}


PLACES = (Place("left", "top"), Place("left", "bottom"), Place("right", "top"), Place("right", "bottom"))

Box = tuple[float, float, float, float]  # left, right, low, high


def place_names(points: Sequence[tuple[float, float]], named: Sequence[tuple[int, str]]) -> list[Place | None]:
    """For every name (the place of its point among all, and its words) a side on which it covers neither another name
    nor leaves the picture; None where there is none. Earlier names come first."""
    drawn = pixels(points)
    taken: list[Box] = []
    found: list[Place | None] = []
    for number, words in named:
        boxes = ((place, box_of(drawn[number], words, place)) for place in PLACES)
        place, box = next(((place, box) for place, box in boxes if _free(box, taken)), (None, None))
        if box is not None:
            taken.append(box)
        found.append(place)
    return found


def pixels(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where plotly draws points, about: from the 5th to the 95th hundredth of either axis."""
    low, high = ([end(axis) for axis in zip(*points, strict=True)] for end in (min, max))
    spans = [(most - least) or 1.0 for least, most in zip(low, high, strict=True)]
    return [
        (
            WIDTH * (0.05 + 0.9 * (x - low[0]) / spans[0]),
            HEIGHT * (0.05 + 0.9 * (y - low[1]) / spans[1]),
        )
        for x, y in points
    ]


def box_of(point: tuple[float, float], words: str, place: Place) -> Box:
    """The pixels that a name on this side of a point covers."""
    (x, y), wide = point, LETTER * len(words)
    left = x + APART if place.xanchor == "left" else x - APART - wide
    low = y - APART / 2 - LINE if place.yanchor == "top" else y + APART / 2
    return left, left + wide, low, low + LINE


def _free(box: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= 0 and box[1] <= WIDTH + 20
    apart = (box[1] <= other[0] or other[1] <= box[0] or box[3] <= other[2] or other[3] <= box[2] for other in taken)
    return inside and all(apart)


def logarithmic(values: Sequence[float]) -> dict[str, object]:
    """A logarithmic axis of these values, whose ticks say whole numbers: all, 1-2-5 or powers of ten, as fit."""
    positive = [value for value in values if value > 0]
    decades = math.log10(max(positive) / min(positive)) if positive else 0.0
    steps: str | int = "D1" if decades < 0.8 else "D2" if decades < 3 else 1
    return {"type": "log", "tickformat": "~g", "dtick": steps}
