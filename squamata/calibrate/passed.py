"""A layer's forward pass, of which gradients may be taken: its ops overwrite the cache that the graph still needs."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from squamata.kernels.qtensor import QTensor
from squamata.models.block import Block


def passed(block: Block, h: Tensor) -> tuple[Tensor, Tensor]:
    """What the block writes to a stream h (B, L, D) that begins here, and the stream as it adds to it.

    What autograd saves of the cache is copied when it is saved. (torch's ``allow_mutation_on_saved_tensors`` copies
    when it is overwritten and then knows tensors by addresses, which the next tensors have again: wrong gradients.)
    """
    cache = block.new_cache(len(h))
    values = (getattr(cache, field.name) for field in fields(cache))
    tensors = [part for value in values for part in _tensors(value)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def kept(tensor: Tensor) -> tuple[Tensor, int]:
        tensor = tensor.detach()
        tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        return tensor, tensor._version

    def given_back(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        assert tensor._version == version, "overwritten since it was saved: no gradient can be right"
        return tensor

    with saved_tensors_hooks(kept, given_back):
        return block.forward(h, None, cache)


def _tensors(value: Tensor | QTensor) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [value.data, value.scale, *([] if value.second is None else [value.second])]
