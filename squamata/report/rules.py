"""Recipes changed as data: specs of single sites as rules, and what an override does to a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from squamata.errors import SquamataError, nearest
from squamata.spec.quant import Data, QuantSpec
from squamata.spec.sites import BLOCKS, Kind, all_sites
from squamata.spec.yaml_file import first_problem


class Change(Data):
    """Other values for some fields of whatever spec a recipe gives to the sites of a glob."""

    site: str
    set: dict[str, Any]
    layers: tuple[int, ...] | None = None
    kind: Kind | None = None


def rules_for(specs: Mapping[str, QuantSpec | None], layers: int) -> list[dict[str, Any]]:
    """Rules, as plain data, that give every site named (``layers.3.mixer.u``) its spec, None being float.

    Layers that represent a site alike share a rule, which has a layer list unless these are all ``layers``.
    """
    together: dict[tuple[str, str], list[int]] = {}
    for site, spec in specs.items():
        form = "float" if spec is None else json.dumps(spec.model_dump(mode="json", exclude_defaults=True))
        inside = site.startswith("layers.")
        key = ("*." + site.split(".", 2)[2] if inside else site, form)
        together.setdefault(key, []).extend([int(site.split(".")[1])] if inside else [])
    rules = []
    for (site, form), members in together.items():
        rule: dict[str, Any] = {"site": site, "spec": form if form == "float" else json.loads(form)}
        if members and len(members) < layers:
            rule["layers"] = sorted(members)
        rules.append(rule)
    return rules


def changed_specs(specs: Mapping[str, QuantSpec], changes: Iterable[Change], blocks: Sequence[str]) -> dict[str, Any]:
    """Site -> spec of those sites that the changes alter; later changes build on earlier ones.

    SquamataError for a glob that names no site of any architecture, and for a spec that cannot be.
    """
    infos = all_sites(tuple(blocks))
    altered: dict[str, Any] = {}
    for change in changes:
        _refuse_unknown(change, len(blocks))
        for site, spec in specs.items():
            meant = _in_layers(site, change.layers) and change.kind in (None, infos[site].kind)
            if meant and fnmatchcase(site, change.site):
                altered[site] = _with(altered.get(site, spec), change, site)
    return altered


def _in_layers(site: str, layers: Sequence[int] | None) -> bool:
    return layers is None or (site.startswith("layers.") and int(site.split(".")[1]) in layers)


def _refuse_unknown(change: Change, layers: int) -> None:
    """Refuse a change that names no site or no field, also where it meets nothing: it would be a silent nothing."""
    known = [site for kind in BLOCKS for site in all_sites((kind,) * layers)]
    if not any(fnmatchcase(site, change.site) for site in known):
        raise SquamataError(f"no site matches '{change.site}' (sites are named like layers.7.mixer.u, *.mixer.state)")
    for key in change.set:
        if key not in QuantSpec.model_fields:
            raise SquamataError(f"change of '{change.site}': unknown key '{key}'{nearest(key, QuantSpec.model_fields)}")


def _with(spec: QuantSpec, change: Change, site: str) -> QuantSpec:
    try:
        return QuantSpec.model_validate(spec.model_dump() | change.set)
    except ValidationError as error:
        problem = first_problem(error, lambda place: nearest(str(place[-1]), QuantSpec.model_fields))
        raise SquamataError(f"change of '{change.site}' at {site}: {problem}") from None
