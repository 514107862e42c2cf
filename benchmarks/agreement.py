"""Simulation equals integers: how many codes differ between simulation, reference kernels and CPU kernels.

    python benchmarks/agreement.py [MODEL ...] [--recipes NAME ...] [--tokens 512] [--decoded 64] --json FILE

Every recipe that ships, on every model (the bundled one unless given): quantized, then a prefill and 64 greedy tokens.
Each layer is judged by itself: all contestants get the layer's input and memory from the reference kernels. Codes are
taken as kernels store them, fused ones too. In prefill every site is compared; in decode, where the CPU runs one
compiled call, what the layer remembers: the convolution's inputs and the state.

What must hold (exit status 1 if it does not):
- exact: sites whose value is an exact sum of integers times a scale: no code may differ;
- float: sites that a float reduction or function (norm, SiLU, rotation, scan) comes before: one unit in at most one
  value of 100000, where the reference's value lies within a thousandth of a code of a tie;
- run-time: the same with a scale that is itself a float of the row: one unit, at such ties only.

A code that differs changes what is computed from it. Tokens that depend on one are no longer compared, and counted as
*after*. (In decode the sites between are not seen: there a token whose hidden sites have a tie counts as *after*.)
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.kernels.landing import Landing
from squamata.kernels.qtensor import QTensor, Value, as_float, store
from squamata.kernels.site import Site
from squamata.load.hub import bundled, resolve
from squamata.load.tokenizer import Tokenizer
from squamata.models.block import Block
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.models.mamba1 import Mamba1
from squamata.pipeline import quantize
from squamata.run.decode_plan import Decoder, NotPlannableError
from squamata.save.read import read_checkpoint
from squamata.spec.recipe import Recipe, recipe_names
from squamata.text import read_documents

NEAR = 1e-3  # codes: how far from a tie a value may be that rounds the other way
SHARE = 1e-5  # of the values of a float site
CONTESTANTS = {"simulation": ("simulate", "ref"), "reference": ("integer", "ref"), "cpu": ("integer", "cpu")}
WITHIN_CHUNKS = ("scores", "u_scaled", "chunk_decay")  # not one row a token, and nobody but the reference rounds there
BEFORE_STATE = ("in", "z", "x", "u", "B_conv", "C_conv", "dt_low", "B", "C", "dt", "log_decay", "decay", *WITHIN_CHUNKS)
# a norm, SiLU, scan, exponential or rotation comes before
AFTER_FLOAT = ("in", "u", "B_conv", "C_conv", "log_decay", "decay", "state", "y", "out")
Class = Literal["exact", "float", "run-time"]


@dataclass
class Count:
    """One site, all layers together: how the codes of one contestant differ from the reference's."""

    model: str
    recipe: str
    phase: str
    site: str
    contestant: str
    kind: Class
    values: int = 0
    differing: int = 0
    after: int = 0
    units: int = 0
    farthest: float = 0.0

    @property
    def violated(self) -> bool:
        """True if this is more than what must hold allows; one differing value of a float site is always allowed."""
        if self.differing == 0:
            return False
        if self.kind == "exact" or self.contestant == "simulation" or self.units > 1 or self.farthest > NEAR:
            return True
        return self.kind == "float" and self.differing > max(1.0, SHARE * self.values)

    def add(self, off: Tensor, ties: Tensor, judged: Tensor) -> None:
        """Units by which codes differ, how far their values were from a tie, and where to look; all of one shape."""
        differing = (off > 0) & judged
        self.values += int(judged.sum())
        self.differing += int(differing.sum())
        self.after += int(((off > 0) & ~judged).sum())
        if bool(differing.any()):
            self.units = max(self.units, int(off[differing].max()))
            self.farthest = max(self.farthest, float(ties[differing].max()))


@dataclass
class Landed:
    """What landed on a site: codes, and of the reference how far every value was from a tie."""

    codes: Tensor
    ties: Tensor = field(default_factory=lambda: torch.ones(()))  # not known


