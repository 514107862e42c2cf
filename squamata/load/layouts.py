"""Foreign layouts: the configuration and tensor names of a published checkpoint become ours, here and nowhere else.

Each foreign configuration is a pydantic model with the defaults of the code that wrote it (mamba_ssm 2.x,
transformers 5.x); what we do not compute is refused by its type, so that no option is silently ignored.
"""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from squamata.errors import SquamataError, nearest
from squamata.load.tensor_files import read_json
from squamata.models.config import MOST_LAYERS, Epsilon, ModelConfig, Size
from squamata.spec.yaml_file import said

Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Rank = Size | Literal["auto"]
Expand = Annotated[float, Field(gt=0, le=64)]


def _plain_floats(value: Any) -> Any:
    """transformers 5 writes infinity as ``{"__float__": "Infinity"}``; a missing limit is none at all."""
    if value is None:
        return (0.0, math.inf)
    if isinstance(value, list | tuple):
        return [entry.get("__float__", entry) if isinstance(entry, dict) else entry for entry in value]
    return value


Limits = Annotated[tuple[float, float], BeforeValidator(_plain_floats)]


class Foreign(BaseModel):
    """Base of foreign configurations; keys that only concern training or other frameworks are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class SsmCfg(Foreign):
    """``ssm_cfg`` of the state-spaces layout, keys of both mixers; ``None`` takes the mixer's default."""

    model_config = ConfigDict(extra="forbid")

    layer: Literal["Mamba1", "Mamba2"] = "Mamba1"
    d_state: Size | None = None
    d_conv: Size = 4
    expand: Expand = 2
    dt_rank: Rank = "auto"
    headdim: Size = 64
    ngroups: Size = 1
    chunk_size: Size = 256
    dt_limit: Limits = (0.0, math.inf)
    conv_bias: bool = True
    bias: bool = False
    d_ssm: None = None
    D_has_hdim: Literal[False] = False
    rmsnorm: Literal[True] = True
    norm_before_gate: Literal[False] = False
    dt_min: Any = None  # the rest only concerns initialisation and speed
    dt_max: Any = None
    dt_init: Any = None
    dt_scale: Any = None
    dt_init_floor: Any = None
    conv_init: Any = None
    A_init_range: Any = None
    use_fast_path: Any = None
    use_mem_eff_path: Any = None


