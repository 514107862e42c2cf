"""A quantized model of any shape whose every number is random, made on the device that will run it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.hadamard import Rotation
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.load.random_model import random_tensors
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig, parameter_shapes
from squamata.models.lm import model_layouts, model_sites
from squamata.quantize import quantize_tensors
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

LARGE = 2**20  # elements from which a random weight is drawn as codes, on the device
SITE_RANGE = {"state": 2.0, "u": 3.0, "B_conv": 3.0, "C_conv": 3.0, "out": 5.0}  # largest value, else 4


def random_checkpoint(config: ModelConfig, recipe: Recipe, device: str, seed: int = 0) -> Checkpoint:
    """A quantized model in which every number is random and activations stay of order one."""
    torch.manual_seed(seed)
    specs = recipe.resolve(config.blocks)
    if any(spec.tabulated for spec in specs.values()):
        raise SquamataError(
            f"recipe {recipe.name}: random models have no tables; use a recipe whose weights have scales"
        )
    layouts = model_layouts(config)
    tensors: dict[str, Value] = {}
    for name, size in parameter_shapes(config).items():
        elements = torch.Size(size).numel()
        if elements < LARGE:
            with torch.device("cpu"):
                drawn = {name: _random_tensor(config, name, size)}
                quantized = quantize_tensors(recipe, drawn, specs, layouts)
            tensors[name] = quantized[name].to(device)
        elif name in specs:
            tensors[name] = _random_codes(size, specs[name], Partition(specs[name].granularity, layouts[name]), device)
        else:
            spread = 0.5 if name == "embedding.weight" else size[-1] ** -0.5
            tensors[name] = torch.randn(size, device=device, dtype=torch.bfloat16) * spread
    if any(transform.name == "hadamard" for transform in recipe.transforms):
        rotation = Rotation.of_size(config.d_inner)
        for layer in range(config.n_layers):
            tensors[f"layers.{layer}.mixer.rotation"] = torch.tensor([rotation.size, rotation.block])
    return Checkpoint(config, tensors, recipe, _random_sites(config, specs, device))


def _random_tensor(config: ModelConfig, name: str, size: tuple[int, ...]) -> Tensor:
    """One of the small tensors, as before training, with noise where it would be trivial."""
    noise = torch.randn(size)
    if name.endswith(("A_log", "dt_bias")):
        one_layer = config.model_copy(update={"blocks": config.blocks[:1]})
        return random_tensors(one_layer, prefix="layers.0.mixer." + name.split(".")[-1])[
            f"layers.0.{name.split('.', 2)[2]}"
        ]
    if name.endswith((".D", "norm.weight")):
        return 1 + 0.1 * noise
    return noise * (0.02 if name.endswith("bias") else size[-1] ** -0.5)


def _random_codes(size: tuple[int, ...], spec: QuantSpec, partition: Partition, device: str) -> QTensor:
    low, high = spec.code_range
    codes = torch.randint(low, high + 1, size, dtype=torch.int8, device=device)
    deviation = 3**0.5 / (spec.span * size[-1] ** 0.5)
    scale = deviation * (0.8 + 0.4 * torch.rand(partition.shape(), device=device))
    if spec.scale_dtype == "float16":
        scale = scale.half().float()
    packed = pack_int4(codes) if spec.bits == 4 else codes
    return QTensor(packed, partition.expand(scale), spec, None, size[-1] if spec.bits == 4 else None)


def _random_sites(config: ModelConfig, specs: Mapping[str, QuantSpec], device: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in model_sites(config, specs):
        if site.spec is None or site.spec.dynamic:
            continue
        if site.spec.granularity.ragged:
            raise SquamataError(f"{site.name}: random models have no index map for scales per {site.spec.granularity}")
        size = torch.Size(site.partition.shape())
        spread = torch.ones(()) if not size else 0.8 + 0.2 * torch.rand(size, device="cpu")
        largest = SITE_RANGE.get(site.name.rsplit(".", 1)[-1], 4.0)
        found[f"{site.name}.scale"] = (spread * largest / site.spec.span).to(device)
    return found
