"""YAML files that users write: read, and what is wrong with one said in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from squamata.errors import SquamataError

SUFFIXES = (".yaml", ".yml")

MERGED = "tag:yaml.org,2002:merge"  # of the key <<, which may come several times
KINDS = {  # of pydantic's problems -> what the value must be, in a YAML writer's words
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}

Place = tuple[str | int, ...]  # where in a mapping: ("rules", 3, "spec", "bits")


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML would forget the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGED:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"'{key.value}' twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """The content of a file; ``what`` it should be, for a message: ``recipe``."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
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
    place = (*inside, *(part for part in problem["loc"] if "[" not in str(part)))  # a form of a union is no place
    where = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'{hint(place)}"
    return f"{where}: {said(problem)}" if where else said(problem)


def said(problem: Mapping[str, Any]) -> str:
    """The message of one of pydantic's problems, in our words, with the value."""
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in KINDS:
        return f"must be {KINDS[problem['type']]}, not {problem['input']!r:.60}"
    if problem["type"] == "too_short":
        return "is empty: give at least one"
    message = problem["msg"].removeprefix("Value error, ")
    if not message.startswith("Input should "):
        return message
    return f"{message.replace('Input should ', 'must ', 1)}, not {problem['input']!r:.60}"
