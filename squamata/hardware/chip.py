"""The chip model: configuration x recipe x technology -> area, energy, latency, traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from squamata.errors import SquamataError
from squamata.hardware.counts import Count, Groups, counts, ragged_groups
from squamata.hardware.lookup import Lookup, lookup, sram_mm2
from squamata.hardware.roofline import Roof, roof
from squamata.hardware.technology import Device, Technology
from squamata.hardware.traffic import Traffic, conv_macs, conv_precision, macs, stored_bytes, traffic
from squamata.models.config import ModelConfig
from squamata.spec.recipe import Recipe

NANO = 1 / 1000  # nJ in a pJ


@dataclass(frozen=True)
class Assumed:
    """What is taken for granted in place of the model's own figures, where scales and the convolution are counted.

    ``ssd_groups``, channels of the convolution, entries of the table that replaces a search.
    """

    ssd_groups: int
    conv_channels: int
    table_entries: int


def working_group(config: ModelConfig, ssd_groups: int = 8) -> Assumed:
    """The assumptions of the published 7 nm estimate: eight SSD groups (Mamba2-2.7B has one), a convolution over
    d_model channels (it has d_inner and B and C), heads and channels addressed with five bits each."""
    if "mamba2" not in config.blocks:
        raise SquamataError("SSD groups are Mamba-2's: this model has none")
    if ssd_groups < 1:
        raise SquamataError(f"{ssd_groups} SSD groups: give at least 1")
    return Assumed(ssd_groups, config.d_model, 2**5 * 2**5)


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs on a chip. Areas in mm2, energies in nJ, times in ns, sizes in bytes.

    ``scale_*``, ``sram_*``, ``lookup_*``, ``table_bytes`` speak of the SSM input ``u``, whose groups have to be
    searched: bytes of scales and group ends, of one layer (the largest) and of all; area of that, also with an SRAM
    that a parallel search can read at once; bits and energy of one lookup, and how many a token needs if every run of
    neighbours with one scale takes its own. ``accelerator_share``: of the technology's accelerator.
    ``conv_energy_nj``: one layer's convolution of one token, to compare with.

    ``all_scale_bytes``: static scales of every activation and state site and group ends, of all layers;
    ``sites``: the same of the layer that has most, by site. Scales of weights travel with the weights.

    The rest is one decoded token of one of ``batch`` sequences: ``traffic`` as in ``Traffic``, products by precision,
    energy by where it goes and in all. ``roofline``: the floor of a decoding step by device.
    """

    recipe: str
    technology: str
    architecture: str
    layers: int
    batch: int
    ssm_input: str
    groups: dict[str, int]
    scale_bytes_per_layer: float
    scale_bytes: float
    scale_share_of_model: float
    sram_mm2: float
    sram_parallel_mm2: float
    sram_in_int8_macs: float
    accelerator_share: float
    lookup_bits: int
    lookup_energy_nj: float
    lookups_per_layer: int
    conv_energy_nj: float
    lookup_latency_ns: dict[str, float]
    table_bytes: float
    all_scale_bytes: float
    all_scale_mm2: float
    sites: dict[str, float]
    model_bytes: float
    traffic: dict[str, float]
    dram_bytes_per_token: float
    macs_per_token: dict[str, int]
    energy_nj: dict[str, float]
    energy_per_token_nj: float
    roofline: dict[str, Roof]


def estimate(
    config: ModelConfig,
    recipe: Recipe | str,
    technology: Technology | str = "7nm",
    assumed: Assumed | None = None,
    groups: tuple[int | None, int | None] = (None, None),
    batch: int = 1,
    devices: Sequence[Device] = (),
) -> Estimate:
    """What a recipe costs for a model of this shape; SquamataError if it is not for it.

    ``assumed``: count scales and the convolution by these figures instead of the model's (``working_group``).
    ``groups``: head groups an SSD group and channel groups a head group of ragged sites, instead of the recipe's.
    ``batch``: sequences that share one reading of the weights. ``devices``: for the roofline.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    technology = technology if isinstance(technology, Technology) else Technology.read(technology)
    if batch < 1:
        raise SquamataError(f"batch {batch}: give at least 1")
    recipe.check_architectures(config.blocks)
    ragged = ragged_groups(config, recipe, assumed.ssd_groups if assumed else None, *groups)
    found = counts(config, recipe, ragged, technology.float_bits)
    searches = [_search(found, layer, ragged, technology, assumed) for layer in range(config.n_layers)]
    weights = stored_bytes(config, recipe, found)
    return Estimate(
        recipe=recipe.name,
        technology=technology.name,
        architecture=config.architecture,
        layers=config.n_layers,
        batch=batch,
        groups={"ssd": ragged.ssd, "heads": ragged.heads, "channels": ragged.channels},
        conv_energy_nj=_conv_energy(config, found, technology, assumed),
        **_finding_scales(weights, found, searches, technology),
        **_all_scales(found, searches, technology),
        model_bytes=weights,
        **_a_token(config, found, searches, technology, batch, weights, devices),
    )


def _finding_scales(
    weights: float, found: Mapping[str, Count], searches: list[Lookup], technology: Technology
) -> dict[str, Any]:
    """What ``Estimate`` says of the SSM input."""
    largest = max(searches, key=lambda search: search.sram_bytes)
    total = sum(search.sram_bytes for search in searches)
    area = sram_mm2(total, technology)
    return {
        "ssm_input": _described(found, searches.index(largest)),
        "scale_bytes_per_layer": largest.sram_bytes,
        "scale_bytes": total,
        "scale_share_of_model": total / weights,
        "sram_mm2": area,
        "sram_parallel_mm2": area * technology.multiport_area_ratio,
        "sram_in_int8_macs": area / technology.int8_mac_mm2,
        "accelerator_share": area / technology.accelerator_mm2,
        "lookup_bits": largest.read_bits,
        "lookup_energy_nj": largest.energy_nj(technology),
        "lookups_per_layer": largest.lookups,
        "lookup_latency_ns": {
            "sequential": largest.sequential_ns,
            "parallel": largest.parallel_ns,
            "table": largest.table_ns,
        },
        "table_bytes": largest.table_bytes,
    }


def _all_scales(found: Mapping[str, Count], searches: list[Lookup], technology: Technology) -> dict[str, Any]:
    """What ``Estimate`` says of every site's static scales."""
    layers = [_site_scales(found, layer, search) for layer, search in enumerate(searches)]
    total = sum(sum(sites.values()) for sites in layers) + _static_scales(found["head.in"])
    return {
        "all_scale_bytes": total,
        "all_scale_mm2": sram_mm2(total, technology),
        "sites": max(layers, key=lambda sites: sum(sites.values())),
    }


