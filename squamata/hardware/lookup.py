"""The scales that a chip keeps in SRAM, and what it costs to find one (RESEARCH: the working group's 7 nm estimate)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from squamata.hardware.counts import Count, Groups
from squamata.hardware.technology import Technology

KB = 1024


@dataclass(frozen=True)
class Lookup:
    """Finding the scale of one channel at one site.

    ``sram_bytes``: scales and the ends of ragged groups; ``read_bits``: what one lookup reads, a whole SSD group's
    ends and one scale; ``table_bytes``: of a table with a scale for every channel instead. ``lookups``: a token, one
    for each run of neighbours that share a scale. Latencies in ns: comparing one group's end after another's, all at
    once, and by the table.
    """

    sram_bytes: float
    read_bits: int
    table_bytes: float
    lookups: int
    sequential_ns: float
    parallel_ns: float
    table_ns: float

    def energy_nj(self, technology: Technology) -> float:
        """Of one lookup."""
        return self.read_bits * technology.sram_read_pj_per_bit / 1000


NOTHING = Lookup(0, 0, 0, 0, 0, 0, 0)


def lookup(site: Count, groups: Groups, technology: Technology, table_entries: int | None = None) -> Lookup:
    """Of a site with a static scale; NOTHING for one that is float or takes its scale at run time.

    A scale along whole axes has its channel as address, and one that all share is simply read: no search.
    """
    if site.spec is None or site.spec.dynamic:
        return NOTHING
    read, bits = technology.sram_read_ns, site.scale_bits
    if not site.spec.granularity.ragged:
        return Lookup(site.scale_bytes, bits, site.scale_bytes, site.scales, read, read, read)
    step = technology.comparator_ns + technology.mux_ns
    assert site.info is not None
    outer = [size for axis, size in zip(site.info.axes, site.sizes, strict=True) if axis not in ("channel", "state")]
    channels = [size for axis, size in zip(site.info.axes, site.sizes, strict=True) if axis != "state"]
    return Lookup(
        sram_bytes=site.scale_bytes + groups.ranges * technology.range_bits / 8,
        read_bits=groups.ranges // groups.ssd * technology.range_bits + bits,
        table_bytes=(table_entries or prod(channels)) * bits / 8,
        lookups=prod(outer) * groups.channels,
        sequential_ns=(groups.heads + groups.channels) * step + read,
        parallel_ns=technology.comparator_ns + technology.wide_mux_ns + read,
        table_ns=read,
    )


def sram_mm2(count: float, technology: Technology) -> float:
    """Area of so many bytes."""
    return count / KB * technology.sram_mm2_per_kb
