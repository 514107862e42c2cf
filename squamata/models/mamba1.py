"""Mamba-1 (Gu and Dao 2023), and FalconMamba, which adds RMS norms on dt, B and C."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from squamata.kernels import ops
from squamata.kernels.causal_conv1d import empty_state
from squamata.kernels.conv_selective_scan import SelectiveScanLayer
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site
from squamata.models.block import ROTATION, Block, OptionalTensor, ScanCache
from squamata.models.config import ModelConfig


class Mamba1(Block[ScanCache]):
    """norm -> in_proj -> (x, z); x -> conv, SiLU -> u; u -> x_proj -> (dt, B, C); scan, gate -> rotate -> out_proj."""

    kind = "mamba1"

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Value], sites: dict[str, Site], dtype: torch.dtype
    ) -> None:
        super().__init__(config, tensors, sites, dtype)
        self.in_proj = self.linear("in_proj")
        self.out_proj = self.linear("out_proj")
        self.out_rotation = self.rotation()
        self.scan = SelectiveScanLayer(
            *self.convolution(),
            x_proj=self.linear("x_proj"),
            dt_proj=self.linear("dt_proj"),
            dt_bias=self.parameter("dt_bias"),
            A=-torch.exp(self.parameter("A_log")),
            D=self.parameter("D"),
            bcdt_norm_epsilon=config.bcdt_norm_epsilon,
        )

    @classmethod
    def optional_tensors(cls, config: ModelConfig) -> dict[str, OptionalTensor]:
        return super().optional_tensors(config) | ROTATION

    def forward(self, h: Tensor, residual: Tensor | None, cache: ScanCache) -> tuple[Tensor, Tensor]:
        sites = self.sites
        (x, z), residual = ops.norm_linear(
            h, residual, self.norm, self.config.norm_epsilon, self.in_proj, sites["in"], (sites["x"], sites["z"])
        )
        y = ops.conv_selective_scan(x, z, self.scan, cache.conv, cache.state, sites)
        h = ops.norm_rotate_linear(y, None, None, self.out_rotation, self.out_proj, sites["y"], sites["out"])
        return h, residual

    def new_cache(self, batch: int) -> ScanCache:
        E, N = self.config.d_inner, self.config.d_state
        conv = empty_state(batch, self.config.d_conv, [self.sites["x"]], self.dtype)
        return ScanCache(conv, self.sites["state"].empty(batch, E, N, dtype=self.dtype))
