"""Mamba-2 (Dao and Gu 2024): heads that share B and C in groups, scalar decay a head, gated norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from squamata.kernels import ops
from squamata.kernels.causal_conv1d import empty_state
from squamata.kernels.conv_ssd_scan import SSDScanLayer
from squamata.kernels.norm_rotate_linear import GatedNorm
from squamata.kernels.qtensor import Value
from squamata.kernels.site import Site
from squamata.kernels.ssd_scan import HeadLayout
from squamata.models.block import ROTATION, Block, OptionalTensor, ScanCache
from squamata.models.config import ModelConfig


class Mamba2(Block[ScanCache]):
    """norm -> in_proj -> (z, x, B, C, dt); x, B, C -> conv, SiLU; scan; gated norm -> rotate -> out_proj."""

    kind = "mamba2"

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Value], sites: dict[str, Site], dtype: torch.dtype
    ) -> None:
        super().__init__(config, tensors, sites, dtype)
        self.in_proj = self.linear("in_proj")
        self.out_proj = self.linear("out_proj")
        self.out_rotation = self.rotation()
        self.gate_norm = GatedNorm(self.parameter("gate_norm.weight"), config.gate_norm_epsilon, config.n_groups)
        self.scan = SSDScanLayer(
            *self.convolution(),
            dt_bias=self.parameter("dt_bias"),
            A=-torch.exp(self.parameter("A_log")),
            D=self.parameter("D"),
            layout=HeadLayout(
                config.n_heads,
                config.head_dim,
                config.n_groups,
                config.d_state,
                config.chunk_size,
                config.time_step_limit,
            ),
        )

    @classmethod
    def optional_tensors(cls, config: ModelConfig) -> dict[str, OptionalTensor]:
        return super().optional_tensors(config) | ROTATION

    def forward(self, h: Tensor, residual: Tensor | None, cache: ScanCache) -> tuple[Tensor, Tensor]:
        sites = self.sites
        (z, x, B, C, dt), residual = ops.norm_linear(
            h,
            residual,
            self.norm,
            self.config.norm_epsilon,
            self.in_proj,
            sites["in"],
            (sites["z"], sites["x"], sites["B"], sites["C"], sites["dt"]),
        )
        y = ops.conv_ssd_scan(x, B, C, dt, self.scan, cache.conv, cache.state, sites)
        h = ops.norm_rotate_linear(y, z, self.gate_norm, self.out_rotation, self.out_proj, sites["y"], sites["out"])
        return h, residual

    def new_cache(self, batch: int) -> ScanCache:
        config = self.config
        conv = empty_state(batch, config.d_conv, [self.sites[name] for name in ("x", "B", "C")], self.dtype)
        state = self.sites["state"].empty(batch, config.n_heads, config.head_dim, config.d_state, dtype=self.dtype)
        return ScanCache(conv, state)