class StateSpaces(Foreign):
    """``config.json`` of the state-spaces layout (mamba_ssm's ``MambaConfig``)."""

    d_model: Size
    n_layer: Layers
    vocab_size: Size
    ssm_cfg: SsmCfg = SsmCfg()
    d_intermediate: Literal[0] = 0
    attn_layer_idx: Annotated[list[int], Field(max_length=0)] = []
    rms_norm: Literal[True] = True
    pad_vocab_size_multiple: Size = 8
    tie_embeddings: bool = True

    def ours(self) -> ModelConfig:
        ssm, multiple = self.ssm_cfg, self.pad_vocab_size_multiple
        first = ssm.layer == "Mamba1"
        return ModelConfig(
            blocks=(ssm.layer.lower(),) * self.n_layer,
            d_model=self.d_model,
            vocab_size=-(-self.vocab_size // multiple) * multiple,
            d_inner=int(ssm.expand * self.d_model),
            d_state=ssm.d_state or (16 if first else 128),
            d_conv=ssm.d_conv,
            projection_bias=ssm.bias,
            conv_bias=ssm.conv_bias,
            tie_embeddings=self.tie_embeddings,
            chunk_size=ssm.chunk_size,
            **_rank(ssm.dt_rank, self.d_model) if first else _heads(ssm.headdim, ssm.ngroups, ssm.dt_limit),
        )


class _HuggingFace(Foreign):
    """What the three Hugging Face configurations share. ``intermediate_size``, where written, beats ``expand``."""

    vocab_size: Size = 50280
    hidden_size: Size = 768
    state_size: Size = 16
    num_hidden_layers: Layers = 32
    layer_norm_epsilon: Epsilon = 1e-5
    expand: Expand = 2
    intermediate_size: Size | None = None
    conv_kernel: Size = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["silu", "swish"] = "silu"
    tie_word_embeddings: bool = True
    quantization_config: None = None

    def _shared(self) -> dict[str, Any]:
        return {
            "d_model": self.hidden_size,
            "vocab_size": self.vocab_size,
            "d_inner": self.intermediate_size or int(self.expand * self.hidden_size),
            "d_state": self.state_size,
            "d_conv": self.conv_kernel,
            "norm_epsilon": self.layer_norm_epsilon,
            "projection_bias": self.use_bias,
            "conv_bias": self.use_conv_bias,
            "tie_embeddings": self.tie_word_embeddings,
        }


class HuggingFaceMamba(_HuggingFace):
    """``MambaConfig`` of transformers."""

    time_step_rank: Rank = "auto"

    def ours(self) -> ModelConfig:
        blocks = ("mamba1",) * self.num_hidden_layers
        return ModelConfig(blocks=blocks, **self._shared(), **_rank(self.time_step_rank, self.hidden_size))


class HuggingFaceFalconMamba(HuggingFaceMamba):
    """``FalconMambaConfig`` of transformers: Mamba-1 with an RMS norm without weights on dt_low, B and C."""

    mixer_rms_eps: Epsilon = 1e-6

    def ours(self) -> ModelConfig:
        return super().ours().model_copy(update={"bcdt_norm_epsilon": self.mixer_rms_eps})


class HuggingFaceMamba2(_HuggingFace):
    """``Mamba2Config`` of transformers; its gated norm takes ``layer_norm_epsilon``."""

    vocab_size: Size = 32768
    hidden_size: Size = 4096
    state_size: Size = 128
    num_hidden_layers: Layers = 64
    num_heads: Size = 128
    head_dim: Size = 64
    n_groups: Size = 8
    time_step_limit: Limits = (0.0, math.inf)
    chunk_size: Size = 256
    tie_word_embeddings: bool = False

    def ours(self) -> ModelConfig:
        shared = self._shared()
        if shared["d_inner"] != self.num_heads * self.head_dim:
            product = f"num_heads {self.num_heads} x head_dim {self.head_dim}"
            raise ValueError(f"{product} is not the inner size {shared['d_inner']}")
        return ModelConfig(
            blocks=("mamba2",) * self.num_hidden_layers,
            gate_norm_epsilon=self.layer_norm_epsilon,
            **shared,
            chunk_size=self.chunk_size,
            **_heads(self.head_dim, self.n_groups, self.time_step_limit),
        )


def _rank(rank: int | str, d_model: int) -> dict[str, Any]:
    return {"dt_rank": math.ceil(d_model / 16) if rank == "auto" else rank}


def _heads(head_dim: int, groups: int, limits: tuple[float, float]) -> dict[str, Any]:
    return {"head_dim": head_dim, "n_groups": groups, "time_step_limit": limits}


ForeignConfig = StateSpaces | HuggingFaceMamba | HuggingFaceMamba2

_ARCHITECTURES: dict[str, type[ForeignConfig]] = {
    "MambaForCausalLM": HuggingFaceMamba,
    "Mamba2ForCausalLM": HuggingFaceMamba2,
    "FalconMambaForCausalLM": HuggingFaceFalconMamba,
    "MambaLMHeadModel": StateSpaces,
}
_HYBRIDS = ("Bamba", "FalconH1", "GraniteMoeHybrid", "Jamba", "NemotronH", "Plamo2", "Zamba", "Zamba2", "Hymba")
_MODEL_TYPES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}


