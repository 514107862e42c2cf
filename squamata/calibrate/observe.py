"""Run a layer over the calibration stream with an observer at every site that needs a static scale, or at every input
of a weight whose quantizer wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from squamata import scales
from squamata.errors import about
from squamata.kernels import ops
from squamata.kernels.partition import Partition
from squamata.kernels.site import Site
from squamata.models.block import Block
from squamata.models.config import ModelConfig
from squamata.scales.gram import Gram
from squamata.scales.statistics import Statistics
from squamata.spec.quant import QuantSpec

Stream = list[Tensor]  # the residual stream as the next block reads it, float (B, L, D) a batch
Lengths = Sequence[list[int] | None]  # of every batch: tokens of each of its sequences, None if it has no others
Gather = Callable[[Partition, QuantSpec], Statistics]
Observer = Callable[[Tensor], None]


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
            site.observer = partial(_observe, site.name, attached[site.name].update)
    return attached


def attach_grams(sites: Iterable[Site], inputs: Mapping[str, str]) -> dict[str, Gram]:
    """Put a Gram observer on every site that one of these weights reads (weight -> site); by the weight's name."""
    by_name = {site.name: site for site in sites}
    grams = {}
    for weight, reads in inputs.items():
        if reads in by_name:
            grams[weight] = Gram(by_name[reads].layout.flat_size)
            by_name[reads].observer = partial(_observe, reads, grams[weight].update)
    return grams


def _observe(name: str, observer: Observer, x: Tensor) -> None:
    """Show a tensor to an observer, whose SquamataErrors name the site."""
    with about(name):
        observer(x)


class _Enough(Exception):
    """Every observer has seen the batch: what follows in the layer serves nobody."""


@torch.no_grad()
def watch_layer(block: Block, stream: Stream, lengths: Lengths | None = None) -> None:
    """Send the stream through one block for its observers alone, as far as the last of them; it stays as it is.

    For activations, each of which lands once. ``lengths``: as for ``run_layer``.
    """
    sites = [site for site in block.sites.values() if site.observer is not None]
    for h, own in zip(stream, lengths or [None] * len(stream), strict=True) if sites else ():
        with _within(sites, own), _once(sites), suppress(_Enough):
            block.forward(h, None, block.new_cache(h.shape[0]))


@torch.no_grad()
def run_layer(block: Block, stream: Stream, lengths: Lengths | None = None) -> Stream:
    """Send the stream through one block, in place: afterwards it is what the next block sees.

    ``lengths``: of every batch, tokens of each sequence where they differ; observers see no more of them. Not for
    observers of the state, which goes on to the end of the batch.
    """
    for number, h in enumerate(stream):
        with _within(block.sites.values(), lengths[number] if lengths else None):
            written, residual = block.forward(h, None, block.new_cache(h.shape[0]))
        stream[number] = residual + written
    return stream


@torch.no_grad()
def watch_head(
    config: ModelConfig, final_norm: Tensor, stream: Stream, site: Site, lengths: Lengths | None = None
) -> None:
    """Send the stream after the last block through the final norm, for the observer at the head's input."""
    for number, h in enumerate(stream if site.observer is not None else ()):
        with _within([site], lengths[number] if lengths else None):
            ops.rms_norm(h, None, final_norm.float(), config.norm_epsilon, site)


@contextmanager
def _within(sites: Iterable[Site], lengths: list[int] | None) -> Iterator[None]:
    """Within the block observers see every sequence by itself, as far as it goes."""

    def see(name: str, observer: Observer, x: Tensor) -> None:
        for row, length in enumerate(lengths or ()):
            observer(x[row, None, :length])

    with _replaced(sites if lengths else (), see):
        yield


@contextmanager
def _once(sites: Iterable[Site]) -> Iterator[None]:
    """Within the block the observers of these sites raise ``_Enough`` when the last of them has seen a tensor."""
    waiting = {site.name for site in sites}

    def see(name: str, observer: Observer, x: Tensor) -> None:
        observer(x)
        waiting.discard(name)
        if not waiting:
            raise _Enough

    with _replaced(sites, see):
        yield


@contextmanager
def _replaced(sites: Iterable[Site], see: Callable[[str, Observer, Tensor], None]) -> Iterator[None]:
    """Within the block ``see(site's name, its observer, tensor)`` stands where there are observers."""
    before = [(site, site.observer) for site in sites if site.observer is not None]
    try:
        for site, observer in before:
            site.observer = partial(see, site.name, observer)
        yield
    finally:
        for site, observer in before:
            site.observer = observer


def scales_of(statistics: Mapping[str, Statistics], specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """Statistics -> site tensors ``NAME.scale``, the codec's second number and ``NAME.index``.

    SquamataErrors name the site.
    """
    tensors: dict[str, Tensor] = {}
    for name, observed in statistics.items():
        with about(name):
            scale, second = scales.compute(observed, specs[name])
        tensors[f"{name}.scale"] = scale
        if second is not None:
            tensors[f"{name}.{specs[name].second}"] = second
        if observed.partition.index is not None:
            tensors[f"{name}.index"] = observed.partition.index
    return tensors
