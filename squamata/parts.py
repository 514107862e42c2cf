"""The whole story: load -> transform -> observe -> quantize, a layer at a time.

Memory is bounded by the embedding table, one layer, the calibration stream (samples x length x d_model x 8 bytes, 4
more where transforms observe, and where outputs are corrected) and one shard, however many layers the model has.
Weights with tables need the float model whole first, and from then on a float32 squared gradient for each of theirs
that is not quantized yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from squamata import scales, transform
from squamata.calibrate import correct, learn, whole
from squamata.calibrate.gradients import squared_gradients
from squamata.calibrate.observe import (
    Lengths,
    Stream,
    attach,
    attach_grams,
    run_layer,
    scales_of,
    watch_head,
    watch_layer,
)
from squamata.calibrate.tokens import joined
from squamata.kernels import ops
from squamata.kernels.dispatch import use_backend
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import Value, join_rows
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan.chunks import ChunkSites
from squamata.load.source import TensorSource
from squamata.models.checkpoint import Checkpoint, under
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel, build_block, head_site, model_layouts
from squamata.quantize import Statistics as WeightStatistics
from squamata.quantize import needs_gradients, needs_inputs, of_whole, quantize_tensors
from squamata.run.device import check_device
from squamata.scales.gram import Gram
from squamata.scales.statistics import Statistics
from squamata.spec.groups import ordered_sites
from squamata.spec.recipe import Recipe
from squamata.spec.sites import all_sites, input_of

TABLE_BLOCK = 2**27  # elements of the embedding or the head that are in float32 at a time
# On a GPU: tokens that run together, and of a chunk of the scan, whose work and memory grow with its length. Neither
# changes what is seen but by the order in which float32 sums are rounded.
TOKENS_AT_ONCE, CHUNK = 2**14, 64
FLOAT = Recipe.read("float")

Progress = Callable[[int, int], None]  # parts done, parts in all
Tensors = Mapping[str, Tensor]
Values = dict[str, Value]
Known = Mapping[str, WeightStatistics] | None  # of weights


class QuantizedParts:
    """The quantized model in parts, made in order: the embedding, every layer, then final norm and head.

    ``seen``: the calibration stream through the transformed float model, which gives the sites' scales. ``plain``: the
    same through the model as it came, where transforms observe it: its weights cannot read a rotated stream.
    ``rounded``: through the layers as they are quantized, which a weight quantizer that sees its inputs works with.
    ``served``: through the layers as they will run, sites and all, where a correction compares their outputs.
    All, and one layer at a time, are on ``device``. ``progress`` is told of every part, and of the steps of a second
    pass.
    """

    def __init__(
        self,
        source: TensorSource,
        recipe: Recipe,
        batches: list[Tensor],
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.source = source
        self.progress = progress
        self.recipe = recipe
        check_device(device)
        self.device = torch.device(device)
        self.specs = recipe.resolve(source.config.blocks)
        self.sites = all_sites(source.config.blocks)
        self.ordered = ordered_sites(self.specs, self.sites)
        on_host = self.device.type == "cpu"
        self.lengths: Lengths | None = None
        if not on_host:
            batches, self.lengths = joined(batches, TOKENS_AT_ONCE, self._observed_by_token)
        self.batches = [ids.to(self.device) for ids in batches]
        differ = self.specs.get("head.weight") != self.specs.get("embedding.weight")
        self.shares_table = source.config.tie_embeddings
        tied = self.shares_table and not differ and not transform.unties(recipe)
        self.config = source.config.model_copy(update={"tie_embeddings": tied})
        keeps_chunks = on_host or self._within_chunks
        self.working = self.config if keeps_chunks else self.config.model_copy(update={"chunk_size": CHUNK})
        self.layouts = model_layouts(source.config)
        self.known: dict[str, transform.Basis] = {}  # of the residual stream, if a transform must know it
        self.ends = partial(transform.apply_ends, recipe, self.config, self.known)
        self.bytes_read = 0
        self.seen: Stream = []
        self.plain: Stream = []
        self.rounded: Stream = []
        self.served: Stream = []
        self.choices: whole.Choices = {}
        self.tables: dict[str, WeightStatistics] | None = None  # what the whole model says of weights with tables
        self.refined: list[dict[str, Value]] = []  # all parts, of a recipe that needs the model whole

    @property
    def _observed_by_token(self) -> bool:
        """True if all that looks at the streams looks at tokens, so that a batch may hold more than its sequences."""
        states = [spec for name, spec in self.specs.items() if self.sites[name].kind == "state"]
        whole_streams = self.recipe.tune is not None or whole.needed(self.recipe, self.specs)
        return not whole_streams and not self._within_chunks and all(spec.dynamic for spec in states)

    @property
    def _within_chunks(self) -> bool:
        """True if a site is seen whose values depend on where the scan's chunks begin and end."""
        return any(name.rpartition(".")[2] in ChunkSites._fields for name in self.specs)

    @property
    def count(self) -> int:
        return self.config.n_layers + 2

    def make(self, number: int) -> Values:
        """Part ``number``; all before it must have been made here, or restored."""
        if self.device.type == "cpu":
            return self._refined(number)
        with self.device, use_backend("triton"):  # tensors are made there; the context costs every call a little
            return self._refined(number)

    def _refined(self, number: int) -> Values:
        """The part, after a second look at all of them if the recipe asks for one."""
        if not whole.needed(self.recipe, self.specs):
            return self._part(number)
        if not self.refined:
            parts = []
            for one in range(self.count):
                parts.append(self._part(one))
                self.tell(one + 1)
            self.seen, self.plain, self.rounded = [], [], []
            original = LanguageModel(Checkpoint(self.source.config, self._read("", again=True), FLOAT), "float")
            self.refined = whole.refined(
                self.recipe, original, self.config, parts, self.batches, self.choices, self.progress
            )
        return self.refined[number]

    def _part(self, number: int) -> Values:
        if number == 0:
            return self._embedding()
        return self._layer(number - 1) if number <= self.config.n_layers else self._end()

    def each(self) -> Iterator[Values]:
        """Every part in order."""
        for number in range(self.count):
            yield self.make(number)
            self.tell(number + 1)

    def tell(self, done: int) -> None:
        """Say how many parts are done, unless a second pass has told more."""
        if self.progress and not self.refined:
            self.progress(done, self.count)

    @property
    def _streams(self) -> tuple[tuple[str, Stream], ...]:
        return ("seen", self.seen), ("plain", self.plain), ("rounded", self.rounded), ("served", self.served)

    def streams(self) -> dict[str, Tensor]:
        """What the next part needs of those before it."""
        streams = {f"{name}.{batch}": h for name, stream in self._streams for batch, h in enumerate(stream)}
        return streams | {f"known.{name}": basis.vectors for name, basis in self.known.items()}

    def restore(self, finished: int, streams: Tensors) -> None:
        """Go on after ``finished`` parts, with the streams that they left."""
        for name, stream in self._streams:
            inside = under(f"{name}.", streams) if finished else {}
            stream += [inside[str(batch)].to(self.device) for batch in range(len(inside))]
        known = under("known.", streams) if finished else {}
        self.known |= {name: transform.Basis(vectors.to(self.device)) for name, vectors in known.items()}

    def _sequences(self) -> Iterator[Tensor]:
        """Token ids (L,) of every calibration sequence, as far as it goes."""
        for number, ids in enumerate(self.batches):
            lengths = (self.lengths and self.lengths[number]) or [ids.shape[1]] * len(ids)
            yield from (row[:length] for row, length in zip(ids, lengths, strict=True))

    def _embedding(self) -> Values:
        name = "embedding.weight"
        table = self._read(name)[name]
        if transform.needs_stream(self.recipe):
            self.known["stream"] = transform.stream_basis(self.config, (table[ids] for ids in self._sequences()))
        quantized = self._quantize_ends({name: table}, name)
        if calibrated_sites(self.recipe, self.config) or self.recipe.correct:
            rows = [self.ends({name: table[ids.flatten()]})[name] for ids in self.batches]
            self.seen = [part.float().reshape(*ids.shape, -1) for part, ids in zip(rows, self.batches, strict=True)]
        if any(transform.needs(self.recipe, kind) for kind in self.config.blocks):
            self.plain = [table[ids].float() for ids in self.batches]
        if needs_inputs(self.recipe):
            self.rounded = [ops.embedding(ids, quantized[name], torch.float32) for ids in self.batches]
        if self.recipe.correct:
            self.served = [ops.embedding(ids, quantized[name], torch.float32) for ids in self.batches]
        return quantized

    def _layer(self, layer: int) -> Values:
        prefix = f"layers.{layer}."
        kind, read = self.config.blocks[layer], under(prefix, self._read(prefix))
        observed = self._observed(layer, read)
        tensors = transform.apply(self.recipe, self.config, kind, read, {**observed, **self.known})
        maps = self._take_maps(prefix, tensors)
        scales_found: dict[str, Tensor] = {}
        tuned = self.recipe.tune is not None and not learn.aims_at_logits(self.recipe)
        if self.seen:
            block = build_block(self.working, layer, tensors, site_tensors=maps)
            statistics = attach(block.sites.values(), self.specs)
            entering = list(self.seen) if tuned else []
            if self.served:
                written = correct.mean_output(block, self.seen, self.lengths)
            else:
                run_layer(block, self.seen, self.lengths)
            scales_found = self._scales_of(statistics)
        known = {**self._grams(layer, tensors), **self._tables(prefix)}
        orders = {prefix + name: order for name, order in maps.items() if name.endswith(".order")}
        quantized = self._quantize({prefix + name: tensor for name, tensor in tensors.items()}, known, orders=orders)
        if self.seen and tuned:
            specs, start = under(prefix, self.specs), under(prefix, scales_found | orders)
            student = build_block(self.working, layer, under(prefix, quantized), specs, start, "simulate")
            scales_found |= learn.tune(self.recipe, block, student, entering)
        if self.rounded:
            run_layer(build_block(self.working, layer, under(prefix, quantized)), self.rounded)
        if self.served:
            quantized |= self._corrected(layer, quantized, scales_found | orders, written)
        return {**scales_found, **orders, **quantized}

    def _corrected(self, layer: int, quantized: Values, scales_found: Tensors, written: Tensor) -> Values:
        """out_proj's bias with which the layer's output has lost less of the mean that the float layer has written."""
        prefix = f"layers.{layer}."
        tensors, found = under(prefix, quantized), under(prefix, scales_found)
        block = build_block(self.working, layer, tensors, under(prefix, self.specs), found, "simulate")
        with use_backend("ref"):
            bias = correct.correction(self.recipe, written - correct.mean_output(block, self.served, self.lengths))
        for h in self.served:
            h += bias
        before = tensors.get(correct.OUTPUT_BIAS)
        return {prefix + correct.OUTPUT_BIAS: bias if before is None else bias + before}

    def _end(self) -> Values:
        tensors = self._read("final_norm.weight")
        if not self.config.tie_embeddings:
            name = "embedding.weight" if self.shares_table else "head.weight"
            tensors["head.weight"] = self._read(name, again=self.shares_table)[name]
        few = {name: part[:1] if part.ndim > 1 else part for name, part in tensors.items()}
        final_norm = self.ends(few)["final_norm.weight"]
        site = head_site(self.config)
        statistics = attach([site], self.specs)
        watch_head(self.config, final_norm, self.seen, site, self.lengths)
        scales_found = self._scales_of(statistics)
        grams: dict[str, Gram] = {}
        if "head.weight" in tensors:
            grams = self._watched_grams([site], tensors)
            watch_head(self.config, final_norm, self.rounded, site, self.lengths)
        return {**scales_found, **self._quantize_ends(tensors, "head.weight", grams)}

    def _quantize_ends(self, tensors: Tensors, table: str, known: Known = None) -> Values:
        """Transformed and quantized, the table some of its rows at a time unless rows share a scale: in float32 it may
        be larger than all of the result.
        """
        every_row, spec = tensors.get(table), self.specs.get(table)
        if every_row is None or (spec and not Partition(spec.granularity, self.layouts[table]).row_by_row):
            return self._quantize(self.ends(tensors), known)
        parts = []
        for rows in every_row.split(max(1, TABLE_BLOCK // every_row.shape[-1])):
            layout = {table: self.layouts[table].of_rows(len(rows))}
            parts.append(self._quantize(self.ends({**tensors, table: rows}), known, layout))
        return parts[0] | {table: join_rows([part[table] for part in parts])}

    def _scales_of(self, statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
        searched = [name for name in statistics if scales.searched_by_output(self.specs[name])]
        self.choices |= {name: scales.choices(statistics[name], self.specs[name]) for name in searched}
        return scales_of(statistics, self.specs)

    def _observed(self, layer: int, tensors: Tensors) -> dict[str, Statistics]:
        """What the recipe's transforms need to know of a layer as it came, by site (``mixer.u``)."""
        prefix = f"layers.{layer}."
        needed = transform.needs(self.recipe, self.config.blocks[layer])
        if not self.plain:
            return {}
        block = build_block(self.working, layer, tensors)
        wanted = {prefix + site: spec for site, spec in needed.items()}
        statistics = attach(block.sites.values(), wanted, transform.observer(self.recipe))
        run_layer(block, self.plain, self.lengths)
        return under(prefix, statistics)

    def _tables(self, prefix: str) -> dict[str, WeightStatistics]:
        """What the whole float model says of one layer's weights with tables; the first call looks at all of it."""
        if self.tables is None:
            names = [name for name, spec in self.specs.items() if spec.tabulated]
            self.tables = self._look_at_whole(names) if names else {}
        return {name: self.tables.pop(name) for name in list(self.tables) if name.startswith(prefix)}

    def _look_at_whole(self, names: list[str]) -> dict[str, WeightStatistics]:
        tensors, squares = self._read("", again=True), None
        if needs_gradients(self.recipe):
            sequences = list(self._sequences())
            squares = squared_gradients(self.source.config, tensors, sequences, names, self.progress)
        return {**of_whole(self.recipe, {name: tensors[name] for name in names}, self.specs, squares)}

    def _grams(self, layer: int, tensors: Tensors) -> dict[str, Gram]:
        """What the layer's weights multiply when all layers before it are quantized."""
        if not self.rounded:
            return {}
        block = build_block(self.working, layer, tensors)
        prefix = f"layers.{layer}."
        grams = self._watched_grams(block.sites.values(), {prefix + name: tensors[name] for name in tensors})
        watch_layer(block, self.rounded, self.lengths)
        return grams

    def _watched_grams(self, sites: Iterable[Site], tensors: Tensors) -> dict[str, Gram]:
        """Observers for the inputs of those of the weights that the recipe quantizes."""
        weights = [name for name in tensors if name in self.specs] if self.rounded else []
        return attach_grams(sites, {name: input_of(name, self.sites[name]) for name in weights})

    def _take_maps(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what transforms left for sites out of the tensors: the index maps of those that the recipe makes ragged,
        and the order of channels where it keeps some.
        """
        maps = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".index", ".order"))}
        wanted = {}
        for name, one in maps.items():
            site, _, part = name.rpartition(".")
            spec = self.specs.get(prefix + site)
            ragged = spec is not None and spec.granularity.ragged
            if ragged if part == "index" else prefix + site in self.ordered:
                wanted[name] = one
        return wanted

    def _read(self, prefix: str, again: bool = False) -> dict[str, Tensor]:
        with torch.device("cpu"):
            read = self.source.tensors(prefix)
        tensors = {name: tensor.to(self.device) for name, tensor in read.items()}
        self.bytes_read += 0 if again else sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _quantize(
        self,
        tensors: Tensors,
        known: Known = None,
        rows: dict[str, Layout] | None = None,
        orders: Tensors | None = None,
    ) -> Values:
        weights = [name for name in tensors if name in self.sites] if orders else []
        own = {name: (orders or {}).get(f"{input_of(name, self.sites[name])}.order") for name in weights}
        found = {name: order for name, order in own.items() if order is not None}
        return quantize_tensors(self.recipe, tensors, self.specs, self.layouts | (rows or {}), known, found)


def calibrated_sites(recipe: Recipe, config: ModelConfig) -> list[str]:
    """Sites whose values must be seen beforehand: those with a static scale, and those that transforms look at."""
    looked_at = [
        f"layers.{layer}.{site}" for layer, kind in enumerate(config.blocks) for site in transform.needs(recipe, kind)
    ]
    stream = ["layers.0.mixer.in"] if transform.needs_stream(recipe) else []
    return [*recipe.static_sites(config.blocks), *stream, *looked_at]
