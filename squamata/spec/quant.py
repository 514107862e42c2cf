"""QuantSpec: how one tensor is represented in few bits. Plain frozen data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from squamata.spec.granularity import Granularity

SITE_PARTS = ("scale", "zero", "index")  # what may be stored beside a site: SITE.scale ...


class Data(BaseModel):
    """Base of everything a recipe says: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


GranularityField = Annotated[
    Granularity,
    BeforeValidator(lambda value: Granularity.parse(value) if isinstance(value, str) else value),
    PlainSerializer(str, return_type=str),
]


class ScaleSpec(Data):
    """Name of a strategy in ``squamata.scales`` and its parameters.

    Recipe forms: ``minmax`` or ``{percentile: {alpha: 0.9999}}``.
    """

    strategy: str = "minmax"
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"strategy": value}
        if isinstance(value, dict) and len(value) == 1 and "strategy" not in value:
            ((strategy, parameters),) = value.items()
            return {"strategy": strategy, "parameters": parameters or {}}
        return value


class QuantSpec(Data):
    """How one tensor is represented.

    ``full_range`` uses all 2^bits codes of a symmetric format (scale = absmax / (2^(bits-1) - 1/2), as Quamba's
    W4); otherwise codes are -Q..Q with Q = 2^(bits-1) - 1. ``dynamic`` takes the scale at run time instead of from
    calibration. ``scale_dtype`` is how scales are stored, and therefore used.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    codec: Literal["uniform"] = "uniform"  # names in kernels/codec.py; a product needs the uniform one
    symmetric: bool = True
    full_range: bool = False
    granularity: GranularityField = Granularity()
    dynamic: bool = False
    scale: ScaleSpec = ScaleSpec()
    rounding: Literal["half-even", "half-away", "truncate"] = "half-even"
    scale_dtype: Literal["float32", "float16"] = "float32"

    @property
    def linear_grid(self) -> bool:
        """True if a value is its code (less the zero point) times the scale, so that codes can enter a product."""
        return self.codec == "uniform"

    @property
    def second(self) -> str | None:
        """Name of the second number that a group has beside its scale, stored as ``SITE.NAME``; None if it has none."""
        return None if self.symmetric else "zero"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        largest = 2 ** (self.bits - 1) - 1
        return (-largest - 1 if self.full_range or not self.symmetric else -largest), largest

    @property
    def span(self) -> float:
        """Divisor that turns the largest magnitude into a scale."""
        return 2 ** (self.bits - 1) - (0.5 if self.full_range else 1.0)

    def describe(self) -> str:
        """One phrase for tables: ``int8 per tensor, percentile(alpha=0.9999)``."""
        how = self.scale.strategy
        if self.scale.parameters:
            how += "(" + ", ".join(f"{key}={value}" for key, value in self.scale.parameters.items()) + ")"
        where = "dynamic" if self.dynamic else how
        zero = "" if self.symmetric else " asymmetric"
        return f"int{self.bits}{zero} per {self.granularity}, {where}"
