"""NVIDIA's Megatron layout of a pure Mamba-2 (``nvidia/mamba2-8b-3t-4k``): ``release/mp_rank_00/model_optim_rng.pt``.

The file pickles weights beside the training arguments. Sizes come from the tensors; the arguments decide only what
shapes cannot say (d_state against the number of groups, the norm's epsilon). Fused rows are z, x, B, C, dt as ours
(megatron/core/ssm/mamba_mixer.py); a block's norm is ``norm.weight``, or ``mixer.in_proj.layer_norm_weight`` where a
fused norm and projection was trained.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from squamata.errors import SquamataError
from squamata.load.inert_pickle import read_inert
from squamata.load.tensor_files import PickleFile
from squamata.models.config import ModelConfig

FILE = "model_optim_rng.pt"
_STATE_SIZE = 128  # of every released model; later arguments say it
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_RENAMES = {"embedding.weight": "embedding.word_embeddings.weight", "final_norm.weight": "decoder.final_norm.weight"}
_RENAMES |= {"head.weight": "output_layer.weight"}
Shapes = Mapping[str, tuple[int, ...]]


def find_megatron_file(folder: Path) -> Path | None:
    """The checkpoint file of a folder in Megatron's layout, or None; SquamataError if there is a choice of several."""
    found = [path for pattern in ("", "mp_rank_*/", "*/mp_rank_*/") for path in sorted(folder.glob(f"{pattern}{FILE}"))]
    if len(found) < 2:
        return found[0] if found else None
    if len({path.parent.parent for path in found}) == 1:
        raise SquamataError(
            f"{found[0].parent.parent}: is split over {len(found)} ranks; merge them first, with Megatron-LM's "
            f"tools/checkpoint/hybrid_conversion.py --target-tp-size 1 --target-pp-size 1"
        )
    names = " or ".join(str(path.parent.parent) for path in found[:3])
    raise SquamataError(f"{folder}: holds {len(found)} Megatron checkpoints; give the folder of one, {names}")


class MegatronFile(PickleFile):
    """The weights of a checkpoint file; ``arguments``: what the training was told, where it is plain data."""

    def _content(self) -> Mapping[str, Any]:
        content = read_inert(self.path)
        if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
            raise SquamataError(f"{self.path}: has no 'model', so this is not a Megatron checkpoint")
        return content

    def _tensors(self) -> dict[str, torch.Tensor]:
        stored = {name: value for name, value in self._content()["model"].items() if "_extra_state" not in str(name)}
        for name, value in stored.items():
            if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided):
                raise SquamataError(f"{self.path}: '{name}' is not a plain tensor")
        return stored

    @cached_property
    def arguments(self) -> dict[str, Any]:
        given = self._content().get("args")
        return dict(vars(given)) if isinstance(given, argparse.Namespace) else {}


def megatron_config(file: MegatronFile) -> ModelConfig:
    """The shape of the model; SquamataError for a hybrid, a Mamba-1, or an option that we do not compute."""
    shapes, arguments, where = file.shapes(), file.arguments, str(file.path)
    layers = _layers(shapes, where)
    _refuse_options(arguments, where)
    first = layers[0]
    try:
        vocabulary, width = shapes["embedding.word_embeddings.weight"]
        inner, heads = first["mixer.out_proj.weight"][1], first["mixer.A_log"][0]
        channels, taps = first["mixer.conv1d.weight"][0], first["mixer.conv1d.weight"][-1]
    except (KeyError, IndexError, ValueError) as error:
        raise SquamataError(f"{where}: no usable tensor {error}, so this is not a Mamba-2 of Megatron") from None
    shared = (channels - inner) // 2  # groups * states
    states = _whole(arguments, "mamba_state_dim") or _STATE_SIZE
    groups = _whole(arguments, "mamba_num_groups") or max(1, shared // states)
    if not heads or inner % heads:
        raise SquamataError(f"{where}: {heads} heads do not divide {inner} channels")
    if groups * states != shared:
        raise SquamataError(f"{where}: {shared} rows of B are not {groups} groups of {states} states")
    epsilon = next((arguments[name] for name in ("norm_epsilon", "layernorm_epsilon") if name in arguments), 1e-5)
    try:
        return ModelConfig(
            blocks=("mamba2",) * len(layers),
            d_model=width,
            vocab_size=vocabulary,
            d_inner=inner,
            d_state=states,
            d_conv=taps,
            head_dim=inner // heads,
            n_groups=groups,
            norm_epsilon=epsilon,
            projection_bias="mixer.in_proj.bias" in first,
            conv_bias="mixer.conv1d.bias" in first,
            tie_embeddings="output_layer.weight" not in shapes,
        )
    except ValueError as error:
        raise SquamataError(f"{where}: {str(error).splitlines()[0]}") from None


def _layers(shapes: Shapes, where: str) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name inside a layer, of every layer; all of them are Mamba-2."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    for number, layer in sorted(layers.items()):
        if other := next((rest for rest in layer if not rest.startswith(("mixer.", "norm."))), None):
            raise SquamataError(
                f"{where}: layer {number} has '{other}', which is no Mamba-2; hybrid models are not supported yet"
            )
        if "mixer.x_proj.weight" in layer:
            raise SquamataError(f"{where}: layer {number} is a Mamba-1, which is not supported in this layout")
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise SquamataError(f"{where}: its layers are not 0, 1, 2 ...: found {sorted(layers)[:8]}")
    return [layers[number] for number in range(len(layers))]


def _refuse_options(arguments: Mapping[str, Any], where: str) -> None:
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (size := _whole(arguments, name)) and size > 1:
            raise SquamataError(f"{where}: is one of {size} parts ({name}); merge them with Megatron-LM's tools first")
    if arguments.get("normalization", "RMSNorm") != "RMSNorm":
        raise SquamataError(f"{where}: normalization = {str(arguments['normalization'])[:40]} is not supported")
    if arguments.get("apply_layernorm_1p") is True:
        raise SquamataError(f"{where}: apply_layernorm_1p (norm weights less one) is not supported")


def _whole(arguments: Mapping[str, Any], name: str) -> int | None:
    value = arguments.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def megatron_name(name: str, held: Shapes) -> str:
    """The name in the file of our tensor ``name``; ``held`` are the names in the file."""
    if name in _RENAMES:
        return _RENAMES[name]
    theirs = name.replace(".mixer.gate_norm.", ".mixer.norm.").replace(".mixer.conv.", ".mixer.conv1d.")
    theirs = f"decoder.{theirs}"
    if theirs not in held and theirs.endswith(".norm.weight") and ".mixer." not in theirs:
        return theirs.replace(".norm.weight", ".mixer.in_proj.layer_norm_weight")
    return theirs
