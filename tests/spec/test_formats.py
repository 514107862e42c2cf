"""Number formats: their exact levels, what they take in storage, and where recipes may put them."""

from __future__ import annotations

from typing import Any

import pytest

from squamata.errors import SquamataError
from squamata.spec.formats import FORMATS, levels
from squamata.spec.quant import QuantSpec
from squamata.spec.recipe import Recipe

QUARTERS = [step / 4 for step in range(64)]
FINE_LEVELS: dict[tuple[str, int], list[float]] = {
    ("soft-edge", 9): [*QUARTERS, *range(16, 144), *range(147, 396, 4)],
    ("soft-edge", 8): [*(step / 4 for step in range(32)), *range(8, 72), *range(75, 196, 4)],
    ("half-scale", 9): [*(step / 2 for step in range(128)), *range(64, 128)],
    ("quarter-scale", 9): [*(step / 4 for step in range(128)), *range(32, 128)],
    ("quarter-log2", 7): [*(step / 4 for step in range(33)), *(8 + 2**k / 4 for k in range(31))],
    ("outlier-piecewise", 8): [*range(121), *[120] * 7],
    ("dual-scale", 5): [*range(8), *[0] * 7],
    ("dual-scale", 9): [*range(128), *[0] * 127],
    ("log2", 4): [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
}
COARSE_LEVELS: dict[tuple[str, int], list[float]] = {
    ("outlier-piecewise", 8): [*[0] * 121, *range(1, 8)],
    ("dual-scale", 5): [*[0] * 8, *range(1, 8)],
}
FINE_LEVELS |= {  # 1 - 2^-q, and q in halves
    ("ltsq", 3): [0, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32, 63 / 64, 127 / 128],
    ("ltsq-fine", 5): [1 - 2 ** -(half / 2) for half in range(32)],
    ("fixed", 3): [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8],
}
SPANS = {("soft-edge", 9): 127, ("half-scale", 9): 127, ("quarter-scale", 9): 127, ("quarter-log2", 7): 127}
SPANS |= {("outlier-piecewise", 8): 120, ("dual-scale", 5): 7, ("log2", 4): 1}


def every_format() -> list[tuple[str, int]]:
    return [(name, bits) for name, form in FORMATS.items() for bits in range(form.fewest, form.most + 1)]


@pytest.mark.parametrize(("codec", "bits"), list(FINE_LEVELS))
def test_levels_are_those_of_the_papers(codec: str, bits: int) -> None:
    fine, coarse = levels(codec, bits)
    assert list(fine) == FINE_LEVELS[codec, bits]
    if (codec, bits) in COARSE_LEVELS:
        assert coarse is not None and list(coarse) == COARSE_LEVELS[codec, bits]
    assert (coarse is None) == (FORMATS[codec].coarse is None)
    if (codec, bits) in SPANS:
        assert QuantSpec(bits=bits, codec=codec).span == SPANS[codec, bits]


@pytest.mark.parametrize(("codec", "bits"), every_format())
def test_codes_fit_into_the_bits(codec: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, codec=codec)
    low, high = spec.code_range
    if FORMATS[codec].absolute:
        assert low == 0 and high <= 2**bits - 1
    else:
        assert -low == high <= 2 ** (bits - 1) - 1
    assert spec.carrier == ("int8" if high <= 127 else "int16")
    fine, coarse = levels(codec, bits)
    assert len(fine) == high + 1 and (coarse is None or len(coarse) == high + 1)
    rising = [a + 1000 * b for a, b in zip(fine, coarse or (0,) * len(fine), strict=True)]
    assert rising[0] == 0 and rising == sorted(set(rising))


def test_three_segments_need_nine_bits() -> None:
    """The paper's levels do not fit int8: 254 magnitudes besides 0, and a sign."""
    largest = QuantSpec(bits=9, codec="soft-edge").code_range[1]
    assert 2**8 < 2 * largest + 1 < 2**9


def refused(**spec: Any) -> str:
    with pytest.raises(SquamataError) as caught:
        Recipe.from_mapping({"name": "m", "rules": [{"site": "*.mixer.u", "spec": spec}]})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_specs_that_no_codec_has_are_refused() -> None:
    assert "did you mean 'soft-edge'" in refused(bits=9, codec="soft-egde")
    assert "codec 'soft-edge' takes 5 to 9 bits, not 10" in refused(bits=10, codec="soft-edge")
    assert "leave 'symmetric'" in refused(bits=5, codec="dual-scale", symmetric=False)
    assert "leave 'symmetric' and 'full_range' out" in refused(bits=5, codec="log2", full_range=True)
    assert "needs a calibrated threshold" in refused(bits=5, codec="dual-scale", dynamic=True, granularity="token")


def resolved(kind: str, *rules: dict[str, Any]) -> dict[str, QuantSpec]:
    return Recipe.from_mapping({"name": "m", "rules": list(rules)}).resolve((kind,))


def illegal(kind: str, *rules: dict[str, Any]) -> str:
    with pytest.raises(SquamataError) as caught:
        resolved(kind, *rules)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DUAL = {"bits": 5, "codec": "dual-scale"}
NINE = {"bits": 9}


def test_formats_are_refused_where_codes_meet_codes() -> None:
    assert "a product needs one step size; use 'uniform'" in illegal("mamba2", {"site": "*.mixer.in", "spec": DUAL})
    said = illegal("mamba1", {"site": "*.mixer.u", "spec": DUAL})
    assert "give the product a site of its own: a rule for 'u_proj'" in said
    assert "a product needs one step size" in illegal("mamba2", {"site": "*.in_proj.weight", "spec": DUAL})
    assert "9 bits cannot run: a product takes 8 at most" in illegal("mamba2", {"site": "*.mixer.out", "spec": NINE})
    assert "8 at most" in illegal("mamba2", {"site": "head.weight", "spec": NINE})
    assert "parameters are int8" in illegal("mamba2", {"site": "*.mixer.A_log", "spec": NINE})
    live = {"bits": 9, "codec": "dynamic-outlier"}
    assert "only activations have" in illegal("mamba2", {"site": "*.mixer.state", "spec": live})


@pytest.mark.parametrize("spec", [DUAL, NINE, {"bits": 9, "codec": "dynamic-outlier"}])
def test_formats_are_legal_where_values_are_dequantized_first(spec: dict[str, Any]) -> None:
    assert resolved("mamba2", {"site": "*.mixer.u", "spec": spec})["layers.0.mixer.u"] == QuantSpec(**spec)
    apart = {"site": "*.mixer.u_proj", "spec": {"bits": 8}}
    specs = resolved("mamba1", {"site": "*.mixer.u", "spec": spec}, apart)
    assert specs["layers.0.mixer.u"] == QuantSpec(**spec) and specs["layers.0.mixer.u_proj"] == QuantSpec(bits=8)


def test_a_scale_a_channel_is_legal_at_u_once_x_proj_reads_another_site() -> None:
    rule = {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "channel"}}
    assert "sums over channel" in illegal("mamba1", rule)
    assert len(resolved("mamba1", rule, {"site": "*.mixer.u_proj", "spec": {"bits": 8}})) == 2
    assert "sums over channel" in illegal("mamba1", rule, {"site": "*.mixer.u_proj", "spec": rule["spec"]})


def test_a_site_on_request_is_matched_by_its_own_name_only() -> None:
    assert "layers.0.mixer.u_proj" not in resolved("mamba1", {"site": "*.mixer.u*", "spec": {"bits": 8}})
    assert "layers.0.mixer.u_proj" not in resolved("mamba1", {"site": "*", "spec": {"bits": 8}})
    named = resolved("mamba1", {"site": "layers.*.u_proj", "spec": {"bits": 8}})
    assert list(named) == ["layers.0.mixer.u_proj"]
