"""LanguageModel: embedding, blocks, final norm, head. One definition for float, simulation and integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from squamata.errors import SquamataError, nearest
from squamata.kernels import ops
from squamata.kernels.linear import Linear
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value, as_float
from squamata.kernels.site import Mode, Site
from squamata.models.block import Block, LayerCache, ScanCache, make_sites, second_name, tensor_layouts
from squamata.models.checkpoint import Checkpoint, under
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.models.mamba1 import Mamba1
from squamata.models.mamba2 import Mamba2
from squamata.spec.quant import QuantSpec

KINDS: dict[str, type[Block]] = {"mamba1": Mamba1, "mamba2": Mamba2}

Cache = list[LayerCache]


def build_block(
    config: ModelConfig,
    layer: int,
    tensors: Mapping[str, Value],
    specs: Mapping[str, QuantSpec] | None = None,
    site_tensors: Mapping[str, Tensor] | None = None,
    mode: Mode = "float",
    dtype: torch.dtype = torch.float32,
) -> Block:
    """One layer from its tensors, specs and site tensors, all named without the ``layers.N.`` prefix."""
    kind = KINDS[config.blocks[layer]]
    sites = make_sites(kind.kind, kind.site_sizes(config), specs, site_tensors or {}, mode, prefix=f"layers.{layer}.")
    return kind(config, tensors, sites, dtype)


def model_layouts(config: ModelConfig) -> dict[str, Layout]:
    """Layout of every tensor of a model that may be quantized, by its full name."""
    shapes = parameter_shapes(config)
    table = (config.vocab_size, config.d_model)
    layouts = {name: Layout(("out", "in"), table, flat=False) for name in ("embedding.weight", "head.weight")}
    for layer, kind in enumerate(config.blocks):
        prefix = f"layers.{layer}."
        inside = tensor_layouts(KINDS[kind], config, under(prefix, shapes))
        layouts |= {prefix + name: layout for name, layout in inside.items()}
    return layouts


def head_site(
    config: ModelConfig,
    spec: QuantSpec | None = None,
    site_tensors: Mapping[str, Tensor] | None = None,
    mode: Mode = "float",
) -> Site:
    """The site of the final norm's output, as it enters the head."""
    parts = under("head.in.", site_tensors or {})
    scale, second = (parts.get(part) for part in ("scale", second_name(spec)))
    return Site("head.in", Layout(("channel",), (config.d_model,)), spec, scale, second, None, mode)


def model_sites(config: ModelConfig, specs: Mapping[str, QuantSpec]) -> Iterator[Site]:
    """The activation and state sites of a model without its tensors: names, layouts and specs."""
    for layer, kind in enumerate(config.blocks):
        prefix = f"layers.{layer}."
        sizes = KINDS[kind].site_sizes(config)
        yield from make_sites(kind, sizes, under(prefix, specs), {}, "float", prefix).values()
    yield head_site(config, specs.get("head.in"))


class LanguageModel:
    """A causal language model. ``model(ids)`` gives logits (B, L, V) from a fresh state.

    ``mode``: *integer* runs quantized sites as int8 (fast kernels where there are any), *simulate* carries the same
    integers in float (differentiable), *float* ignores the activation sites' specs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mode: Mode = "integer",
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
    ) -> None:
        _check_mode(mode)
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.specs = checkpoint.recipe.resolve(self.config.blocks)
        tensors = checkpoint.tensors
        self.embedding = _storage(tensors["embedding.weight"], dtype)
        self.blocks = [
            build_block(
                self.config,
                layer,
                under(f"layers.{layer}.", tensors),
                under(f"layers.{layer}.", self.specs),
                under(f"layers.{layer}.", checkpoint.site_tensors),
                mode,
                dtype,
            )
            for layer in range(self.config.n_layers)
        ]
        self.final_norm = as_float(tensors["final_norm.weight"]).to(dtype)
        head = self.embedding if "head.weight" not in tensors else _storage(tensors["head.weight"], dtype)
        self.head = Linear(head.as_operand() if isinstance(head, QTensor) else head)
        self.head_site = head_site(self.config, self.specs.get("head.in"), checkpoint.site_tensors, mode)
        if all(site.spec is None for site in self.sites()):  # no code may be asked to equal the reference's
            for layer in (*(linear for block in self.blocks for linear in block.linears), self.head):
                layer.sixteen_bits = True

    def sites(self) -> Iterator[Site]:
        """Every activation and state site, in the order the data meets them."""
        for block in self.blocks:
            yield from block.sites.values()
        yield self.head_site

    def set_mode(self, mode: Mode) -> None:
        """Change what landing on the sites means; caches made before are of the old mode."""
        _check_mode(mode)
        for site in self.sites():
            site.mode = mode

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for ``batch`` sequences; its size does not depend on their length."""
        with torch.inference_mode(False):  # it is written to wherever it is used
            return [block.new_cache(batch) for block in self.blocks]

    def forward(self, ids: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        """Token ids (B, L) -> logits (B, L, V), or (B, 1, V) with ``last_only``; the cache is updated in place.

        SquamataError for ids of another shape or batch than the cache's, and for those that the vocabulary has not.
        """
        _check_ids(ids, cache)
        h: Tensor = ops.embedding(ids, self.embedding, self.dtype)
        residual = None
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            h, residual = block.forward(h, residual, layer_cache)
        if last_only:
            h, residual = h[:, -1:], None if residual is None else residual[:, -1:]
        return self.logits(h, residual)

    def logits(self, h: Tensor, residual: Tensor | None) -> Tensor:
        """Final norm and head: float (B, L, D), and the residual stream before it is added -> (B, L, V)."""
        (landed,), residual = ops.norm_linear(
            h, residual, self.final_norm, self.config.norm_epsilon, self.head, self.head_site, (None,)
        )
        logits = as_float(landed, self.dtype)
        if not self.head_site.quantized:
            return logits
        return logits.masked_fill(~residual.isfinite().all(-1, keepdim=True), torch.nan)  # codes would hide it

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> logits (B, L, V) from a fresh state; SquamataError for other ids, or none."""
        _check_ids(ids)
        if not ids.numel():
            raise SquamataError(f"token ids must hold at least one token, not {tuple(ids.shape)}")
        return self.forward(ids, self.new_cache(ids.shape[0]))

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One token for every sequence: ids (B,) -> logits (B, V)."""
        return self.forward(ids[:, None], cache)[:, 0]


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise SquamataError(f"no mode named '{mode}'{nearest(str(mode), get_args(Mode))}")


def _check_ids(ids: Tensor, cache: Cache | None = None) -> None:
    """SquamataError unless ids are (B, L), with the B of the cache if there is one."""
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        found = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise SquamataError(f"token ids must be a tensor (B, L), a row a sequence, not {found}")
    first = cache[0] if cache else None
    if isinstance(first, ScanCache) and first.conv.shape[0] != len(ids):
        raise SquamataError(f"{len(ids)} rows of token ids for a cache of {first.conv.shape[0]} sequences")


def _storage(weight: Value, dtype: torch.dtype) -> Value:
    return weight if isinstance(weight, QTensor) else weight.to(dtype)
