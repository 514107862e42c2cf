"""Transforms: model -> equal model that is easier to quantize. One file each; adding one is one entry here.

A transform changes one layer's tensors (names without ``layers.N.``), the model's two ends if it must, and leaves
what must happen at run time as tensors of the layer, so that it survives save and load without code of its own: those
that the layer's block reads (``Block.optional_tensors``), ``mixer.SITE.index``, the map of a ragged site, and
``mixer.SITE.order``, of a site that keeps some of its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import combinations
from typing import cast

from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.kernels.partition import Partition
from squamata.models.config import ModelConfig
from squamata.scales.statistics import Statistics
from squamata.spec.granularity import Granularity
from squamata.spec.parameters import checked_parameters
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Named, Recipe
from squamata.spec.sites import BLOCKS, SORTED
from squamata.transform.awq import awq
from squamata.transform.folds import READS, SITES, Product
from squamata.transform.hadamard import rotate_output
from squamata.transform.klt import klt, klt_ends
from squamata.transform.klt import stream_basis as stream_basis
from squamata.transform.observed import Basis as Basis
from squamata.transform.observed import Observed as Observed
from squamata.transform.reorder import reorder, reorder_within
from squamata.transform.residual import fold_final_norm, fold_norm, rotate_ends, rotate_residual
from squamata.transform.smooth import smooth
from squamata.transform.sort_inputs import sort_inputs

Tensors = dict[str, Tensor]

OWN_ARGUMENTS = 4  # config, kind, tensors, statistics: what a recipe does not set


@dataclass(frozen=True)
class Transform:
    """``function(config, kind, tensors, statistics, **parameters) -> tensors`` of one layer of a kind.

    ``needs``: sites (``mixer.u``) it wants observed before it runs; ``statistics`` holds those that the kind has,
    each an ``Observed`` with a number a feature, and second moments if it says ``pairs``. A transform returns a kind
    that it does not know as it came.
    Among them may be ``stream``, the ``Basis`` of the residual stream as the first layer reads it.
    ``changes``: sites whose values are others afterwards, so that nothing known of them before holds.
    ``ends``: ``(config, tensors, statistics) -> tensors`` of the model's two ends: ``embedding.weight``, and
    ``final_norm.weight`` with ``head.weight``; of the statistics there is ``stream`` alone. Either table may come some
    of its rows at a time, so each row must change by itself.
    ``unties``: the head is no longer the embedding afterwards. ``maps``: it leaves the index maps of ragged sites.
    """

    function: Callable[..., Tensors]
    needs: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    pairs: bool = False
    ends: Callable[..., Tensors] | None = None
    unties: bool = False
    maps: bool = False


_SORTED = ("mixer.z", "mixer.x", "mixer.u", "mixer.dt", "mixer.state", "mixer.y", "mixer.out")  # by heads and channels

TRANSFORMS: dict[str, Transform] = {
    "sort_inputs": Transform(sort_inputs, needs=SORTED, pairs=True),
    "reorder": Transform(reorder, needs=("mixer.u",), changes=_SORTED, maps=True),
    "reorder_within": Transform(reorder_within, needs=("mixer.u",), changes=_SORTED, maps=True),
    "smooth": Transform(smooth, needs=SITES, changes=SITES),
    "awq": Transform(awq, needs=("mixer.in", "mixer.u", "mixer.out"), changes=("mixer.in", "mixer.out"), pairs=True),
    "fold_norm": Transform(fold_norm, changes=("mixer.in",), ends=fold_final_norm, unties=True),
    "rotate_residual": Transform(rotate_residual, changes=("stream", "mixer.in"), ends=rotate_ends),
    "hadamard": Transform(rotate_output, changes=("mixer.out",)),
    "klt": Transform(
        klt,
        needs=("stream", "mixer.dt_low"),
        changes=("stream", "mixer.in", "mixer.dt_low"),
        pairs=True,
        ends=klt_ends,
    ),
}


def check(recipe: Recipe, specs: Iterable[QuantSpec] = ()) -> None:
    """Refuse an unknown transform or parameter, naming the nearest, a parameter of the wrong type, an order in which
    one would be told of values that another has changed, and, of a model with these specs, one that is missing.
    """
    for named in recipe.transforms:
        if named.name not in TRANSFORMS:
            raise SquamataError(
                f"recipe {recipe.name}: no transform named '{named.name}'{nearest(named.name, TRANSFORMS)}"
            )
        _parameters(named)
    names = {named.name for named in recipe.transforms}
    if "sort_inputs" in names and len(names) > 1:
        others = ", ".join(sorted(names - {"sort_inputs"}))
        raise SquamataError(f"recipe {recipe.name}: sort_inputs sorts channels as the model came: leave {others} out")
    specs = list(specs)
    if any(spec.kept_channels for spec in specs) and "sort_inputs" not in names:
        raise SquamataError(f"recipe {recipe.name}: 'keep' has to know which: add the transform 'sort_inputs'")
    if any(spec.granularity.ragged for spec in specs) and not any(TRANSFORMS[name].maps for name in names):
        raise SquamataError(f"recipe {recipe.name}: granularity 'index' needs a map: add the transform 'reorder'")
    _refuse_outdated(recipe)


def _refuse_outdated(recipe: Recipe) -> None:
    """Statistics are of the model as it came: refuse a transform that is told of what one before it has changed."""
    known = {"stream"}.union(*(BLOCKS[kind] for kind in recipe.architectures))
    for first, second in combinations(recipe.transforms, 2):
        for site in sorted(_outdated(first, second) & known):
            way = (
                "leave one out" if _outdated(second, first) & known else f"put {second.name} before it or leave one out"
            )
            problem = f"{second.name} is told of {site} in the model as it came, which {first.name} has changed by then"
            raise SquamataError(f"recipe {recipe.name}: {problem}: {way}")


def _outdated(first: Named, second: Named) -> set[str]:
    """Sites that the second of two transforms is told of and the first changes."""
    return _dealt_with(first, TRANSFORMS[first.name].changes) & _dealt_with(second, TRANSFORMS[second.name].needs)


def _dealt_with(named: Named, sites: tuple[str, ...]) -> set[str]:
    """Those of a transform's sites that its parameter ``products`` leaves it, if it has one."""
    parameter = signature(TRANSFORMS[named.name].function).parameters.get("products")
    if parameter is None:
        return set(sites)
    products = cast(tuple[Product, ...], _parameters(named).get("products", parameter.default))
    return {site for product in products for site in READS[product]} & set(sites)


def needs(recipe: Recipe, kind: str) -> dict[str, QuantSpec]:
    """Sites of a layer of this kind that the recipe's transforms want observed, each with a number a feature."""
    wanted = {site for named in recipe.transforms for site in _dealt_with(named, TRANSFORMS[named.name].needs)}
    return {
        site: QuantSpec(bits=8, granularity=Granularity(info.axes))
        for site, info in BLOCKS[kind].items()
        if site in wanted
    }


def needs_stream(recipe: Recipe) -> bool:
    """True if a transform must know the residual stream before anything is changed."""
    return any("stream" in TRANSFORMS[named.name].needs for named in recipe.transforms)


def observer(recipe: Recipe) -> Callable[[Partition, QuantSpec], Observed]:
    """What makes the statistics of the sites that ``needs`` names."""
    return partial(Observed, pairs=any(TRANSFORMS[named.name].pairs for named in recipe.transforms))


def apply(
    recipe: Recipe,
    config: ModelConfig,
    kind: str,
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics | Basis],
) -> Tensors:
    """All transforms of a recipe, in order, on one layer's tensors; the given mapping is not changed.

    ``statistics``: of the sites that ``needs`` names, observed on the layer as it was before the first transform.
    """
    changed = dict(tensors)
    for named in recipe.transforms:
        transform = TRANSFORMS[named.name]
        observed = {site: statistics[site] for site in transform.needs if site in statistics}
        changed = transform.function(config, kind, changed, observed, **_parameters(named))
    return changed


def apply_ends(
    recipe: Recipe, config: ModelConfig, statistics: Mapping[str, Basis], tensors: Mapping[str, Tensor]
) -> Tensors:
    """What the recipe's transforms make of the model's two ends, in order; the given mapping is not changed."""
    changed = dict(tensors)
    for named in recipe.transforms:
        ends = TRANSFORMS[named.name].ends
        changed = changed if ends is None else ends(config, changed, statistics)
    return changed


def unties(recipe: Recipe) -> bool:
    """True if a head that was the embedding is a tensor of its own after the recipe's transforms."""
    return any(TRANSFORMS[named.name].unties for named in recipe.transforms)


def _parameters(named: Named) -> dict[str, object]:
    function = TRANSFORMS[named.name].function
    return checked_parameters(function, named.parameters, OWN_ARGUMENTS, f"transform {named.name}")
