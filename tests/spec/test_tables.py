"""Formats of embedding and head beside the recipe's, and layers counted from the end."""

from __future__ import annotations

import pytest
from tiny import recipe_of

from squamata.errors import SquamataError
from squamata.spec.recipe import TABLE_FORMATS, Recipe

BLOCKS = ("mamba2",) * 6


@pytest.mark.parametrize("embedding", [None, *TABLE_FORMATS])
@pytest.mark.parametrize("head", [None, *TABLE_FORMATS])
@pytest.mark.parametrize("name", ["float", "quamba-w8a8", "quamba-w4a16"])
def test_the_tables_are_independent_of_the_rest(name: str, embedding: str | None, head: str | None) -> None:
    plain, changed = Recipe.read(name), Recipe.read(name).with_tables(embedding, head)
    before, after = plain.resolve(BLOCKS), changed.resolve(BLOCKS)
    bits = {"float": None, "int8": 8, "int4": 4}
    for table, wanted in (("embedding.weight", embedding), ("head.weight", head)):
        spec = after.get(table)
        assert (None if spec is None else spec.bits) == bits[wanted] if wanted else spec == before.get(table)
    layers = {site: spec for site, spec in before.items() if site.startswith("layers.")}
    assert {site: spec for site, spec in after.items() if site.startswith("layers.")} == layers
    assert ("head.in" in after) == ("head.in" in before and head != "float")


def test_a_wrong_format_is_named() -> None:
    with pytest.raises(SquamataError, match=r"no head format 'int44' \(did you mean 'int4'"):
        Recipe.read("float").with_tables(head="int44")


def test_layers_from_the_end() -> None:
    rules = [{"site": "*.mixer.in", "spec": {"bits": 8}}]
    rules.append({"site": "*.mixer.in", "spec": "float", "layers": [0, -1, -2]})  # type: ignore[dict-item]
    assert sorted(recipe_of(*rules).resolve(BLOCKS)) == [f"layers.{layer}.mixer.in" for layer in (1, 2, 3)]
    with pytest.raises(SquamataError, match="speaks of layer -7"):
        recipe_of({"site": "*.mixer.in", "spec": {"bits": 8}, "layers": [-7]}).resolve(BLOCKS)
