"""Which tensor of a Quamba checkpoint is what: one function a kind of mixer, for every precision it has.

Scales that upstream stores as a quotient (weight scale / output scale) are multiplied back, which may cost one unit in
the last place of float32; all others are taken as they are. What cannot be said exactly in our form, and is not: QQQ's
W4A8 kernel rounds code * group scale to int8 before its product, ours applies the group scale after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout, Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.load.marlin import unpack_embedding, unpack_weight, unpermute_scales
from squamata.models.block import tensor_layouts
from squamata.models.checkpoint import under
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.models.lm import KINDS, model_layouts
from squamata.spec.granularity import Granularity
from squamata.spec.quant import QuantSpec

GROUP = 128

INT8 = QuantSpec(bits=8, full_range=True)  # codes -128..127: upstream saturates int8
INT8_AWAY = INT8.model_copy(update={"rounding": "half-away"})  # roundf in the convolution and the scan of Mamba-1
INT4_GROUP = QuantSpec(bits=4, full_range=True, granularity=Granularity(group=GROUP))


def _per(spec: QuantSpec, granularity: str, **changes: Any) -> QuantSpec:
    return spec.model_copy(update={"granularity": Granularity.parse(granularity)} | changes)


@dataclass(frozen=True)
class Stored:
    """Tensors and numbers under a prefix; ``shown`` is put before names in messages."""

    values: Mapping[str, Any]
    prefix: str
    shown: str = ""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape; SquamataError if there is none."""
        value = self.values.get(self.prefix + name)
        full = f"{self.shown}{self.prefix}{name}"
        if not isinstance(value, Tensor):
            raise SquamataError(f"tensor '{full}' is missing")
        if tuple(value.shape) != shape:
            raise SquamataError(f"tensor '{full}' has shape {list(value.shape)}, {list(shape)} was expected")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SquamataError(f"tensor '{full}' holds NaN or infinity")
        return value

    def codes(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor of integers of this type and shape."""
        value = self.tensor(name, *shape)
        if value.dtype != dtype:
            wanted, found = (str(kind).removeprefix("torch.") for kind in (dtype, value.dtype))
            raise SquamataError(f"tensor '{self.shown}{self.prefix}{name}' is {found}, {wanted} was expected")
        return value

    def scales(self, name: str) -> Tensor:
        """Scales, float32, of whatever shape, all above zero; upstream stores some as plain numbers."""
        value = self.values.get(self.prefix + name)
        full = f"{self.shown}{self.prefix}{name}"
        if not isinstance(value, Tensor | float | int) or isinstance(value, bool):
            raise SquamataError(f"scale '{full}' is missing")
        scale = torch.as_tensor(value).float()
        if not scale.numel() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise SquamataError(f"scale '{full}' is not a number above zero")
        return scale

    def scale(self, name: str) -> Tensor:
        """One scale, float32 ()."""
        scale = self.scales(name)
        if scale.numel() != 1:
            raise SquamataError(f"scale '{self.shown}{self.prefix}{name}' has shape {list(scale.shape)}, one expected")
        return scale.reshape(())

    def ends(self, name: str) -> Tensor:
        """Where groups end, int64 (..., groups), at least one and none before the one before it."""
        value = self.values.get(self.prefix + name)
        if not isinstance(value, Tensor) or not value.numel() or not value.ndim or bool((value.diff() < 0).any()):
            raise SquamataError(f"'{self.shown}{self.prefix}{name}' is not a tensor of rising ends of groups")
        return value.long()

    def has(self, name: str) -> bool:
        return isinstance(self.values.get(self.prefix + name), Tensor)


@dataclass
class LayerParts:
    """What becomes of one layer (or of embedding or head): tensors, site tensors and specs by our names."""

    layouts: Mapping[str, Layout]
    tensors: dict[str, Value] = field(default_factory=dict)
    sites: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, QuantSpec] = field(default_factory=dict)

    def quantized(self, name: str, codes: Tensor, scale: Tensor, spec: QuantSpec) -> None:
        """A tensor from int8 codes and the scale in its stored form."""
        expanded = Partition(spec.granularity, self.layouts[name]).expand(scale.float())
        packed = spec.bits <= 4
        data = pack_int4(codes) if packed else codes.contiguous()
        self.tensors[name] = QTensor(data, expanded, spec, None, codes.shape[-1] if packed else None)
        self.specs[name] = spec

    def site(self, name: str, scale: Tensor, spec: QuantSpec = INT8, index: Tensor | None = None) -> None:
        """An activation or state and its scale in the stored form."""
        self.specs[name], self.sites[f"{name}.scale"] = spec, scale
        if index is not None:
            self.sites[f"{name}.index"] = index

    def split(self, site: str, scale: Tensor) -> None:
        """Several sites, separated by spaces, that share a scale."""
        for name in site.split():
            self.site(f"mixer.{name}", scale)


def linear8(parts: LayerParts, name: str, stored: Stored, spec: QuantSpec = INT8, out: Tensor | None = None) -> None:
    """int8 (K, N + padding). ``b``: the weight's scale, one or one an output; divided by ``out`` (N,) if that is given.

    Then segments share a scale: the first row of each has it.
    """
    rows, columns = parts.layouts[name].sizes
    padded = -(-rows // 16) * 16
    codes = stored.codes("weight", torch.int8, columns, padded).T[:rows]
    if out is None:
        scale = stored.scale("b")
    else:
        starts = torch.tensor([0, *parts.layouts[name].segments[:-1]]).cumsum(0)
        quotient = stored.tensor("b", 1, padded)[0, starts].double()
        scale = (quotient * out[starts].double()).float()
        if not bool((scale > 0).all()):
            raise SquamataError(f"scale '{stored.shown}{stored.prefix}b' is not above zero")
    parts.quantized(name, codes, scale, spec)


def linear4(parts: LayerParts, name: str, stored: Stored, kernel: str, out: Tensor | None = None) -> None:
    """Marlin (``marlin``: 16-bit activations) or QQQ (``qqq``: 8-bit) tiles with group scales; ``out``: () or (N,)."""
    rows, columns = parts.layouts[name].sizes
    if columns <= GROUP or columns % GROUP:
        raise SquamataError(
            f"'{stored.shown}{stored.prefix}weight' has {columns} inputs: 4-bit weights in groups of {GROUP} need a "
            f"multiple of {GROUP} above it (quantize the float model instead)"
        )
    multiple = 64 if kernel == "qqq" else 256
    padded, groups = -(-rows // multiple) * multiple, columns // GROUP
    packed = stored.codes("weight", torch.int32, columns // 16, 2 * padded)
    codes = unpack_weight(packed, rows, "qqq" if kernel == "qqq" else "marlin")
    spec = INT4_GROUP if kernel == "qqq" else INT4_GROUP.model_copy(update={"scale_dtype": "float16"})
    per_group = stored.tensor("s_group" if kernel == "qqq" else "scale", groups, padded)
    scale = unpermute_scales(per_group, per_group=True)[:, :rows].T.double()
    if kernel == "qqq":
        scale = scale * unpermute_scales(stored.tensor("s_channel", 1, padded), per_group=False)[0, :rows, None]
    if out is not None:
        scale = scale * out.double().reshape(-1, 1)
    parts.quantized(name, *_without_zeros(codes, scale), spec)


def _without_zeros(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Groups or rows whose scale is zero hold zeros: say so with codes, since a scale of ours is above zero."""
    empty = scale <= 0
    if bool(empty.any()):
        wide = empty.repeat_interleave(codes.shape[1] // empty.shape[1], dim=1)
        codes, scale = codes.masked_fill(wide, 0), scale.masked_fill(empty, 2.0**-14)
    return codes, scale.float()


def rotation_tensors(config: ModelConfig) -> dict[str, Value]:
    """The rotation that upstream applies before out_proj, by the matrices of its library."""
    size = config.d_inner
    return {"mixer.rotation": torch.tensor([size, size]), "mixer.rotation_family": torch.tensor([1])}


def layer_parts(config: ModelConfig, layer: int, stored: Stored, precision: str) -> LayerParts:
    """One layer; names without ``layers.N.``."""
    kind = config.blocks[layer]
    shapes = under(f"layers.{layer}.", parameter_shapes(config))
    parts = LayerParts(tensor_layouts(KINDS[kind], config, shapes))
    parts.tensors["norm.weight"] = stored.tensor("norm.weight", config.d_model)
    if precision == "W4A16":
        _float_activations(config, kind, stored, parts)
    else:
        parts.site("mixer.in", stored.scale("norm.output_scale"))
        (_mamba1 if kind == "mamba1" else _mamba2)(config, stored, parts, four_bits=precision == "W4A8")
    parts.tensors.update(rotation_tensors(config))
    return parts


def _inside(stored: Stored, name: str) -> Stored:
    return Stored(stored.values, f"{stored.prefix}mixer.{name}.", stored.shown)


def _mamba1(config: ModelConfig, stored: Stored, parts: LayerParts, four_bits: bool) -> None:
    scan, conv = _inside(stored, "selective_scan"), _inside(stored, "conv1d")
    before, after = conv.scale("input_scale"), conv.scale("output_scale")
    low, dt = scan.scale("B_scale"), scan.scale("dt_scale")
    parts.split("x z", before)
    parts.site("mixer.u", after, INT8_AWAY)
    parts.split("dt_low B C", low)
    parts.split("dt", dt)
    parts.site("mixer.state", scan.scale("ssm_state_scale"), INT8_AWAY)
    _out(config, stored, parts, four_bits)
    for name, out in (("in_proj", before), ("x_proj", low)):
        if four_bits:
            linear4(parts, f"mixer.{name}.weight", _inside(stored, name), "qqq", out)
        else:
            linear8(parts, f"mixer.{name}.weight", _inside(stored, name))
    linear8(parts, "mixer.dt_proj.weight", _inside(stored, "dt_proj"))
    E, N = config.d_inner, config.d_state
    parts.quantized(
        "mixer.conv.weight", conv.codes("weight", torch.int8, E, config.d_conv), conv.scale("weight_scale"), INT8
    )
    if config.conv_bias:
        parts.quantized("mixer.conv.bias", conv.codes("bias", torch.int8, E), conv.scale("bias_scale"), INT8)
    parts.quantized("mixer.A_log", scan.codes("A_log", torch.int8, E, N), scan.scale("A_scale"), INT8)
    for name in ("D", "dt_bias"):
        parts.quantized(f"mixer.{name}", scan.codes(name, torch.int8, E), scan.scale(f"{name}_scale"), INT8)


def _mamba2(config: ModelConfig, stored: Stored, parts: LayerParts, four_bits: bool) -> None:
    scan, conv = _inside(stored, "qchunk_scan"), _inside(stored, "conv1d")
    E, H, GN = config.d_inner, config.n_heads, config.n_groups * config.d_state
    sites = {
        "z": _inside(stored, "norm").scale("z_scale"),
        **{name: conv.scale(f"{name}_scale") for name in "xBC"},
        "dt": scan.scale("dt_scale"),
    }
    for name, scale in sites.items():
        parts.site(f"mixer.{name}", scale)
    out = torch.cat([scale.expand(rows) for scale, rows in zip(sites.values(), (E, E, GN, GN, H), strict=True)])
    if four_bits:
        linear4(parts, "mixer.in_proj.weight", _inside(stored, "in_proj"), "qqq", out)
    else:
        linear8(parts, "mixer.in_proj.weight", _inside(stored, "in_proj"), _per(INT8, "segment"), out)
    _grouped_sites(config, conv, scan, parts)
    _out(config, stored, parts, four_bits)
    segments = _per(INT8, "segment")
    for name, start, shape in (("weight", "w", (E + 2 * GN, config.d_conv)), ("bias", "b", (E + 2 * GN,))):
        if name == "weight" or config.conv_bias:
            scales = torch.stack([conv.scale(f"{start}{part}_scale") for part in "xBC"])
            parts.quantized(f"mixer.conv.{name}", conv.codes(name, torch.int8, *shape), scales, segments)
    for name in ("A_log", "D"):
        parts.quantized(f"mixer.{name}", scan.codes(name, torch.int8, H), scan.scale(f"{name}_scale"), INT8)
    parts.tensors["mixer.dt_bias"] = scan.tensor("dt_bias", H)
    parts.tensors["mixer.gate_norm.weight"] = stored.tensor("mixer.norm.weight", E)


def _grouped_sites(config: ModelConfig, conv: Stored, scan: Stored, parts: LayerParts) -> None:
    """What leaves the convolution, and the state: one scale each, or Quamba2's groups of heads and channels."""
    grouped = conv.has("x_head_group_range")
    for name in "BC":
        scale = conv.scales(f"{name}_out_scales").reshape(-1)
        if grouped and scale.numel() != config.n_groups:
            raise SquamataError(f"scale '{conv.shown}{conv.prefix}{name}_out_scales': {config.n_groups} were expected")
        spec = _per(INT8_AWAY, "ssd_group" if grouped else "tensor")
        parts.site(f"mixer.{name}_conv", scale if grouped else conv.scale(f"{name}_out_scales"), spec)
    if not grouped:
        parts.site("mixer.u", conv.scale("x_out_scales"), INT8_AWAY)
        parts.site("mixer.state", scan.scale("ssm_state_scale"))
        return
    index, used = _group_map(config, conv)
    for name, scale, axes in (
        ("u", conv.scales("x_out_scales").reshape(-1), "index"),
        ("state", _rows(scan.scales("ssm_state_scale"), config.d_state), "index,state"),
    ):
        if len(scale) <= int(used.max()):
            raise SquamataError(f"layer '{conv.shown}': fewer scales of '{name}' than groups of heads and channels")
        spec = _per(INT8_AWAY if name == "u" else INT8, axes)
        parts.site(f"mixer.{name}", scale[used], spec, index)


def _rows(scale: Tensor, width: int) -> Tensor:
    """Scales as rows (groups, width); no row if they are not a whole number of them."""
    return scale.reshape(-1, width) if scale.numel() % width == 0 else scale.new_empty(0, width)


def _group_map(config: ModelConfig, conv: Stored) -> tuple[Tensor, Tensor]:
    """int64 (H, P): the group of every head and channel; and which of the stored scales the groups have.

    Ranges are the ends of the groups: of heads inside an SSD group (G, h), of channels inside a head (G, h, c).
    """
    heads_of, P = config.n_heads // config.n_groups, config.head_dim
    head_ends, channel_ends = (conv.ends(f"x_{name}_group_range") for name in ("head", "dim"))
    if head_ends.ndim != 2 or channel_ends.shape[:2] != head_ends.shape or len(head_ends) != config.n_groups:
        raise SquamataError(f"'{conv.shown}{conv.prefix}x_dim_group_range' does not fit x_head_group_range")
    if not (bool((head_ends[:, -1] == heads_of).all()) and bool((channel_ends[..., -1] == P).all())):
        raise SquamataError(f"'{conv.shown}{conv.prefix}x_head_group_range' does not end at {heads_of} heads")
    head_group = (torch.arange(heads_of)[None, :, None] >= head_ends[:, None, :]).sum(-1)  # (G, H / G)
    ends = channel_ends[torch.arange(config.n_groups)[:, None], head_group]  # (G, H / G, c)
    channel_group = (torch.arange(P)[:, None] >= ends[..., None, :]).sum(-1)  # (G, H / G, P)
    place = torch.arange(config.n_groups)[:, None] * head_ends.shape[1] + head_group
    number = place[..., None] * channel_ends.shape[-1] + channel_group
    used, index = torch.unique(number.reshape(config.n_heads, P), return_inverse=True)
    return index, used


def _out(config: ModelConfig, stored: Stored, parts: LayerParts, four_bits: bool) -> None:
    """out_proj and the rotated values before it."""
    parts.site("mixer.out", stored.scale("mixer.had.x_H_scale"))
    if four_bits:
        linear4(parts, "mixer.out_proj.weight", _inside(stored, "out_proj"), "qqq")
    else:
        linear8(parts, "mixer.out_proj.weight", _inside(stored, "out_proj"))


def _float_activations(config: ModelConfig, kind: str, stored: Stored, parts: LayerParts) -> None:
    """W4A16: 4-bit projections, everything else in float; dt_proj too, and its bias has a tensor of its own."""
    for name in ("in_proj", "x_proj", "out_proj") if kind == "mamba1" else ("in_proj", "out_proj"):
        linear4(parts, f"mixer.{name}.weight", _inside(stored, name), "marlin")
    theirs = {"conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "gate_norm.weight": "norm.weight"}
    theirs |= {"dt_bias": "dt_proj_bias"} if kind == "mamba1" else {}
    for name, shape in parameter_shapes(config.model_copy(update={"blocks": (kind,)})).items():
        rest = name.removeprefix("layers.0.mixer.")
        if rest == name or f"mixer.{rest}" in parts.tensors:
            continue
        stored_shape = (shape[0], 1, shape[1]) if rest == "conv.weight" else shape
        tensor = stored.tensor(f"mixer.{theirs.get(rest, rest)}", *stored_shape)
        parts.tensors[f"mixer.{rest}"] = tensor.reshape(shape)


def embedding_parts(config: ModelConfig, stored: Stored, kind: str) -> LayerParts:
    """The embedding: float, or 8 or 4 bits with a float16 scale a row."""
    V, D = config.vocab_size, config.d_model
    parts = LayerParts(model_layouts(config))
    if kind == "Embedding":
        parts.tensors["embedding.weight"] = stored.tensor("weight", V, D)
        return parts
    if kind == "W8O16Embedding":
        bits, codes = 8, stored.codes("weight", torch.int8, V, D)
    elif kind == "W4O16Embedding":
        bits, codes = 4, unpack_embedding(stored.codes("weight", torch.int32, V, D // 8))
    else:
        raise SquamataError(f"an embedding of class {kind} is not supported")
    scale = stored.tensor("scales", V).float()
    negative = scale < 0  # upstream takes the largest value, not magnitude: below zero if all of a row are
    codes = torch.where(negative[:, None], (-codes.clamp(min=-127 if bits == 8 else -7)), codes)
    codes, scale = _without_zeros(codes, scale.abs()[:, None])
    spec = QuantSpec(bits=bits, full_range=True, granularity=Granularity.parse("channel"), scale_dtype="float16")
    parts.quantized("embedding.weight", codes, scale[:, 0], spec)
    return parts


def head_parts(config: ModelConfig, stored: Stored, kind: str) -> LayerParts:
    """Final norm and head."""
    parts = LayerParts(model_layouts(config))
    parts.tensors["final_norm.weight"] = stored.tensor("backbone.norm_f.weight", config.d_model)
    head = Stored(stored.values, "lm_head.", stored.shown)
    if kind == "Linear":
        parts.tensors["head.weight"] = head.tensor("weight", config.vocab_size, config.d_model)
    elif kind == "W4A16B16O16Linear":
        linear4(parts, "head.weight", head, "marlin")
    elif kind in ("W8A8B16O16Linear", "W4A8B16O16Linear"):
        parts.site("head.in", stored.scale("backbone.norm_f.output_scale"))
        linear8(parts, "head.weight", head) if kind.startswith("W8") else linear4(parts, "head.weight", head, "qqq")
    else:
        raise SquamataError(f"a head of class {kind} is not supported")
    return parts
