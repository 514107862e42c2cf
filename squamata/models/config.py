"""ModelConfig: the shape of a model, one frozen description whatever its file said."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from squamata.errors import SquamataError, nearest
from squamata.spec.sites import BLOCKS

Size = Annotated[int, Field(ge=1, le=2**24)]
SizeOrNone = Annotated[int, Field(ge=0, le=2**24)]  # 0 where the kind of layer has no such size
Epsilon = Annotated[float, Field(gt=0, lt=1)]

MOST_LAYERS = 2**12  # that a file may ask for: hundreds of thousands would take hours to look for
OUTPUT_BIAS = "mixer.out_proj.bias"  # a correction leaves one in every layer of a model that has none


class ModelConfig(BaseModel):
    """Shape of a language model. Letters as in the papers: D d_model, E d_inner, N d_state, H heads, P head_dim.

    ``blocks``: the kind of each layer (``mamba1``, ``mamba2``). ``bcdt_norm_epsilon``: FalconMamba's RMS norm on
    dt_low, B and C, absent elsewhere. ``time_step_limit``: clamp of dt after softplus (Mamba-2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: Annotated[tuple[str, ...], Field(max_length=MOST_LAYERS)]
    d_model: Size
    vocab_size: Size
    d_inner: Size
    d_state: Size
    d_conv: Size = 4
    dt_rank: SizeOrNone = 0
    head_dim: SizeOrNone = 0
    n_groups: Size = 1
    norm_epsilon: Epsilon = 1e-5
    gate_norm_epsilon: Epsilon = 1e-5
    bcdt_norm_epsilon: Epsilon | None = None
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: Size = 256
    projection_bias: bool = False
    conv_bias: bool = True
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if not self.blocks:
            raise ValueError("a model has at least one layer")
        for kind in self.blocks:
            if kind not in BLOCKS:
                raise ValueError(f"no kind of layer named '{kind}'{nearest(kind, BLOCKS)}")
        if "mamba1" in self.blocks and self.dt_rank < 1:
            raise ValueError("a mamba1 layer needs a dt_rank of at least 1")
        if "mamba2" in self.blocks and (self.head_dim < 1 or self.d_inner % self.head_dim):
            raise ValueError(f"head_dim {self.head_dim} does not divide d_inner {self.d_inner}")
        if "mamba2" in self.blocks and self.n_heads % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {self.n_heads} heads")
        return self

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim if self.head_dim else 0

    @property
    def architecture(self) -> str:
        """``mamba1``, ``mamba2``, or ``hybrid``."""
        kinds = set(self.blocks)
        return kinds.pop() if len(kinds) == 1 else "hybrid"


def _published(kind: str, d_model: int, layers: int, **overrides: Any) -> ModelConfig:
    fields: dict[str, Any] = {"blocks": (kind,) * layers, "d_model": d_model, "d_inner": 2 * d_model}
    if kind == "mamba1":
        fields |= {"vocab_size": 50280, "d_state": 16, "dt_rank": math.ceil(d_model / 16)}
    else:
        fields |= {"vocab_size": 50288, "d_state": 128, "head_dim": 64}
    return ModelConfig(**(fields | overrides))


SHAPES: dict[str, ModelConfig] = {
    f"{name}-{size}": _published(kind, d_model, layers)
    for name, kind in (("mamba", "mamba1"), ("mamba2", "mamba2"))
    for size, d_model, layers in (
        ("130m", 768, 24),
        ("370m", 1024, 48),
        ("790m", 1536, 48),
        ("1.4b", 2048, 48),
        ("2.8b" if kind == "mamba1" else "2.7b", 2560, 64),
    )
} | {"mamba2-8b": _published("mamba2", 4096, 56, n_groups=8, vocab_size=256000, tie_embeddings=False)}
SHAPES["mamba2-1.3b"] = SHAPES["mamba2-1.4b"]


def shape(name: str) -> ModelConfig:
    """A published model's shape by name; SquamataError with the nearest name if there is none."""
    if name not in SHAPES:
        raise SquamataError(f"no shape named '{name}'{nearest(name, SHAPES)}")
    return SHAPES[name]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor of the model, in file order; a tied head has no tensor of its own."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, config.d_model)}
    for layer, kind in enumerate(config.blocks):
        mixer = {"mamba1": _mamba1_shapes, "mamba2": _mamba2_shapes}[kind](config)
        shapes[f"layers.{layer}.norm.weight"] = (config.d_model,)
        shapes |= {f"layers.{layer}.mixer.{name}": dims for name, dims in mixer.items()}
    shapes["final_norm.weight"] = (config.d_model,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.d_model)
    return shapes


def site_sizes(kind: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Sizes of the feature axes of every activation and state site of a kind of layer, by the site's name in it."""
    D, E, N, R = config.d_model, config.d_inner, config.d_state, config.dt_rank
    if kind == "mamba1":
        inner = dict.fromkeys(("x", "z", "u", "u_proj", "dt", "y", "out"), (E,))
        both = dict.fromkeys(("state", "decay", "log_decay"), (E, N))
        return {"in": (D,), "dt_low": (R,), "B": (N,), "C": (N,), **both, **inner}
    G, H, P = config.n_groups, config.n_heads, config.head_dim
    heads = dict.fromkeys(("z", "x", "u", "u_scaled", "y"), (H, P))
    groups = dict.fromkeys(("B", "C", "B_conv", "C_conv"), (G, N))
    steps = dict.fromkeys(("dt", "decay", "log_decay", "chunk_decay"), (H,))
    return {"in": (D,), "scores": (G,), "state": (H, P, N), "out": (E,), **steps, **heads, **groups}


def segments(kind: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Rows of the fused tensors of a kind of layer, by what they are for."""
    E, N, R = config.d_inner, config.d_state, config.dt_rank
    if kind == "mamba1":
        return {"in_proj": (E, E), "x_proj": (R, N, N)}  # rows: x, z; dt_low, B, C
    GN = config.n_groups * N
    return {"in_proj": (E, E, GN, GN, config.n_heads), "conv": (E, GN, GN)}  # rows: z, x, B, C, dt; x, B, C


def _mamba1_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, E, N, R = config.d_model, config.d_inner, config.d_state, config.dt_rank
    return {
        **_projection("in_proj", 2 * E, D, config.projection_bias),
        **_conv(E, config),
        "x_proj.weight": (R + 2 * N, E),
        "dt_proj.weight": (E, R),
        "dt_bias": (E,),
        "A_log": (E, N),
        "D": (E,),
        **_projection("out_proj", D, E, config.projection_bias),
    }


def _mamba2_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, E, GN, H = config.d_model, config.d_inner, config.n_groups * config.d_state, config.n_heads
    return {
        **_projection("in_proj", 2 * E + 2 * GN + H, D, config.projection_bias),  # rows: z, x, B, C, dt
        **_conv(E + 2 * GN, config),
        "dt_bias": (H,),
        "A_log": (H,),
        "D": (H,),
        "gate_norm.weight": (E,),
        **_projection("out_proj", D, E, config.projection_bias),
    }


def _projection(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _conv(channels: int, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {"conv.weight": (channels, config.d_conv)} | ({"conv.bias": (channels,)} if config.conv_bias else {})
