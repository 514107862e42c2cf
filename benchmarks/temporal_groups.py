"""QMamba's temporal groups (TGQ) for a language model's state: static int8 scales that change with the position.

    python benchmarks/temporal_groups.py --model MODELS/mamba2-24m --calibration pile.jsonl --text heldout.jsonl

Nothing but the state is quantized, at every step of decoding. Scales are found for each group of positions, or for all
together; after the last group's end its scale goes on. At a group's first token the state is rounded once more, to the
new scale. KL to the float model with its bootstrap interval over documents.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import squamata
from squamata.calibrate.tokens import sample
from squamata.evaluate.uncertainty import ratio_interval
from squamata.kernels.qtensor import QTensor
from squamata.kernels.site import Site, encode, observing
from squamata.load.source import open_source
from squamata.models.block import ScanCache
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.scales.statistics import quantile
from squamata.spec.recipe import Calibration, Recipe
from squamata.text import read_documents

ENDS = (16, 64, 256)  # positions at which a group ends; the last has no end
LOOK = 16  # tokens between two looks at the state


def thresholds(model: LanguageModel, batches: list[Tensor], granularity: str) -> dict[str, list[Tensor]]:
    """Site -> a threshold a group of positions: the largest |h| of a channel, or the tensor's 0.9995 quantile."""
    found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    states = [site for site in model.sites() if site.name.endswith("state")]
    for ids in batches:
        cache = model.new_cache(len(ids))
        for start in range(0, ids.shape[1], LOOK):
            group = sum(start >= end for end in ENDS)

            def look(site: Site, h: Tensor, group: int = group) -> None:
                most = (
                    h.abs().amax((0, -1)) if granularity == "channel" else quantile(h.abs().reshape(1, -1), 0.9995)[0]
                )
                found[site.name, group].append(most.detach().clone())

            with observing(states, look):
                model.forward(ids[:, start : start + LOOK], cache)
    combine = torch.amax if granularity == "channel" else torch.mean
    return {
        site.name: [combine(torch.stack(found[site.name, group]), 0) for group in range(len(ENDS) + 1)]
        for site in states
    }


def divergences(reference: LanguageModel, model: LanguageModel, ids: Tensor, scales: dict[str, list[Tensor]]) -> Tensor:
    """KL of every token (B, L), decoding with the scales of its position's group."""
    states = [site for site in model.sites() if site.name.endswith("state")]
    for site in states:
        site.set_scale(scales[site.name][0])
    caches = reference.new_cache(len(ids)), model.new_cache(len(ids))
    kls = []
    for position in range(ids.shape[1]):
        if position in ENDS:
            for site, memory in zip(states, caches[1], strict=True):
                assert isinstance(memory, ScanCache) and isinstance(memory.state, QTensor) and site.spec is not None
                held = memory.state.dequantize()
                site.set_scale(scales[site.name][1 + ENDS.index(position)])
                memory.state = encode(held, site.expanded(), site.spec)
        p = reference.step(ids[:, position], caches[0]).double().log_softmax(-1)
        q = model.step(ids[:, position], caches[1]).double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
    return torch.stack(kls, 1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    reference, source = squamata.load(options.model), open_source(options.model)
    settings = Calibration(samples=16, length=options.length, batch=8)
    batches = sample(options.calibration, reference.tokenizer, settings, 0).batches()
    texts = [reference.tokenizer.encode(text) for text in read_documents(options.text)]
    ids = torch.tensor([text[: options.length] for text in texts if len(text) >= options.length][: options.documents])
    for granularity in ("tensor", "channel"):
        spec: dict[str, Any] = {"bits": 8, "granularity": granularity}
        recipe = Recipe.from_mapping({"name": "state", "rules": [{"site": "*.mixer.state", "spec": spec}]})
        by_group = thresholds(reference, batches, granularity)
        growth = torch.stack([torch.stack([one.mean() for one in groups]) for groups in by_group.values()])
        print(granularity, "threshold by group, share of the last:", (growth / growth[:, -1:]).mean(0).tolist())
        variants = {
            "one group": {name: [torch.stack(found).amax(0)] * len(found) for name, found in by_group.items()},
            "last group": {name: [found[-1]] * len(found) for name, found in by_group.items()},
            "temporal groups": by_group,
        }
        for name, limits in variants.items():
            scales = {site: [limit / 127 for limit in found] for site, found in limits.items()}
            tensors = {f"{site}.scale": found[0] for site, found in scales.items()}
            model = LanguageModel(Checkpoint(source.config, source.tensors(), recipe, tensors))
            kl = divergences(reference, model, ids, scales)
            ends = [0, *ENDS, kl.shape[1]]
            bins = [float(kl[:, start:stop].mean()) for start, stop in itertools.pairwise(ends)]
            interval = ratio_interval(kl.sum(1).numpy(), torch.full((len(kl),), kl.shape[1]).numpy())
            print(f"{granularity:8} {name:16} {float(kl.mean()):.5f} {interval} by group {bins}", flush=True)


if __name__ == "__main__":
    main()
