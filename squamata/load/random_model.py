"""Random weights in any shape, for timing shapes whose weights are not at hand and for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from zlib import crc32

import torch

from squamata.models.config import ModelConfig, parameter_shapes

_KEPT_IN_FLOAT32 = ("A_log", ".D", "dt_bias", "norm.weight")


@dataclass(frozen=True)
class RandomSource:
    """Random float tensors of a shape, made a layer at a time as ``Source`` reads them."""

    config: ModelConfig

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        return random_tensors(self.config, prefix=prefix)


def random_tensors(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Our name -> tensor, initialised as Mamba models are before training (mamba_ssm; Gu and Dao 2023, section 3.6).

    A_log, D, dt_bias and norm weights are float32 as in published checkpoints, the rest ``dtype``. Each tensor depends
    only on ``seed``, its name and its shape, so reading with a ``prefix``, as ``Source.tensors`` does, gives the same.
    """
    return {
        name: _initial(name, shape, seed).to(torch.float32 if name.endswith(_KEPT_IN_FLOAT32) else dtype)
        for name, shape in parameter_shapes(config).items()
        if name.startswith(prefix)
    }


def _initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))  # torch's CPU generator keeps 32 bits
    if name.endswith((".D", "norm.weight")):
        return torch.ones(shape)
    if name.endswith("A_log"):
        if len(shape) == 2:  # Mamba-1: A = -(1 .. N) in every channel
            return torch.arange(1, shape[1] + 1).float().log().repeat(shape[0], 1)
        return torch.empty(shape).uniform_(1, 16, generator=generator).log()
    if name.endswith("dt_bias"):  # softplus(dt_bias) is log-uniform in 0.001 .. 0.1
        dt = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1), generator=generator).exp()
        return dt + torch.log(-torch.expm1(-dt))
    scale = 0.02 if name == "embedding.weight" or name.endswith("bias") else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale
