"""What the GPU kernels do not take, said in one line; and what they ask of a site otherwise."""

from __future__ import annotations

from typing import Any

from squamata.errors import SquamataError
from squamata.kernels.gpu.landing import RowSite
from squamata.kernels.gpu.math import ROUNDINGS
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site


def check_site(site: Site) -> None:
    """SquamataError for a site that a fused kernel would pass over: observed, simulated, or in a format it lacks.

    All that the kernels ask of every site; what one place asks besides is how its scale is made (``check_static``) and
    how many there are (``row_site``).
    """
    if site.observer is not None or site.mode == "observe":
        raise SquamataError(f"{site.name} is being observed, which the fused GPU kernels would not show: use the CPU")
    spec = site.spec if site.quantized else None
    if spec is None:
        return
    if site.mode == "simulate":
        raise SquamataError(f"{site.name} is simulated; the GPU kernels run integers: load the model in that mode")
    if not (spec.linear_grid and spec.symmetric):
        raise SquamataError(f"{site.name}: the GPU kernels take symmetric int8 sites only, not {spec.describe()}")
    if not spec.dynamic and site.scale is None:
        raise SquamataError(f"{site.name} has no scale: calibrate first")


def check_weight(value: QTensor) -> None:
    """SquamataError for a weight in a format that the kernels lack."""
    if value.simulated or not value.spec.linear_grid:
        raise SquamataError(f"the GPU kernels take integer weights on a linear grid, not {value.spec.describe()}")


def row_site(site: Site) -> RowSite:
    """A site whose rows have one scale each, or all the same. SquamataError for another granularity."""
    if not site.quantized:
        return RowSite()
    spec = site.spec
    assert spec is not None
    low, high = (float(bound) for bound in spec.code_range)
    rounding = ROUNDINGS[spec.rounding]
    if spec.dynamic:
        if spec.granularity.axes != ("token",):
            raise SquamataError(f"{site.name}: a dynamic scale on the GPU is one a token, not per {spec.granularity}")
        return RowSite(True, 1.0, 1.0, low, high, spec.span, rounding)
    scale, inverse, _ = site.expanded()
    if scale.numel() != 1:
        raise SquamataError(f"{site.name}: the GPU kernels take one scale here, not per {spec.granularity}")
    return RowSite(True, float(scale), float(inverse), low, high, 0.0, rounding)


def check_static(site: Site) -> None:
    """SquamataError unless the site's scale is known beforehand."""
    assert site.spec is not None
    if site.spec.dynamic:
        raise SquamataError(f"{site.name}: the GPU kernels take a static scale here, not {site.spec.describe()}")


def landing_rounding(sites: list[Site]) -> int:
    """The rounding of some sites of which any is quantized, else -1."""
    return common_rounding(tuple(sites)) if any(site.quantized for site in sites) else -1


def common_rounding(sites: tuple[Site | None, ...]) -> int:
    """The one rounding of some sites. SquamataError if they differ."""
    found: set[Any] = {site.spec.rounding for site in sites if site is not None and site.quantized and site.spec}
    if len(found) > 1:
        raise SquamataError(f"the GPU kernels want one rounding for {', '.join(site.name for site in sites if site)}")
    return ROUNDINGS[found.pop()] if found else 0