@contextmanager
def recording() -> Iterator[dict[str, Landed]]:
    """Within the block: the codes of every site, as kernels store them, by full name."""
    found: dict[str, Landed] = {}
    land, value = Site.land, Landing.value

    def noting_land(site: Site, x: Tensor) -> Value:
        landed = land(site, x)
        if isinstance(landed, QTensor):
            found[site.name] = Landed(landed.codes().int(), _from_tie(x, landed))
        return landed

    def noting_value(room: Landing) -> Value:
        landed = value(room)
        if room.site is not None and isinstance(landed, QTensor):
            found[room.site.name] = Landed(landed.codes().int())
        return landed

    with patch.object(Site, "land", noting_land), patch.object(Landing, "value", noting_value):
        yield found


def _from_tie(x: Tensor, landed: QTensor) -> Tensor:
    """Distance of every value, in codes, from where rounding changes."""
    part = (x.float() * (1.0 / landed.element_scale())).abs().frac()
    return torch.minimum(part, 1 - part) if landed.spec.rounding == "truncate" else (part - 0.5).abs()


class Judge:
    """One checkpoint, three ways to run it, and the counts."""

    def __init__(self, checkpoint: Checkpoint, model: str) -> None:
        self.models = {name: LanguageModel(checkpoint, mode) for name, (mode, _) in CONTESTANTS.items()}  # type: ignore[arg-type]
        self.labels = (model, checkpoint.recipe.name)
        self.counts: dict[tuple[str, str, str], Count] = {}
        self.logits = 0.0
        self.other_choice = 0
        self.decoders = [self._decoder(layer) for layer in range(checkpoint.config.n_layers)]
        self.whole = Decoder(self.models["cpu"]) if None not in self.decoders else None

    @property
    def reference(self) -> LanguageModel:
        return self.models["reference"]

    def _decoder(self, layer: int) -> Decoder | None:
        """The compiled call for one layer: of a model that has no other, whose only token is the layer's input."""
        alone = copy.copy(self.models["cpu"])
        alone.blocks, alone.embedding = [alone.blocks[layer]], torch.zeros(1, alone.config.d_model)
        try:
            return Decoder(alone)
        except NotPlannableError:
            return None

    def count(self, phase: str, site: Site, contestant: str, kind: Class) -> Count:
        name = site.name if site.name == "head.in" else _name(site)
        return self.counts.setdefault((phase, name, contestant), Count(*self.labels, phase, name, contestant, kind))

    def run(self, ids: Tensor, decoded: int) -> None:
        """Prefill of ids (1, L), then greedy tokens."""
        cache = self.reference.new_cache()
        logits = self._pass(ids, cache, "prefill")
        for _ in range(decoded):
            logits = self._pass(logits[:, -1:].argmax(-1), cache, "decode")

    def _pass(self, ids: Tensor, cache: list[Any], phase: str) -> Tensor:
        """All layers on the reference, each beside the others; returns the reference's logits (1, L, V)."""
        whole = self.models["cpu"].new_cache()
        for mine, theirs in zip(whole, cache, strict=True):
            _copy(mine, theirs)
        h, residual = ops.embedding(ids, self.reference.embedding, torch.float32), None
        for layer in range(len(self.reference.blocks)):
            h, residual = self._layer(layer, h, residual, cache, phase)
        with use_backend("ref"), recording() as expected:
            logits = self.reference.logits(h, residual)
        for contestant, (_, backend) in CONTESTANTS.items():
            if contestant != "reference":
                with use_backend(backend), recording() as found:
                    self.models[contestant].logits(h, residual)
                self._compare([self.reference.head_site], found, expected, contestant, phase, 1)
        if phase == "decode":
            self._whole(ids, whole, logits)
        return logits

    def _layer(self, layer: int, h: Tensor, residual: Tensor | None, cache: list[Any], phase: str) -> Any:
        """One layer from the same input and memory; returns the reference's output, whose memory moves on."""
        blocks = {name: model.blocks[layer] for name, model in self.models.items()}
        memories = {name: block.new_cache(1) for name, block in blocks.items()}
        for memory in memories.values():
            _copy(memory, cache[layer])
        with use_backend("ref"), recording() as expected:
            result = blocks["reference"].forward(h, residual, cache[layer])
        sites = list(blocks["reference"].sites.values())
        taps = self.reference.config.d_conv
        for name, (_, backend) in CONTESTANTS.items():
            if name == "reference":
                continue
            if (decoder := self.decoders[layer]) is not None and (name, phase) == ("cpu", "decode"):
                assert isinstance(decoder.model.embedding, Tensor)
                decoder.model.embedding.copy_(h[0] if residual is None else (h + residual)[0])
                decoder.step(torch.zeros(1, dtype=torch.int64), [memories[name]])
                self._compare_memory(blocks["reference"], memories[name], cache[layer], expected)
                continue
            with use_backend(backend), recording() as found:
                blocks[name].forward(h, residual, memories[name])
            self._compare(sites, found, expected, name, phase, taps)
        return result

    def _compare(
        self,
        sites: list[Site],
        found: dict[str, Landed],
        expected: dict[str, Landed],
        contestant: str,
        phase: str,
        taps: int,
    ) -> None:
        """Site by site in the order of the data; a token that depends on a differing code is not judged."""
        spoiled: Tensor | None = None  # (B, L)
        for site in sorted(sites, key=_order):
            if site.name not in expected or _name(site) in WITHIN_CHUNKS:
                continue
            name, reference = _name(site), expected[site.name]
            off = (found[site.name].codes - reference.codes).abs()
            if name == "state":
                judged = torch.full_like(off, spoiled is None or not bool(spoiled.any()), dtype=torch.bool)
            else:
                spoiled = torch.zeros(off.shape[:2], dtype=torch.bool) if spoiled is None else spoiled
                spoiled = _reach(spoiled, name, taps)
                judged = ~spoiled[..., None].expand_as(off)
            self.count(phase, site, contestant, self._class(site)).add(off, reference.ties, judged)
            if name != "state":
                spoiled = spoiled | (off > 0).any(-1)

    def _compare_memory(self, block: Block, mine: Any, theirs: Any, expected: dict[str, Landed]) -> None:
        """What a compiled layer remembers after one token."""
        found = {name.split(".")[-1]: landed for name, landed in expected.items()}
        for part, site, inputs in (("conv", "x", ("in",)), ("state", "state", BEFORE_STATE)):
            ours, reference = getattr(mine, part), getattr(theirs, part)
            if not isinstance(reference, QTensor):
                continue
            off = (ours.codes().int() - reference.codes().int()).abs()
            near = [bool((found[name].ties < NEAR).any()) for name in inputs if name in found]
            ties = found["state"].ties if part == "state" else torch.ones(off.shape)
            if part == "conv":  # its newest column is what came in
                news = [found[name].ties[:, -1] for name in ("x", "B", "C") if name in found]
                ties[..., -1] = torch.cat(news, -1)[:, : off.shape[1]]
            key = ("decode", "inputs kept" if part == "conv" else part, "cpu")
            count = self.counts.setdefault(key, Count(*self.labels, *key[:2], "cpu", self._class(block.sites[site])))
            count.add(off, ties, torch.full_like(off, not (any(near) and bool(off.any())), dtype=torch.bool))

    def _class(self, site: Site) -> Class:
        assert site.spec is not None
        if site.spec.dynamic:
            return "run-time"
        name = _name(site)
        if name in AFTER_FLOAT:
            return "float"
        block = self.reference.blocks[int(site.name.split(".")[1])]
        if isinstance(block, Mamba1) and name not in ("x", "z"):
            scan = block.scan
            projection, read = (scan.dt_proj, "dt_low") if name == "dt" else (scan.x_proj, "u")
            if read == "u" and scan.bcdt_norm_epsilon is not None:
                return "float"
        else:
            projection, read = block.in_proj, "in"  # type: ignore[attr-defined]
        weight = projection.weight
        exact = isinstance(weight, QTensor) and not weight.spec.granularity.group and block.sites[read].quantized
        return "exact" if exact else "float"

    def _whole(self, ids: Tensor, memory: list[Any], logits: Tensor) -> None:
        """The whole compiled token from the reference's memory: how far its logits are."""
        if self.whole is None:
            return
        ours = self.whole.step(ids[0], memory)
        self.logits = max(self.logits, float((ours - logits[:, -1]).abs().max() / logits.abs().max()))
        self.other_choice += int(ours.argmax() != logits[0, -1].argmax())


