"""YAML files that users write: read, and what is wrong with one said in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from squamata.errors import SquamataError

SUFFIXES = (".yaml", ".yml")

Place = tuple[str | int, ...]  # where in a mapping: ("rules", 3, "spec", "bits")


def read_yaml(path: Path, what: str) -> Any:
    """The content of a file; ``what`` it should be, for a message: ``recipe``."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SquamataError(f"{path}: no such {what} file") from None
    except IsADirectoryError:
        raise SquamataError(f"{path} is a folder: give the YAML file of a {what}") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SquamataError(f"{path}: not a readable YAML file ({error.problem or error.context}{where})") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SquamataError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]})") from None


def first_problem(error: ValidationError, hint: Callable[[Place], str], inside: Place = ()) -> str:
    """One line for what pydantic found, an unknown key before all else, with a hint at what was meant there.

    ``inside``: where what was checked is in the mapping.
    """
    problems = error.errors()
    problem = next((some for some in problems if some["type"] == "extra_forbidden"), problems[0])
    place = (*inside, *problem["loc"])
    where = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'{hint(place)}"
    return f"{where}: {said(problem)}" if where else said(problem)


def said(problem: Mapping[str, Any]) -> str:
    """The message of one of pydantic's problems, in our words, with the value."""
    if problem["type"] == "missing":
        return "is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not message.startswith("Input should "):
        return message
    return f"{message.replace('Input should ', 'must ', 1)}, not {problem['input']!r:.60}"
