"""Sites: the named edges of each block where a tensor may be represented in few bits.

A site is written ``layers.7.mixer.u``; the tables give the part after the layer. Axis names are those a
``Granularity`` may list; sizes come from the model's configuration.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["activation", "state", "weight", "parameter"]


@dataclass(frozen=True)
class SiteInfo:
    """What the recipe checker must know of a site.

    ``axes``: feature axes (batch and length come before them). ``summed``: the site enters a product, which sums
    over these axes, so no scale may vary along them. ``kind``: weights are split in ``out`` x ``in``; parameters are
    small tensors that are always dequantized before use. ``reads``: the site whose tensor a weight multiplies.
    ``apart``: the site, by its last word, from which the product reads instead once a recipe represents that one.
    ``on_request``: a site that is absent unless a rule names it: such a one; the scan's decay
    exp(dt A) (``decay``) and its exponent dt A (``log_decay``); of a chunk of Mamba-2's scan, C_t B_s (``scores``),
    u times dt and the decay until the chunk's end (``u_scaled``), and the decay of the whole (``chunk_decay``).
    ``mapped``: the transform ``reorder`` leaves a map of its leading axes, so that a scale may be ragged.
    """

    axes: tuple[str, ...]
    kind: Kind = "activation"
    summed: tuple[str, ...] = ()
    reads: str = ""
    apart: str | None = None
    on_request: bool = False
    mapped: bool = False

    def in_company(self, site: str, represented: Collection[str]) -> SiteInfo:
        """What must be known of this site in a recipe that represents these others too."""
        if self.apart is None or f"{site.rpartition('.')[0]}.{self.apart}" not in represented:
            return self
        return replace(self, summed=(), apart=None)


def _linear(reads: str) -> SiteInfo:
    return SiteInfo(("out", "in"), "weight", reads=reads)


_CONV = {"conv.weight": SiteInfo(("channel", "tap"), "parameter"), "conv.bias": SiteInfo(("channel",), "parameter")}

MAMBA1 = {
    "mixer.in": SiteInfo(("channel",), summed=("channel",)),
    "mixer.x": SiteInfo(("channel",)),
    "mixer.z": SiteInfo(("channel",)),
    "mixer.u": SiteInfo(("channel",), summed=("channel",), apart="u_proj"),
    "mixer.u_proj": SiteInfo(("channel",), summed=("channel",), on_request=True),
    "mixer.dt_low": SiteInfo(("channel",), summed=("channel",)),
    "mixer.B": SiteInfo(("state",)),
    "mixer.C": SiteInfo(("state",)),
    "mixer.dt": SiteInfo(("channel",)),
    "mixer.log_decay": SiteInfo(("channel", "state"), on_request=True),
    "mixer.decay": SiteInfo(("channel", "state"), on_request=True),
    "mixer.state": SiteInfo(("channel", "state"), "state"),
    "mixer.y": SiteInfo(("channel",)),
    "mixer.out": SiteInfo(("channel",), summed=("channel",)),
    "mixer.in_proj.weight": _linear("mixer.in"),
    "mixer.x_proj.weight": _linear("mixer.u"),
    "mixer.dt_proj.weight": _linear("mixer.dt_low"),
    "mixer.out_proj.weight": _linear("mixer.out"),
    **{f"mixer.{name}": info for name, info in _CONV.items()},
    "mixer.dt_bias": SiteInfo(("channel",), "parameter"),
    "mixer.A_log": SiteInfo(("channel", "state"), "parameter"),
    "mixer.D": SiteInfo(("channel",), "parameter"),
}

MAMBA2 = {
    "mixer.in": SiteInfo(("channel",), summed=("channel",)),
    "mixer.z": SiteInfo(("head", "channel")),
    "mixer.x": SiteInfo(("head", "channel"), mapped=True),
    "mixer.B": SiteInfo(("ssd_group", "state")),
    "mixer.C": SiteInfo(("ssd_group", "state")),
    "mixer.dt": SiteInfo(("head",)),
    "mixer.u": SiteInfo(("head", "channel"), mapped=True),
    "mixer.B_conv": SiteInfo(("ssd_group", "state")),
    "mixer.C_conv": SiteInfo(("ssd_group", "state")),
    "mixer.log_decay": SiteInfo(("head",), on_request=True),
    "mixer.decay": SiteInfo(("head",), on_request=True),
    "mixer.scores": SiteInfo(("ssd_group",), on_request=True),
    "mixer.u_scaled": SiteInfo(("head", "channel"), on_request=True),
    "mixer.chunk_decay": SiteInfo(("head",), on_request=True),
    "mixer.state": SiteInfo(("head", "channel", "state"), "state", mapped=True),
    "mixer.y": SiteInfo(("head", "channel"), mapped=True),
    "mixer.out": SiteInfo(("channel",), summed=("channel",)),
    "mixer.in_proj.weight": _linear("mixer.in"),
    "mixer.out_proj.weight": _linear("mixer.out"),
    **{f"mixer.{name}": info for name, info in _CONV.items()},
    "mixer.dt_bias": SiteInfo(("head",), "parameter"),
    "mixer.A_log": SiteInfo(("head",), "parameter"),
    "mixer.D": SiteInfo(("head",), "parameter"),
}

SORTED = ("mixer.in", "mixer.out")  # whose channels the transform sort_inputs puts in order

MODEL = {
    "embedding.weight": SiteInfo(("out", "in"), "weight"),
    "head.in": SiteInfo(("channel",), summed=("channel",)),
    "head.weight": _linear("head.in"),
}

BLOCKS: dict[str, dict[str, SiteInfo]] = {"mamba1": MAMBA1, "mamba2": MAMBA2}


def input_of(weight: str, info: SiteInfo) -> str:
    """Full name of the site whose tensor this weight multiplies; empty if it multiplies none."""
    return weight[: weight.index("mixer.")] + info.reads if info.reads.startswith("mixer.") else info.reads


def all_sites(blocks: tuple[str, ...]) -> dict[str, SiteInfo]:
    """Every site of a model whose layers are of these kinds, in the order the data meets them."""
    sites = {"embedding.weight": MODEL["embedding.weight"]}
    for layer, kind in enumerate(blocks):
        sites |= {f"layers.{layer}.{rest}": info for rest, info in BLOCKS[kind].items()}
    return sites | {name: MODEL[name] for name in ("head.in", "head.weight")}