def _order(site: Site) -> int:
    """Place of a site in the data's way: what the convolution and the scan read before what they write."""
    return (*BEFORE_STATE, "state", "y", "out").index(_name(site))


def _name(site: Site) -> str:
    return site.name.split(".")[-1]


def _reach(spoiled: Tensor, name: str, taps: int) -> Tensor:
    """Tokens (B, L) that see a differing code: through the convolution ``taps``, through the scan all that follow."""
    if name in ("y", "out"):
        return spoiled.cummax(1).values
    if name in ("u", "B_conv", "C_conv"):
        wide = spoiled.clone()
        for shift in range(1, min(taps, spoiled.shape[1])):
            wide[:, shift:] |= spoiled[:, :-shift]
        return wide
    return spoiled


def _copy(mine: Any, theirs: Any) -> None:
    """One layer's memory, whatever carries its codes."""
    for part in ("conv", "state"):
        value = getattr(theirs, part)
        ours = getattr(mine, part)
        if isinstance(value, QTensor):
            ours.data.copy_(value.data)
            if value.spec.dynamic:
                ours.scale.copy_(value.scale)
        else:
            store(ours, as_float(value))


def table(counts: list[Count]) -> str:
    """Markdown."""
    lines = ["| phase | site | class | contestant | values | differing | after | most units | farthest from a tie |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        row = (
            count.phase,
            count.site,
            count.kind,
            count.contestant,
            count.values,
            count.differing,
            count.after,
            count.units,
        )
        mark = " VIOLATED" if count.violated else ""
        lines.append(f"| {' | '.join(map(str, row))} | {count.farthest:.1e}{mark} |")
    return "\n".join(lines)


