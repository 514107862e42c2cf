"""Groups along the axis that a product sums over: legal where both of its operands have the same.

Such a group is a sum of its own: its integers are added exactly, and one scale of each operand makes it float before it
is added to the others. So the rule is that activation and weight say the same groups and keep the same channels.
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
        raise SquamataError(f"{site}: 'keep' is for the input of a product{_columns(keep)}; remove it here")
    if info.summed and not (spec.dynamic and "token" in spec.granularity.axes):
        raise SquamataError(f"{site}: 'keep' goes with scales a token; add 'granularity: token' and 'dynamic: true'")
    if keep.channels and spec.granularity.group is None:
        raise SquamataError(f"{site}: what 'keep: channels' leaves is in groups; add 'group(N)' to the granularity")
    if keep.channels and not (info.reads or site.endswith(SORTED)):
        raise SquamataError(f"{site}: only the channels of {' and '.join(SORTED)} are sorted to keep some; remove 'keep'")


def _columns(keep: Keep) -> str:
    return ", and 'channels' for its weight" if keep.channels else ""


def refuse_unlike_groups(specs: Mapping[str, QuantSpec], infos: Mapping[str, SiteInfo]) -> None:
    """SquamataError for a product whose activation has groups or keeps channels that its weight has not, or keeps not
    what its weight keeps."""
    for weight, info in infos.items():
        if not info.reads:
            continue
        site = input_of(weight, info)
        apart = f"{site.rpartition('.')[0]}.{infos[site].apart}"
        site = apart if apart in specs else site
        x, w = specs.get(site), specs.get(weight)
        if (x is not None and _groups(x) != (None, None) and _groups(x) != _groups(w)) or (
            w is not None and w.kept_channels and _groups(x) != _groups(w)
        ):
            raise SquamataError(
                f"{site}: {_said(x)} beside {_said(w)} of {weight} cannot run: groups along the axis that a product sums "
                f"over are summed apart, so both must have the same 'group(N)' and 'keep'"
            )


def _groups(spec: QuantSpec | None) -> tuple[int | None, Keep | None]:
    """What both operands must agree on; nothing of a float one, or of one whose groups end in the weight."""
    if spec is None or spec.second_level:
        return None, None
    return spec.granularity.group, spec.keep if spec.kept_channels else None


def _said(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    kept = f" and {spec.keep.describe()}" if spec.keep and spec.kept_channels else ""
    return f"a scale per {spec.granularity}{kept}"
