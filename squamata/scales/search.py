"""Search over strategies and their parameters, one choice a site."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from squamata.errors import SquamataError, nearest
from squamata.spec.quant import ScaleSpec

Over = list[ScaleSpec] | dict[str, list[Any]]


def expanded(
    candidates: Sequence[ScaleSpec] | None, over: Over | None, known: Mapping[str, Sequence[str]]
) -> list[ScaleSpec]:
    """Every strategy with every combination of the values that ``over`` gives to parameters it has and does not set.

    ``over`` may be the list of strategies itself instead. ``known``: the parameters of every strategy. SquamataError
    for nothing to search, and for values of a parameter that none of the strategies has.
    """
    if candidates is not None and isinstance(over, list):
        raise SquamataError("two lists of strategies: give parameters to 'over', {alpha: [...]}, or leave one list out")
    strategies = over if isinstance(over, list) else candidates
    grid = over if isinstance(over, dict) else {}
    if not strategies:
        problem = "nothing to search 'over', strategies are missing"
        raise SquamataError(f"{problem}: {{search: [percentile, mse], over: {{alpha: [0.999, 0.9999]}}}}")
    free = [
        [key for key in grid if key in known.get(one.strategy, ()) and key not in one.parameters] for one in strategies
    ]
    taken = {key for keys in free for key in keys}
    for key, values in grid.items():
        if key not in taken:
            possible = {name for one in strategies for name in known.get(one.strategy, ())}
            raise SquamataError(
                f"over: none of the strategies takes '{key}'{nearest(key, possible) if possible else ''}"
            )
        if not values:
            raise SquamataError(f"over: '{key}' has no values to try")
    found = []
    for one, keys in zip(strategies, free, strict=True):
        for chosen in itertools.product(*(grid[key] for key in keys)):
            parameters = one.parameters | dict(zip(keys, chosen, strict=True))
            found.append(ScaleSpec(strategy=one.strategy, parameters=parameters))
    return found
