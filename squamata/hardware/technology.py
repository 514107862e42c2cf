"""Technology and Device: the constants of a chip, read from YAML with the units in the names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from squamata.errors import SquamataError, nearest
from squamata.spec.quant import Data
from squamata.spec.yaml_file import SUFFIXES, first_problem, read_yaml

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bits = Annotated[int, Field(ge=1, le=64)]


class Technology(Data):
    """What a chip is made of. A KB of ``sram_mm2_per_kb`` has 1024 bytes; ``float_bits`` is the width of whatever a
    recipe leaves in float; ``multiport_area_ratio`` the area of an SRAM that is read at many places at once."""

    name: str
    description: str = ""
    float_bits: Bits
    sram_mm2_per_kb: Positive
    sram_read_pj_per_bit: Positive
    sram_write_pj_per_bit: Positive
    sram_read_ns: Positive
    multiport_area_ratio: Positive
    range_bits: Bits
    comparator_ns: Positive
    mux_ns: Positive
    wide_mux_ns: Positive
    int8_mac_pj: Positive
    float16_mac_pj: Positive
    float32_mac_pj: Positive
    int8_mac_mm2: Positive
    dram_pj_per_bit: Positive
    accelerator_mm2: Positive

    @classmethod
    def read(cls, name_or_path: str | Path) -> Technology:
        """A technology that comes with the package, or a YAML file."""
        return _read(cls, name_or_path, "technologies", "technology")


class Device(Data):
    """A processor's memory and its peaks (dense; one product and one sum are two operations)."""

    name: str
    memory_gb_per_s: Positive
    memory_gb: Positive
    int8_tops: Positive
    float16_tflops: Positive
    float32_tflops: Positive

    @classmethod
    def read(cls, name_or_path: str | Path) -> Device:
        """A device that comes with the package, or a YAML file."""
        return _read(cls, name_or_path, "devices", "device")


def names(folder: str) -> list[str]:
    """Names of the YAML files of a folder of this room: ``technologies`` or ``devices``."""
    return sorted(path.stem for path in (Path(__file__).parent / folder).glob("*.yaml"))


Described = TypeVar("Described", Technology, Device)


def _read(kind: type[Described], name_or_path: str | Path, folder: str, what: str) -> Described:
    path = Path(name_or_path)
    if path.suffix not in SUFFIXES:
        if str(name_or_path) not in names(folder):
            known = nearest(str(name_or_path), names(folder))
            raise SquamataError(f"no {what} named '{name_or_path}'{known}; a file of your own ends in .yaml")
        path = Path(__file__).parent / folder / f"{name_or_path}.yaml"
    return _checked(kind, read_yaml(path, what), str(name_or_path), what)


def _checked(kind: type[Described], content: Any, origin: str, what: str) -> Described:
    """SquamataError, one line, for what is missing, unknown (with the nearest name) or out of range."""
    if not isinstance(content, dict):
        raise SquamataError(f"{origin}: a {what} is a YAML mapping of {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, lambda place: nearest(str(place[-1]), kind.model_fields))
        raise SquamataError(f"{origin}: {problem}") from None
