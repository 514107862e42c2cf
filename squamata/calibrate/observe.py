"""Run a layer over the calibration stream with an observer at every site that needs a static scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from squamata import scales
from squamata.errors import about
from squamata.kernels import ops
from squamata.kernels.partition import Partition
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.models.config import ModelConfig
from squamata.models.lm import head_site
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec

Stream = list[tuple[Tensor, Tensor | None]]  # (h, residual) a batch, float (B, L, D)
Gather = Callable[[Partition, QuantSpec], Statistics]


def attach(
    sites: Iterable[Site], specs: Mapping[str, QuantSpec], gather: Gather = scales.gather_for
) -> dict[str, Statistics]:
    """Put what ``gather`` makes as observer on every site that has a static spec; returns them by full site name."""
    attached = {}
    for site in sites:
        spec = specs.get(site.name)
        if spec is not None and not spec.dynamic:
            site.spec, site.mode = spec, "observe"
            attached[site.name] = gather(site.partition, spec)
            site.observer = attached[site.name].update
    return attached


@torch.no_grad()
def watch_layer(block: Block, stream: Stream) -> None:
    """Send the stream through one block for its observers alone; the stream stays as it is."""
    for h, residual in stream:
        block.forward(h, residual, block.new_cache(h.shape[0]))


@torch.no_grad()
def run_layer(block: Block, stream: Stream) -> Stream:
    """Send the stream through one block, in place: afterwards it is what the next block sees."""
    for number, (h, residual) in enumerate(stream):
        stream[number] = block.forward(h, residual, block.new_cache(h.shape[0]))
    return stream


@torch.no_grad()
def observe_head(
    config: ModelConfig, final_norm: Tensor, stream: Stream, specs: Mapping[str, QuantSpec]
) -> dict[str, Tensor]:
    """Site tensors of the head's input, from the stream after the last block."""
    site = head_site(config)
    statistics = attach([site], specs)
    for h, residual in stream if statistics else ():
        ops.rms_norm(h, residual, final_norm.float(), config.norm_epsilon, site)
    return scales_of(statistics, specs)


def scales_of(statistics: Mapping[str, Statistics], specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """Statistics -> site tensors ``NAME.scale``, ``NAME.zero``, ``NAME.index``; SquamataErrors name the site."""
    tensors: dict[str, Tensor] = {}
    for name, observed in statistics.items():
        with about(name):
            scale, zero = scales.compute(observed, specs[name])
        tensors[f"{name}.scale"] = scale
        if zero is not None:
            tensors[f"{name}.zero"] = zero
        if observed.partition.index is not None:
            tensors[f"{name}.index"] = observed.partition.index
    return tensors
