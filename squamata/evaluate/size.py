"""Size of a model by part, as stored and as read for one token."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.models.lm import model_layouts

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel


def tensor_bytes(model: LanguageModel) -> dict[str, int]:
    """Bytes of every weight and parameter as a checkpoint stores it, scales and second numbers included, by name."""
    layouts = model_layouts(model.config)
    return {
        name: _quantized_bytes(value, Partition(value.spec.granularity, layouts[name]))
        if isinstance(value, QTensor)
        else value.nbytes
        for name, value in model.checkpoint.tensors.items()
    }


def _quantized_bytes(value: QTensor, partition: Partition) -> int:
    """In memory scales are float32 and repeated to broadcast; on disk there is one a group, in ``scale_dtype``."""
    scale = getattr(torch, value.spec.scale_dtype).itemsize
    second = 0 if value.second is None else value.second.element_size()
    sparse = 0 if value.sparse is None else value.sparse.nbytes
    return value.data.nbytes + prod(partition.shape()) * value.spec.numbers * (scale + second) + sparse


def bytes_by_part(model: LanguageModel, batch: int = 1) -> dict[str, int]:
    """Bytes of ``embedding``, ``layers``, ``final_norm``, ``head`` (0 if tied), ``sites`` (scales of activations and
    states) and their ``total``, as stored; and of the ``cache`` of ``batch`` sequences, whatever their length."""
    stored = tensor_bytes(model)
    parts = {
        "embedding": stored["embedding.weight"],
        "layers": sum(count for name, count in stored.items() if name.startswith("layers.")),
        "final_norm": stored["final_norm.weight"],
        "head": stored.get("head.weight", 0),
        "sites": sum(tensor.nbytes for tensor in model.checkpoint.site_tensors.values()),
    }
    cache = sum(layer.nbytes for layer in model.new_cache(batch))
    return parts | {"total": sum(parts.values()), "cache": cache}


def bytes_read_per_token(model: LanguageModel) -> int:
    """Bytes of weights that one token must read: all of them, but of an untied embedding not the table.

    Quantized tensors count as stored, float ones in the model's own float type, whatever the file's was.
    """
    stored, tensors = tensor_bytes(model), model.checkpoint.tensors
    skipped = "embedding.weight" if "head.weight" in tensors else None
    return sum(_runtime_bytes(value, stored[name], model.dtype) for name, value in tensors.items() if name != skipped)


def _runtime_bytes(value: Value, stored: int, dtype: torch.dtype) -> int:
    return stored if isinstance(value, QTensor) else value.numel() * dtype.itemsize
