"""Writes checkpoints in the layout of Quamba (enyac-group/Quamba, June 2025) from checkpoints of ours.

Names and packing were taken from its classes' buffers and state-dict hooks, and are written out the other way round
from ``squamata.load.quamba_layers``, so that a wrong name there is not repeated here. What their format cannot hold to
the last bit (a scale as a quotient, a group scale as float16 times float32) is rounded first: ``write_quamba`` returns
the checkpoint that the files hold.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata.kernels.qtensor import QTensor
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig

State = dict[str, Any]


def marlin_tiles(codes: Tensor, rows_of_a_thread: Any) -> Tensor:
    """Codes 0..15 (K, N) -> int32 (K / 16, 2 N): 16 x 64 tiles, 32 threads, eight nibbles an int32."""
    K, N = codes.shape
    packed = torch.zeros(K // 16, 2 * N, dtype=torch.int64)
    for top in range(0, K, 16):
        words: list[int] = []
        for left in range(0, N, 64):
            tile = codes[top : top + 16, left : left + 64].tolist()
            for thread in range(32):
                for block in range(4):
                    column = 16 * block + thread // 4
                    held = [tile[row][column + 8 * half] for half in (0, 1) for row in rows_of_a_thread(thread % 4)]
                    words.append(
                        sum(held[source] << (4 * place) for place, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
                    )
        packed[top // 16] = torch.tensor(words)
    return (packed - (packed >> 31 << 32)).to(torch.int32)


def qqq_rows(quad: int) -> list[int]:
    return [4 * quad, 4 * quad + 1, 4 * quad + 2, 4 * quad + 3]


def marlin_rows(quad: int) -> list[int]:
    return [2 * quad, 2 * quad + 1, 2 * quad + 8, 2 * quad + 9]


def permuted(scale: Tensor, single: bool) -> Tensor:
    """Scales (..., N) in the order of the kernels."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    if single:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scale.reshape(-1, len(order))[:, order].reshape(scale.shape)


