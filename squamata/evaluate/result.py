"""What every judgement gives: a frozen dataclass whose figures can be written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Result:
    """Base of the result dataclasses. Fields with ``repr=False`` are raw material, not figures."""

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self) if entry.repr}


def _plain(value: Any) -> Any:
    """A tuple of results as a list of their figures; everything else as it is."""
    if isinstance(value, tuple) and value and all(isinstance(each, Result) for each in value):
        return [each.to_dict() for each in value]
    return value
