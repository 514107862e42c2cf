"""What one decoded token moves and computes: bytes by what they are for, products by precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from squamata.hardware.counts import Count
from squamata.models.config import OUTPUT_BIAS, ModelConfig, parameter_shapes
from squamata.spec.recipe import Recipe

UNTYING = frozenset({"fold_norm"})  # transforms after which a head cannot be the embedding
CONVOLVED = {"mamba1": ("x",), "mamba2": ("x", "B", "C")}
SCAN_MACS = 3  # a state element: times the decay, plus B times u, times C
DYNAMIC_SCALE_BITS = 32


@dataclass(frozen=True)
class Traffic:
    """Bytes a token: ``weights`` (scales included; of the embedding only the head's use of it), ``state`` and ``conv``
    (cache, read and written), ``embedding`` (one row), ``logits``. ``activations``: what the sites hold, written once
    and read once, and the residual stream; it stays on the chip."""

    weights: float
    state: float
    conv: float
    embedding: float
    logits: float
    activations: float

    def dram(self, batch: int) -> float:
        """Bytes a token when so many sequences share one reading of the weights."""
        return self.weights / batch + self.state + self.conv + self.embedding + self.logits


def traffic(config: ModelConfig, found: Mapping[str, Count], float_bits: int) -> Traffic:
    """The bytes of one token of one sequence."""
    sites = [count for count in found.values() if count.info and count.info.kind == "activation"]
    states = [count for count in found.values() if count.info and count.info.kind == "state"]
    embedding, residual = found["embedding.weight"], config.d_model * float_bits / 8
    return Traffic(
        weights=sum(count.data_bytes + count.scale_bytes for count in read_weights(config, found)),
        state=sum(2 * (count.data_bytes + _dynamic_scales(count)) for count in states),
        conv=sum(_conv_cache(config, found, layer) for layer in range(config.n_layers)),
        embedding=(embedding.data_bytes + embedding.scale_bytes) / config.vocab_size,
        logits=config.vocab_size * float_bits / 8,
        activations=sum(2 * count.data_bytes for count in sites) + 2 * config.n_layers * residual,
    )


def read_weights(config: ModelConfig, found: Mapping[str, Count]) -> Iterable[Count]:
    """Tensors of which a token reads every element: all but the embedding table, which the head reads if it is its."""
    added = [name for name in found if name.endswith(OUTPUT_BIAS)]  # by a correction, or the model's own
    names = dict.fromkeys([*parameter_shapes(config), "head.weight", *added])
    return [found[name] for name in names if name != "embedding.weight"]


def stored_bytes(config: ModelConfig, recipe: Recipe, found: Mapping[str, Count]) -> float:
    """Of all weights in memory; embedding and head are one table if the model ties them and the recipe leaves it so."""
    embedding, head = found["embedding.weight"], found["head.weight"]
    read = sum(count.data_bytes + count.scale_bytes for count in read_weights(config, found))
    untied = UNTYING & {transform.name for transform in recipe.transforms}
    shared = config.tie_embeddings and embedding.spec == head.spec and not untied
    return read + (0 if shared else embedding.data_bytes + embedding.scale_bytes)


def conv_macs(config: ModelConfig, layer: int) -> int:
    """Products of one layer's convolution for one token: x, and in Mamba-2 B and C as well."""
    shared = 2 * config.n_groups * config.d_state if config.blocks[layer] == "mamba2" else 0
    return (config.d_inner + shared) * config.d_conv


def macs(config: ModelConfig, found: Mapping[str, Count]) -> dict[str, int]:
    """Products and sums of one token by precision: ``int8``, ``float16``, ``float32``.

    Two quantized operands meet as int8 (4-bit weights are unpacked), anything else as float16, scans as float32.
    Norms, gates, exponentials and rotations, below one operation in a hundred, are left out.
    """
    total: Counter[str] = Counter({"int8": 0, "float16": 0, "float32": 0})
    for weight in found.values():
        if weight.info and weight.info.reads:
            total[precision(weight, _read_by(weight, found))] += weight.elements
    for layer, kind in enumerate(config.blocks):
        total[conv_precision(found, layer, kind)] += conv_macs(config, layer)
        total["float32"] += SCAN_MACS * found[f"layers.{layer}.mixer.state"].elements
    return dict(total)


def _read_by(weight: Count, found: Mapping[str, Count]) -> Count:
    """The site that a weight multiplies; where the recipe represents it apart for products, that one."""
    assert weight.info is not None
    layer = f"layers.{weight.name.split('.')[1]}." if weight.name.startswith("layers.") else ""
    site = found[layer + weight.info.reads]
    assert site.info is not None
    return found.get(f"{layer}mixer.{site.info.apart}", site)


def conv_precision(found: Mapping[str, Count], layer: int, kind: str) -> str:
    """A convolution sums over its taps: integers serve if weight and every input are quantized, none along them."""
    weight = found[f"layers.{layer}.mixer.conv.weight"]
    inputs = [found[f"layers.{layer}.mixer.{name}"] for name in CONVOLVED[kind]]
    along_taps = weight.spec is not None and "tap" in weight.spec.granularity.axes
    return "float16" if along_taps else precision(weight, *inputs)


def precision(*operands: Count) -> str:
    """``int8`` if every operand is an integer times a scale."""
    return "int8" if all(operand.spec and operand.spec.integer_grid for operand in operands) else "float16"


def _conv_cache(config: ModelConfig, found: Mapping[str, Count], layer: int) -> float:
    """Bytes of the last inputs read, and of the new one written."""
    inputs = (found[f"layers.{layer}.mixer.{name}"] for name in CONVOLVED[config.blocks[layer]])
    return sum(config.d_conv * count.data_bytes for count in inputs)


def _dynamic_scales(state: Count) -> float:
    """A scale taken at run time is kept beside its state."""
    return state.scales * DYNAMIC_SCALE_BITS / 8 if state.spec and state.spec.dynamic else 0