def text_ids(folder: Path, text: Path, tokens: int) -> Tensor:
    """The first tokens of a text, (1, L)."""
    ids: list[int] = []
    tokenizer = Tokenizer.read(folder)
    for document in read_documents(text):
        ids += tokenizer.encode(document)
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise SquamataError(f"{text}: has {len(ids)} tokens, {tokens} are wanted")


@torch.no_grad()
def judge(folder: Path, recipe: str, arguments: argparse.Namespace) -> Judge:
    """Quantize, reload, compare."""
    ids = text_ids(folder, arguments.text, arguments.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        sample = {"calibration": arguments.calibration, "samples": arguments.samples, "length": arguments.length}
        quantize(folder, recipe, Path(scratch) / "quantized", **sample)
        judged = Judge(read_checkpoint(Path(scratch) / "quantized"), folder.name)
    judged.run(ids, arguments.decoded)
    return judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["bundled"])
    exact = [name for name in recipe_names() if not Recipe.read(name).stochastic]
    parser.add_argument("--recipes", nargs="+", default=exact)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--text", type=Path, default=bundled() / "excerpt.jsonl")
    parser.add_argument("--calibration", type=Path, default=bundled() / "calibration.jsonl")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        for recipe in arguments.recipes:
            judged = judge(resolve(model), recipe, arguments)
            counts = list(judged.counts.values())
            print(f"\n{model}, {recipe}\n\n{table(counts)}")
            decoded = f"{judged.logits:.1e} of the largest, {judged.other_choice} of {arguments.decoded} choices differ"
            print(f"\nlogits of the whole compiled token: {decoded}", flush=True)
            rows += [asdict(count) | {"violated": count.violated} for count in counts]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    violations = [row for row in rows if row["violated"]]
    print(f"\n{len(rows)} counts, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
