"""Parameters that a recipe gives to a named method, checked against the method's own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from squamata.errors import SquamataError, nearest
from squamata.spec.yaml_file import said


def checked_parameters(method: Callable[..., Any], given: Mapping[str, Any], own: int, where: str) -> dict[str, Any]:
    """A recipe's parameters in the types that ``method`` annotates; its first ``own`` arguments are not a recipe's.

    SquamataError, one line that starts with ``where``, for one that is unknown, of the wrong type or missing.
    """
    types = get_type_hints(method, include_extras=True)
    known = dict(list(inspect.signature(method).parameters.items())[own:])
    checked = {}
    for key, value in given.items():
        if key not in known:
            raise SquamataError(f"{where}: no parameter '{key}'{nearest(key, known) if known else ', it takes none'}")
        try:
            checked[key] = TypeAdapter(types.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise SquamataError(f"{where}: {key}: {said(error.errors()[0])}") from None
    for key, parameter in known.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise SquamataError(f"{where}: parameter '{key}' is missing")
    return checked