def normalise(config: dict[str, Any], where: str) -> ModelConfig:
    """A foreign ``config.json`` as our ModelConfig; SquamataError, one line that starts with ``where``, otherwise."""
    foreign = _ARCHITECTURES[_architecture(config, where)]
    try:
        return foreign.model_validate(config).ours()
    except ValidationError as error:
        raise SquamataError(f"{where}: {_first_problem(error)}") from None
    except ValueError as error:
        raise SquamataError(f"{where}: {error}") from None


def read_own_config(path: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint of ours in which nothing is quantized; SquamataError otherwise."""
    described = read_json(path)
    try:
        recipe = described["quantization_config"]["recipe"]
        if recipe.get("rules") or recipe.get("transforms"):
            raise SquamataError(
                f"{path.parent}: is a Squamata checkpoint already; give the float model it was made from"
            )
        low, high = described["model"]["time_step_limit"]
        limits = (-math.inf if low is None else low, math.inf if high is None else high)
        return ModelConfig(**(described["model"] | {"time_step_limit": limits}))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SquamataError(f"{path.parent}: is a Squamata checkpoint already, and {path.name} is damaged") from None


def _architecture(config: dict[str, Any], where: str) -> str:
    named = config.get("architectures") or []
    if isinstance(named, list) and named:
        name = str(named[0])
    elif "model_type" in config:
        name = _MODEL_TYPES.get(str(config["model_type"]), str(config["model_type"]))
    elif {"d_model", "n_layer"} <= config.keys():
        return "MambaLMHeadModel"
    else:
        raise SquamataError(
            f"{where}: neither the state-spaces layout (has d_model, n_layer) nor Hugging Face's (has architectures)"
        )
    if name.startswith(_HYBRIDS):
        raise SquamataError(f"{where}: '{name}' mixes Mamba with attention; hybrid models are not supported yet")
    if name not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise SquamataError(f"{where}: architecture '{name}' is not supported (supported: {supported})")
    return name


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["loc"][:1] == ("attn_layer_idx",):
        return f"attn_layer_idx = {str(problem['input'])[:60]} is not supported: hybrid models have no layout here yet"
    key, value = ".".join(str(part) for part in problem["loc"]), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"'{key}' is not supported{nearest(key.split('.')[-1], SsmCfg.model_fields)}"
    if problem["type"] in ("literal_error", "none_required", "too_long"):
        expected = problem.get("ctx", {}).get("expected")
        return f"{key} = {str(value)[:60]} is not supported" + (f" (supported: {expected})" if expected else "")
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = said(problem)
    if message.startswith("must "):
        return f"{key} {message}"
    return f"{key} = {str(value)[:60]}: {message}" if key else message


_RENAMES = {
    "embedding.": "backbone.embedding.",
    "final_norm.": "backbone.norm_f.",
    "head.": "lm_head.",
    "layers.": "backbone.layers.",
}
_RENAMES_INSIDE = {
    "mamba1": {".mixer.conv.": ".mixer.conv1d.", ".mixer.dt_bias": ".mixer.dt_proj.bias"},
    "mamba2": {".mixer.conv.": ".mixer.conv1d.", ".mixer.gate_norm.": ".mixer.norm."},
}


def foreign_name(name: str, config: ModelConfig, held: Container[str]) -> str:
    """The name in the file of our tensor ``name``; ``held`` are the names in the file.

    The layouts differ in one name: the embedding is ``backbone.embedding`` in state-spaces and
    ``backbone.embeddings`` in Hugging Face, which reads either.
    """
    if name.startswith("layers."):
        for ours, theirs in _RENAMES_INSIDE[config.blocks[int(name.split(".")[1])]].items():
            name = name.replace(ours, theirs)
    start = name.split(".")[0] + "."
    name = _RENAMES[start] + name.removeprefix(start)
    plural = name.replace("backbone.embedding.", "backbone.embeddings.")
    return plural if plural in held else name


def foreign_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of our tensor: a depthwise convolution (C, K) is stored as (C, 1, K)."""
    return (shape[0], 1, shape[1]) if name.endswith("conv.weight") else shape
