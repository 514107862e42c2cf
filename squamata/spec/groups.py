"""Groups along the axis that a product sums over: legal where both of its operands have the same, or one is float.

Such a group is a sum of its own: its integers are added exactly, and one scale of each operand makes it float before it
is added to the others. So activation and weight must say the same groups and keep the same channels. Beside a float
operand the other is dequantized first, and anything is legal.
"""

from __future__ import annotations

from collections.abc import Mapping

from squamata.errors import SquamataError
from squamata.spec.quant import Keep, QuantSpec
from squamata.spec.sites import SORTED, SiteInfo, input_of


def refuse_to_keep(site: str, spec: QuantSpec, info: SiteInfo) -> None:
    """Channels are kept where a product reads them, beside scales that are taken from every token."""
    keep = spec.keep
    if keep is None:
        return
    if not (info.summed or (info.reads and keep.channels)):
        also = ", 'channels' for its weight too" if keep.channels else ""
        raise SquamataError(f"{site}: 'keep' is for the input of a product{also}; remove it here")
    if info.summed and not (spec.dynamic and "token" in spec.granularity.axes):
        raise SquamataError(f"{site}: 'keep' goes with scales a token; add 'granularity: token' and 'dynamic: true'")
    if keep.channels and spec.granularity.group is None:
        raise SquamataError(f"{site}: what 'keep: channels' leaves is in groups; add 'group(N)' to the granularity")
    if keep.channels and not (input_of(site, info) or site).endswith(SORTED):
        raise SquamataError(f"{site}: only the channels of {' and '.join(SORTED)} are sorted; remove 'keep' here")


def refuse_unlike_groups(specs: Mapping[str, QuantSpec], infos: Mapping[str, SiteInfo]) -> None:
    """SquamataError for a product of which one operand has groups or keeps channels that the other has not."""
    for weight, info in infos.items():
        if not info.reads or weight not in specs:
            continue
        site = input_of(weight, info)
        apart = f"{site.rpartition('.')[0]}.{infos[site].apart}"
        site = apart if apart in specs else site
        if site not in specs:
            continue
        x, w = specs[site], specs[weight]
        grouped = x.granularity.group is not None or x.kept_channels or w.kept_channels
        if grouped and (_groups(x) != _groups(w) or w.second_level):
            raise SquamataError(
                f"{site}: a scale per {x.granularity}{_kept(x)} beside {w.granularity}{_kept(w)} of {weight} cannot "
                f"run: groups along the axis that a product sums over are summed apart, so both need the same group(N) "
                f"and 'keep'"
            )


def ordered_sites(specs: Mapping[str, QuantSpec], infos: Mapping[str, SiteInfo]) -> set[str]:
    """Sites whose channels must be sorted, because they or the weights that read them keep some."""
    keeping = (name for name, spec in specs.items() if spec.kept_channels)
    return {input_of(name, infos[name]) or name for name in keeping}


def _groups(spec: QuantSpec) -> tuple[int | None, Keep | None]:
    """What both operands must agree on."""
    return spec.granularity.group, spec.keep if spec.kept_channels else None


def _kept(spec: QuantSpec) -> str:
    return f" and {spec.keep.describe()}" if spec.keep and spec.kept_channels else ""
