"""The verbs as Python functions: the names and defaults of the command line, and what they say of wrong arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny_folder

import squamata
from squamata.cli import convert, evaluate, generate, quantize
from squamata.errors import SquamataError
from squamata.run import SamplingOptions
from squamata.save.write import parts_left

OF_THE_COMMAND_LINE = {"json_file", "lambada", "tasks", "data", "limit", "by_position", "prompt"}


@pytest.mark.parametrize(
    ("command", "function", "others"),
    [
        (quantize.quantize, squamata.quantize, set()),
        (convert.convert, squamata.convert, set()),
        (evaluate.evaluate, squamata.evaluate, {"text", "device"}),  # of a file, or a list; of models that are loaded
        (generate.generate, squamata.generate, set()),
    ],
)
def test_a_verb_has_the_names_and_defaults_of_its_function(
    command: Callable[..., Any], function: Callable[..., Any], others: set[str]
) -> None:
    theirs = inspect.signature(command).parameters
    ours = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    if function is squamata.generate:
        ours |= {name: field.default for name, field in SamplingOptions.__dataclass_fields__.items()}
        others = {"stop"}  # a tuple; the command line has none, or several
    for name, parameter in theirs.items():
        if name not in OF_THE_COMMAND_LINE | others:
            default = getattr(parameter.default, "value", parameter.default)
            assert name in ours and ours[name] == default, name


@pytest.mark.parametrize("verb", ["quantize", "load", "evaluate", "generate", "convert"])
def test_a_docstring_names_every_argument(verb: str) -> None:
    function = getattr(squamata, verb)
    said = inspect.getdoc(function) or ""
    told_by_name = {"model", "options", "against", "recipe", "out"}
    unsaid = [name for name in inspect.signature(function).parameters if name not in said and name not in told_by_name]
    assert not [name for name in unsaid if name not in ("force", "progress", "seed")], unsaid


def test_generate_takes_a_path_as_well(bundled_folder: Path) -> None:
    loaded = squamata.load("bundled")
    expected = squamata.generate(loaded, "The snake", max_new_tokens=3)
    assert squamata.generate("bundled", "The snake", max_new_tokens=3).ids == expected.ids
    assert squamata.generate(bundled_folder, "The snake", max_new_tokens=3).ids == expected.ids
    assert "mamba2, 8 layers, d_model 256, recipe float" in repr(loaded)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 2]], "not a list"),
        ("text", "not a str"),
        (torch.tensor([1, 2]), r"not of shape \(2,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.ones(1, 2), r"not torch\.float32"),
        (torch.tensor([[3, -1]]), "token id -1 is outside"),  # which would be the last row of the embedding
        (torch.tensor([[3, 8192]]), "token id 8192 is outside"),
    ],
)
def test_ids_that_are_none_are_refused(ids: Any, said: str) -> None:
    with pytest.raises(SquamataError, match=said):
        squamata.load("bundled")(ids)


def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    for call in (lambda: squamata.load(folder), lambda: squamata.quantize("bundled", "w4a16", folder / "out")):
        with pytest.raises(SquamataError, match="not UTF-8"):
            call()
    assert not list(folder.iterdir())


def test_the_bundled_model_brings_its_calibration(tmp_path: Path) -> None:
    done = squamata.quantize("bundled", "w8a8", tmp_path / "out", samples=2, length=16)
    assert done.calibration["tokens"] == 32


def test_a_run_goes_on_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled_calibration: Path
) -> None:
    """Whatever the source is called from there, and through a link: nobody has touched it."""
    write_tiny_folder(tmp_path / "source", "mamba1")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 2, "length": 8, "resume": True}

    def interrupt(step: int, total: int) -> None:
        raise KeyboardInterrupt

    names: tuple[str | Path, ...] = ("source", tmp_path / "source", "../link", "../source/")
    for made, name in enumerate(names):
        (tmp_path / "below").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / ("below" if str(name).startswith("..") else "."))
        with pytest.raises(KeyboardInterrupt):
            squamata.quantize(name, "w8a8", tmp_path / "out", progress=interrupt, **drawn)
        assert parts_left(tmp_path / "out") == made + 1
