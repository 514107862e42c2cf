"""QTensor: integers, their scale, and the spec that says what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squamata.kernels.codec import CODECS
from squamata.kernels.packing import unpack_flagged, unpack_int4, unpack_kept, unpack_stream
from squamata.kernels.sparse import SparseRows
from squamata.spec.granularity import Granularity
from squamata.spec.quant import QuantSpec


@dataclass
class QTensor:
    """A quantized tensor: value = (data - second) * scale with the uniform codec.

    ``data``: int8 codes (int16 where the format needs it); uint8, packed, when ``length`` (the unpacked last axis) is
    given: see ``packing``; or, in simulation, the same integers carried in floating point so that gradients pass.
    ``scale``: float32, broadcasts against data, or (out, in / group) for grouped weights. ``second``: like scale, the
    codec's second number a group (the zero point of an asymmetric uniform grid), for specs that have one; of a
    ``second_level`` spec the channel scale (out, 1), beside ratios as ``scale``. With codec ``table`` the ``scale`` is
    the rows' tables, (out, 2^bits), and ``sparse`` what is added to what they say. ``kept``: float32, like the unpacked
    data: values of the channels that ``spec.keep`` keeps in float; zero elsewhere, as the codes are there.
    ``order``: int64 (K,), the channel at every place of the data's last axis, where channels stand in the order in
    which they fill groups (``spec.group_sizes``), of which the last may have more bits.
    """

    data: Tensor
    scale: Tensor
    spec: QuantSpec
    second: Tensor | None = None
    length: int | None = None
    sparse: SparseRows | None = None
    kept: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked tensor."""
        return tuple(self.data.shape) if self.length is None else (*self.data.shape[:-1], self.length)

    @property
    def simulated(self) -> bool:
        return self.data.dtype.is_floating_point

    def codes(self) -> Tensor:
        """Integer codes less the zero point: as carried, or the next wider integers when asymmetric."""
        codes = self.codes_in_order()
        if self.order is not None:
            codes = codes[..., self.order.argsort()]
        if self.second is None or self.spec.second != "zero":
            return codes
        zero = self._per_element(self.second)
        wide = torch.int16 if self.data.dtype == torch.int8 else torch.int32
        return codes - zero if self.simulated else codes.to(wide) - zero.to(wide)

    def codes_in_order(self) -> Tensor:
        """Codes as they are stored, channels where ``order`` has put them."""
        return self.data if self.length is None else self._unpacked(self.length)

    def _unpacked(self, length: int) -> Tensor:
        if self.spec.kept_channels:
            return unpack_kept(self.data, length, min(self.spec.kept_channels, length))
        if self.spec.tabulated:
            return unpack_stream(self.data, self.spec.bits, length)
        return unpack_flagged(self.data, length) if self.spec.flagged else unpack_int4(self.data, length)

    def element_scale(self) -> Tensor:
        """The scale in a form that broadcasts against the codes, grouped weights included."""
        return self._per_element(self.scale)

    def _per_element(self, part: Tensor) -> Tensor:
        group = self.spec.granularity.group
        if self.spec.kept_channels:
            sizes = torch.tensor(self.spec.group_sizes(self.shape[-1]), device=part.device)
            spread = part.repeat_interleave(sizes, dim=-1)
            return spread if self.order is None else spread[..., self.order.argsort()]
        if group is None or part.ndim < 2 or part.shape[-1] == self.shape[-1]:
            return part
        return part.repeat_interleave(group, dim=-1)[..., : self.shape[-1]]

    def as_operand(self) -> QTensor:
        """What a product multiplies with: itself, or the int8 weight, a scale a row, that two levels of scales mean."""
        if not self.spec.second_level:
            return self
        assert self.second is not None
        codes = torch.round(self.codes() * self.element_scale()).clamp(-127, 127).to(torch.int8)
        return QTensor(codes, self.second, QuantSpec(bits=8, granularity=Granularity(("channel",))))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values in floating point."""
        if self.spec.second_level:
            return self.as_operand().dequantize(dtype)
        second = None if self.second is None else self._per_element(self.second)
        values = CODECS[self.spec.codec].decode(self.codes(), self.element_scale(), second, self.spec, dtype)
        values = values if self.sparse is None else self.sparse.added_to(values)
        return values if self.kept is None else values + self.kept.to(dtype)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        second, kept, order = (
            None if part is None else part.to(device) for part in (self.second, self.kept, self.order)
        )
        sparse = None if self.sparse is None else self.sparse.to(device)
        data, scale = self.data.to(device), self.scale.to(device)
        return QTensor(data, scale, self.spec, second, self.length, sparse, kept, order)

    @property
    def nbytes(self) -> int:
        second = 0 if self.second is None else self.second.nbytes
        sparse = 0 if self.sparse is None else self.sparse.nbytes
        return self.data.nbytes + self.scale.nbytes + second + sparse


Value = Tensor | QTensor


def join_rows(parts: Sequence[Value]) -> Value:
    """One tensor of the rows of several, none of which share a scale."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    tensors = [part for part in parts if isinstance(part, QTensor)]
    assert first.sparse is None, "tables are for the weights of layers, which are never in parts"
    second = [part.second for part in tensors if part.second is not None]
    data, scale = torch.cat([part.data for part in tensors]), torch.cat([part.scale for part in tensors])
    return QTensor(data, scale, first.spec, torch.cat(second) if second else None, first.length)


def as_float(value: Value, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value in floating point, whatever it is stored in (a float tensor keeps its own type)."""
    return value.dequantize(dtype) if isinstance(value, QTensor) else value


def recalled(storage: Value, dtype: torch.dtype) -> Tensor:
    """What a cache's storage holds, in floating point; apart from it where a graph may need it after ``store``."""
    held = as_float(storage, dtype)
    return held.clone() if held is storage and torch.is_grad_enabled() else held


def store(storage: Value, value: Value) -> None:
    """Write a value into a cache's storage in place (a dynamic scale is written with it)."""
    if isinstance(storage, QTensor) and isinstance(value, QTensor):
        storage.data.copy_(value.data.detach())
        if storage.spec.dynamic:
            storage.scale.copy_(value.scale)
            if storage.second is not None and value.second is not None:
                storage.second.copy_(value.second)
    else:
        assert isinstance(storage, Tensor)
        storage.copy_(as_float(value, storage.dtype).detach())
