"""QuantSpec: how one tensor is represented in few bits. Plain frozen data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from squamata.errors import nearest
from squamata.spec.formats import FORMATS, levels
from squamata.spec.granularity import Granularity

TABLE = "table"  # the codec whose levels every row of a weight brings with it
TABLE_BITS = (2, 4)  # fewest and most
SITE_PARTS = ("scale", "zero", "coarse", "tail", "index")  # what may be stored beside a site: SITE.scale ...


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

    Recipe forms: ``minmax``, ``{percentile: {alpha: 0.9999}}``, or for a search over several
    ``{search: [percentile, mse], over: {alpha: [0.999, 0.9999]}, by: kl}``.
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
            if strategy == "search" and isinstance(parameters, list):
                parameters = {"candidates": parameters}
            return {"strategy": strategy, "parameters": parameters or {}}
        if isinstance(value, dict) and isinstance(value.get("search"), list):
            rest = {key: given for key, given in value.items() if key != "search"}
            return {"strategy": "search", "parameters": {"candidates": value["search"]} | rest}
        return value


def _known_codec(name: str) -> str:
    if name not in ("uniform", TABLE, *FORMATS):
        raise ValueError(f"no codec named '{name}'{nearest(name, ('uniform', TABLE, *FORMATS))}")
    return name


class QuantSpec(Data):
    """How one tensor is represented.

    ``bits``: what an element takes in storage. ``codec``: ``uniform``, a format of ``spec.formats``, or ``table``: a
    weight every row of which has 2^bits values of its own (in ``scale_dtype``, instead of a scale); ``sparse`` of its
    elements are left to a sparse float16 matrix, which is added to what the tables say. ``full_range`` uses all 2^bits
    codes of a symmetric format (scale = absmax / (2^(bits-1) - 1/2), as Quamba's W4); otherwise codes
    are -Q..Q with Q = 2^(bits-1) - 1. ``dynamic`` takes the scale at run time instead of from calibration.
    ``rounding`` *stochastic*: up with a probability equal to the fraction, so that the mean stays, by torch's
    generator; for states, which are rounded again at every token.
    ``scale_dtype`` is how scales are stored, and therefore used. ``second_level``: a grouped 4-bit weight as QQQ's
    kernels read it (Quamba's W4A8): value = round(code * ratio) * channel, an int8 weight with one float32 scale a
    row, whose groups store ratio = scale / channel, channel = max |row| / 127.
    """

    bits: Annotated[int, Field(ge=2, le=16)]
    codec: Annotated[str, AfterValidator(_known_codec)] = "uniform"  # a product needs this one
    symmetric: bool = True
    full_range: bool = False
    granularity: GranularityField = Granularity()
    dynamic: bool = False
    scale: ScaleSpec = ScaleSpec()
    rounding: Literal["half-even", "half-away", "truncate", "stochastic"] = "half-even"
    scale_dtype: Literal["float32", "float16"] = "float32"
    second_level: bool = False
    sparse: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _fits_a_table(self) -> QuantSpec:
        if self.codec != TABLE:
            if self.sparse:
                raise ValueError("'sparse' is for weights with 'codec: table': leave it out")
            return self
        if not TABLE_BITS[0] <= self.bits <= TABLE_BITS[1]:
            raise ValueError(f"codec 'table' takes {TABLE_BITS[0]} to {TABLE_BITS[1]} bits, not {self.bits}")
        if str(self.granularity) != "channel":
            raise ValueError(f"codec 'table' has a table a row: use 'granularity: channel', not '{self.granularity}'")
        if not self.symmetric or self.full_range or self.dynamic or self.rounding != "half-even":
            raise ValueError("codec 'table' has values: leave 'symmetric', 'full_range', 'dynamic', 'rounding' out")
        return self

    @model_validator(mode="after")
    def _grouped_if_second_level(self) -> QuantSpec:
        plain = self.codec == "uniform" and self.symmetric and self.bits <= 4 and self.granularity.group is not None
        if self.second_level and not plain:
            raise ValueError("'second_level' is for symmetric weights of at most 4 bits in groups: group(N)")
        return self

    @model_validator(mode="after")
    def _fits_its_codec(self) -> QuantSpec:
        form = FORMATS.get(self.codec)
        if form is None:
            return self
        if self.rounding == "stochastic":
            raise ValueError(f"codec '{self.codec}' is rounded to the nearest level: leave 'rounding: stochastic' out")
        if not form.fewest <= self.bits <= form.most:
            raise ValueError(f"codec '{self.codec}' takes {form.fewest} to {form.most} bits, not {self.bits}")
        if not self.symmetric or self.full_range:
            raise ValueError(f"codec '{self.codec}' has a sign and a magnitude: leave 'symmetric' and 'full_range' out")
        if self.dynamic and form.absolute:
            raise ValueError(f"codec '{self.codec}' has no scale to take at run time: remove 'dynamic: true'")
        if self.dynamic and form.second is not None:
            raise ValueError(f"codec '{self.codec}' needs a calibrated threshold: remove 'dynamic: true'")
        return self

    @property
    def linear_grid(self) -> bool:
        """True if a value is its int8 code (less the zero point) times the scale, so that codes can enter a product."""
        return self.codec == "uniform" and self.bits <= 8

    @property
    def tabulated(self) -> bool:
        """True if every row of the weight brings its own levels."""
        return self.codec == TABLE

    @property
    def numbers(self) -> int:
        """How many numbers a group has where others have a scale: that, or the values of a table."""
        return 2**self.bits if self.tabulated else 1

    @property
    def absolute(self) -> bool:
        """True if the codec's levels are the values themselves: nothing negative, and no scale but 1."""
        return self.codec in FORMATS and FORMATS[self.codec].absolute

    @property
    def form(self) -> str:
        """The number format in a word or two: ``int8``, ``5-bit dual-scale``."""
        return f"int{self.bits}" if self.codec == "uniform" else f"{self.bits}-bit {self.codec}"

    @property
    def flagged(self) -> bool:
        """True if the codes of an activation are packed in memory: four bits of value, and a plane of flags."""
        return self.codec == "dual-scale" and self.bits == 5

    @property
    def carrier(self) -> str:
        """The integer type that holds a code, where codes are not packed."""
        low, high = self.code_range
        return "int8" if low >= -128 and high <= 127 else "int16"

    @property
    def second(self) -> str | None:
        """Name of the second number that a group has beside its scale, stored as ``SITE.NAME``; None if it has none."""
        if self.codec in FORMATS:
            return FORMATS[self.codec].second
        if self.second_level:
            return "channel"
        return None if self.symmetric else "zero"

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code."""
        if self.codec in FORMATS:
            largest = len(levels(self.codec, self.bits)[0]) - 1
            return 0 if self.absolute else -largest, largest
        if self.tabulated:
            return 0, 2**self.bits - 1
        largest = 2 ** (self.bits - 1) - 1
        return (-largest - 1 if self.full_range or not self.symmetric else -largest), largest

    @property
    def span(self) -> float:
        """Divisor that turns the largest magnitude, or the threshold of a format with a tail, into a scale."""
        if self.codec in FORMATS:
            return float(FORMATS[self.codec].span(self.bits))
        return 2 ** (self.bits - 1) - (0.5 if self.full_range else 1.0)

    def describe(self) -> str:
        """One phrase for tables: ``int8 per tensor, percentile(alpha=0.9999)``."""
        how = self.scale.strategy
        if self.scale.parameters:
            how += "(" + ", ".join(f"{key}={value}" for key, value in self.scale.parameters.items()) + ")"
        where = "dynamic" if self.dynamic else how
        if self.tabulated:
            where = f"{self.numbers} values" + (f" + {100 * self.sparse:g} % sparse" if self.sparse else "")
        zero = "" if self.symmetric else " asymmetric"
        return f"{self.form}{zero} per {self.granularity}, {where}"