def _a_token(
    config: ModelConfig,
    found: Mapping[str, Count],
    searches: list[Lookup],
    technology: Technology,
    batch: int,
    weights: float,
    devices: Sequence[Device],
) -> dict[str, Any]:
    """What ``Estimate`` says of one decoded token."""
    moved, products = traffic(config, found, technology.float_bits), macs(config, found)
    energy = _energy(moved, products, technology, batch)
    energy["lookup"] = sum(search.lookups * search.energy_nj(technology) for search in searches)
    step = {kind: batch * count for kind, count in products.items()}
    resident = weights + batch * _cache_bytes(config, moved)
    return {
        "traffic": asdict(moved),
        "dram_bytes_per_token": moved.dram(batch),
        "macs_per_token": products,
        "energy_nj": energy,
        "energy_per_token_nj": sum(energy.values()),
        "roofline": {device.name: roof(device, batch * moved.dram(batch), step, resident) for device in devices},
    }


def _search(
    found: Mapping[str, Count], layer: int, groups: Groups, technology: Technology, assumed: Assumed | None
) -> Lookup:
    """Of the SSM input of a layer."""
    entries = assumed.table_entries if assumed else None
    return lookup(found[f"layers.{layer}.mixer.u"], groups, technology, entries)


def _described(found: Mapping[str, Count], layer: int) -> str:
    """Bits and granularity of the SSM input of a layer, for people."""
    site = found[f"layers.{layer}.mixer.u"]
    return site.spec.describe().split(",", 1)[0] if site.spec else "float"


def _static_scales(count: Count) -> float:
    return 0 if count.spec is None or count.spec.dynamic else count.scale_bytes


def _site_scales(found: Mapping[str, Count], layer: int, search: Lookup) -> dict[str, float]:
    """Bytes of static scales by site of a layer; those of ``u`` with the group ends, which the state shares."""
    inside = f"layers.{layer}.mixer."
    sites = {
        name.removeprefix(inside): _static_scales(count)
        for name, count in found.items()
        if name.startswith(inside) and count.info and count.info.kind in ("activation", "state")
    }
    return {name: size for name, size in (sites | {"u": search.sram_bytes}).items() if size}


def _conv_energy(
    config: ModelConfig, found: Mapping[str, Count], technology: Technology, assumed: Assumed | None
) -> float:
    """nJ of one layer's convolution for one token, the first layer's precision."""
    if assumed:
        return assumed.conv_channels * config.d_conv * technology.int8_mac_pj * NANO
    kind = conv_precision(found, 0, config.blocks[0])
    return conv_macs(config, 0) * _mac_pj(technology)[kind] * NANO


def _mac_pj(technology: Technology) -> dict[str, float]:
    return {
        "int8": technology.int8_mac_pj,
        "float16": technology.float16_mac_pj,
        "float32": technology.float32_mac_pj,
    }


def _energy(moved: Traffic, products: Mapping[str, int], technology: Technology, batch: int) -> dict[str, float]:
    """nJ a token: DRAM; activations written to SRAM and read again; products by precision."""
    sram = (technology.sram_read_pj_per_bit + technology.sram_write_pj_per_bit) / 2
    prices = _mac_pj(technology)
    return {
        "dram": moved.dram(batch) * 8 * technology.dram_pj_per_bit * NANO,
        "sram": moved.activations * 8 * sram * NANO,
    } | {kind: count * prices[kind] * NANO for kind, count in products.items()}


def _cache_bytes(config: ModelConfig, moved: Traffic) -> float:
    """Of one sequence: the state is moved twice a token, the convolution's last inputs once but for the new one."""
    return moved.state / 2 + moved.conv * (config.d_conv - 1) / config.d_conv