class QuambaWriter:
    """Collects the state dict of one checkpoint, and what the files will hold where that had to be rounded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.written = dict(checkpoint.tensors)
        self.state: State = {}

    def codes(self, name: str) -> tuple[Tensor, QTensor]:
        tensor = self.checkpoint.tensors[name]
        assert isinstance(tensor, QTensor)
        return tensor.codes(), tensor

    def site(self, name: str) -> Tensor:
        return self.checkpoint.site_tensors[f"{name}.scale"]

    def linear8(self, name: str, theirs: str, s_in: Tensor, s_out: Tensor | None = None) -> None:
        codes, tensor = self.codes(name)
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 16))
        a = s_in if s_out is None else s_in / s_out
        self.state |= {f"{theirs}.weight": padded.T, f"{theirs}.a": a.reshape(1, 1)}
        self.state |= {f"{theirs}.b": tensor.scale.reshape(1, 1).clone(), f"{theirs}.alpha": float(a * tensor.scale)}

    def linear8_parallel(self, name: str, theirs: str, s_in: Tensor, s_out: Tensor) -> None:
        """``s_out`` (N,): of every output."""
        codes, tensor = self.codes(name)
        rows = len(codes)
        quotient = (tensor.scale.reshape(-1).double() / s_out.double()).float()
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -rows % 16))
        b = torch.nn.functional.pad(quotient, (0, -rows % 16)).reshape(1, -1)
        self.state |= {f"{theirs}.weight": padded.T, f"{theirs}.a": s_in.reshape(1, 1), f"{theirs}.b": b}
        held = (quotient.double() * s_out.double()).float().reshape(tensor.scale.shape)
        self.written[name] = replace(tensor, scale=held)

    def linear4(self, name: str, theirs: str, s_in: Tensor | None, s_out: Tensor | None = None) -> None:
        """QQQ with an input scale, Marlin without. ``s_out``: () or (N,)."""
        codes, tensor = self.codes(name)
        rows = len(codes)
        multiple = 256 if s_in is None else 64
        values = torch.nn.functional.pad(codes + 8, (0, 0, 0, -rows % multiple)).T
        missing = -rows % multiple
        if s_in is None:
            assert torch.equal(tensor.scale, tensor.scale.half().float())
            self.state[f"{theirs}.weight"] = marlin_tiles(values, marlin_rows)
            scale = torch.nn.functional.pad(tensor.scale.half().T, (0, missing))
            self.state |= {f"{theirs}.scale": permuted(scale, False), f"{theirs}.workspace": torch.zeros(4).int()}
            return
        channel = tensor.dequantize().abs().amax(1).clamp_min(1e-6) / 127
        group = (tensor.scale / channel[:, None]).half()
        out = torch.ones(rows) if s_out is None else s_out.expand(rows)
        fused = channel / out
        held = (group.double() * fused.double()[:, None] * out.double()[:, None]).float()
        self.written[name] = replace(tensor, scale=held)
        s_group = torch.nn.functional.pad(group.T, (0, missing))
        s_channel = torch.nn.functional.pad(fused.reshape(1, -1), (0, missing), value=1e-6)
        self.state |= {
            f"{theirs}.weight": marlin_tiles(values, qqq_rows),
            f"{theirs}.input_scale": s_in.clone(),
            f"{theirs}.s_group": permuted(s_group, False),
            f"{theirs}.s_channel": permuted(s_channel, True),
            f"{theirs}.workspace": torch.zeros(4).int(),
        }

    def parameter(self, name: str, theirs: str, scale: str, number: bool) -> None:
        codes, tensor = self.codes(name)
        self.state[theirs] = codes
        self.state[scale] = float(tensor.scale) if number else tensor.scale.clone()

    def mamba1(self, layer: int, four_bits: bool) -> None:
        ours, theirs = f"layers.{layer}.mixer.", f"backbone.layers.{layer}.mixer."
        s_in, s_x, s_u, s_low, s_dt, s_out = (
            self.site(f"{ours}{name}") for name in ("in", "x", "u", "dt_low", "dt", "out")
        )
        projections = (("in_proj", s_in, s_x), ("x_proj", s_u, s_low), ("out_proj", s_out, None))
        for name, before, after in projections:
            write = self.linear4 if four_bits else self.linear8
            write(f"{ours}{name}.weight", theirs + name, before, after)
        self.linear8(f"{ours}dt_proj.weight", f"{theirs}dt_proj", s_low, s_dt)
        conv = f"{theirs}conv1d."
        self.parameter(f"{ours}conv.weight", f"{conv}weight", f"{conv}weight_scale", True)
        self.parameter(f"{ours}conv.bias", f"{conv}bias", f"{conv}bias_scale", True)
        self.state |= {f"{conv}input_scale": float(s_x), f"{conv}output_scale": float(s_u)}
        scan = f"{theirs}selective_scan."
        self.parameter(f"{ours}A_log", f"{scan}A_log", f"{scan}A_scale", False)
        self.parameter(f"{ours}D", f"{scan}D", f"{scan}D_scale", False)
        self.parameter(f"{ours}dt_bias", f"{scan}dt_bias", f"{scan}dt_bias_scale", False)
        scales = {"u": s_u, "dt": s_dt, "B": s_low, "C": s_low, "z": s_x, "ssm_state": self.site(f"{ours}state")}
        self.state |= {f"{scan}{name}_scale": scale.clone() for name, scale in scales.items()}
        self.state[f"{theirs}had.x_H_scale"] = float(s_out)

    def mamba2(self, layer: int, four_bits: bool, ranges: tuple[Tensor, Tensor] | None) -> None:
        ours, theirs = f"layers.{layer}.mixer.", f"backbone.layers.{layer}.mixer."
        config = self.config
        E, GN, H = config.d_inner, config.n_groups * config.d_state, config.n_heads
        scales = {name: self.site(f"{ours}{name}") for name in ("z", "x", "B", "C", "dt")}
        rows = torch.cat([scale.repeat(n) for scale, n in zip(scales.values(), (E, E, GN, GN, H), strict=True)])
        s_in, s_out = self.site(f"{ours}in"), self.site(f"{ours}out")
        write = self.linear4 if four_bits else self.linear8_parallel
        write(f"{ours}in_proj.weight", f"{theirs}in_proj", s_in, rows)
        (self.linear4 if four_bits else self.linear8)(f"{ours}out_proj.weight", f"{theirs}out_proj", s_out)
        conv, scan = f"{theirs}conv1d.", f"{theirs}qchunk_scan."
        for ours_name, name, letter in (("conv.weight", "weight", "w"), ("conv.bias", "bias", "b")):
            codes, tensor = self.codes(ours + ours_name)
            self.state[conv + name] = codes
            for part, row in zip("xBC", (0, E, E + GN), strict=True):
                self.state[f"{conv}{letter}{part}_scale"] = float(tensor.scale.reshape(-1)[row])
        self.state |= {f"{conv}{name}_scale": float(scales[name]) for name in ("x", "B", "C")}
        u, state = self.site(f"{ours}u"), self.site(f"{ours}state")
        if ranges is not None:
            G, h, c = ranges[1].shape
            named = {"x_head_group_range": ranges[0].int(), "x_dim_group_range": ranges[1].int()}
            self.state |= {f"{where}{name}": value for where in (conv, scan) for name, value in named.items()}
            u, state = u.reshape(G, h, c), state.reshape(G, h, c, -1)
        self.state |= {f"{conv}x_out_scales": u, f"{scan}x_scales": u, f"{scan}ssm_state_scale": state}
        for name in "BC":
            scale = self.site(f"{ours}{name}_conv")
            self.state |= {f"{conv}{name}_out_scales": scale, f"{scan}{name}_scale": scale}
        self.parameter(f"{ours}A_log", f"{scan}A_log", f"{scan}A_log_scale", False)
        self.parameter(f"{ours}D", f"{scan}D", f"{scan}D_scale", False)
        self.state |= {f"{scan}dt_scale": scales["dt"].clone(), f"{theirs}had.x_H_scale": float(s_out)}
        self.state |= {f"{scan}dt_bias": self.checkpoint.tensors[f"{ours}dt_bias"]}
        norm = f"{theirs}norm."
        self.state |= {f"{norm}weight": self.checkpoint.tensors[f"{ours}gate_norm.weight"]}
        self.state |= {f"{norm}z_scale": float(scales["z"]), f"{norm}output_scale": None}

    def float_layer(self, layer: int, kind: str) -> None:
        """W4A16."""
        ours, theirs = f"layers.{layer}.mixer.", f"backbone.layers.{layer}.mixer."
        for name in ("in_proj", "x_proj", "out_proj") if kind == "mamba1" else ("in_proj", "out_proj"):
            self.linear4(f"{ours}{name}.weight", theirs + name, None)
        plain = {"conv.bias": "conv1d.bias", "A_log": "A_log", "D": "D"}
        plain |= {"dt_bias": "dt_proj_bias", "dt_proj.weight": "dt_proj.weight"} if kind == "mamba1" else {}
        plain |= {"dt_bias": "dt_bias", "gate_norm.weight": "norm.weight"} if kind == "mamba2" else {}
        self.state |= {theirs + name: self.checkpoint.tensors[ours + mine] for mine, name in plain.items()}
        weight = self.checkpoint.tensors[f"{ours}conv.weight"]
        assert isinstance(weight, Tensor)
        self.state[f"{theirs}conv1d.weight"] = weight.unsqueeze(1)

    def layer(self, layer: int, precision: str, ranges: tuple[Tensor, Tensor] | None = None) -> None:
        kind = self.config.blocks[layer]
        self.state[f"backbone.layers.{layer}.norm.weight"] = self.checkpoint.tensors[f"layers.{layer}.norm.weight"]
        if precision == "W4A16":
            self.float_layer(layer, kind)
            return
        self.state[f"backbone.layers.{layer}.norm.output_scale"] = float(self.site(f"layers.{layer}.mixer.in"))
        if kind == "mamba1":
            self.mamba1(layer, precision == "W4A8")
        else:
            self.mamba2(layer, precision == "W4A8", ranges)

    def embedding(self) -> str:
        """Writes the embedding, returns the name of its class."""
        tensor = self.checkpoint.tensors["embedding.weight"]
        where = "backbone.embedding."
        if isinstance(tensor, Tensor):
            self.state[f"{where}weight"] = tensor
            return "Embedding"
        self.state[f"{where}scales"] = tensor.scale.reshape(-1).half()
        if tensor.spec.bits == 8:
            self.state[f"{where}weight"] = tensor.codes()
            return "W8O16Embedding"
        eights = (tensor.codes().long() + 8).unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        words = sum(eights[..., place] << (4 * place) for place in range(8))
        self.state[f"{where}weight"] = (words - (words >> 31 << 32)).to(torch.int32)
        return "W4O16Embedding"

    def head(self, four_bits: bool) -> str:
        self.state["backbone.norm_f.weight"] = self.checkpoint.tensors["final_norm.weight"]
        tensor = self.checkpoint.tensors["head.weight"]
        if isinstance(tensor, Tensor):
            self.state["lm_head.weight"] = tensor
            return "Linear"
        if "head.in.scale" not in self.checkpoint.site_tensors:
            self.linear4("head.weight", "lm_head", None)
            return "W4A16B16O16Linear"
        self.state["backbone.norm_f.output_scale"] = float(self.site("head.in"))
        (self.linear4 if four_bits else self.linear8)("head.weight", "lm_head", self.site("head.in"))
        return "W4A8B16O16Linear" if four_bits else "W8A8B16O16Linear"


def quamba_config(config: ModelConfig, layer: Any, embedding: str, head: str) -> dict[str, Any]:
    """``config.json``: mamba_ssm's with the names of classes."""
    ssm: dict[str, Any] = {"layer": layer, "d_state": config.d_state, "expand": config.d_inner / config.d_model}
    if config.architecture == "mamba2":
        ssm |= {"headdim": config.head_dim, "ngroups": config.n_groups}
    else:
        ssm |= {"dt_rank": config.dt_rank}
    plain = {"d_model": config.d_model, "n_layer": config.n_layers, "vocab_size": config.vocab_size, "rms_norm": True}
    plain |= {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "pad_vocab_size_multiple": 8}
    plain |= {"residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": False}
    classes = {"norm_cfg": {"norm": "QRMSNorm"}, "embedding_cfg": {"layer": embedding}, "lm_head_cfg": {"layer": head}}
    return plain | {"ssm_cfg": ssm} | classes


def write_quamba(
    folder: Path, checkpoint: Checkpoint, precision: str, ranges: tuple[Tensor, Tensor] | None = None
) -> Checkpoint:
    """Write the folder; returns what the files hold, which differs where the format cannot hold a scale exactly."""
    writer = QuambaWriter(checkpoint)
    for layer in range(checkpoint.config.n_layers):
        writer.layer(layer, precision, ranges)
    embedding = writer.embedding()
    head = writer.head(four_bits=precision.startswith("W4"))
    mixer = f"{precision}QMamba{'2' if checkpoint.config.architecture == 'mamba2' else ''}"
    save(folder, writer.state, quamba_config(checkpoint.config, mixer, embedding, head))
    return replace(checkpoint, tensors=writer.written)


def save(folder: Path, state: State, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
