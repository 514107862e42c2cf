"""Technology and device files, the roofline, and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import recipe_of

from squamata.errors import SquamataError
from squamata.hardware import Device, Technology, estimate
from squamata.hardware.roofline import roof
from squamata.hardware.technology import names
from squamata.models.config import shape

SMALL = Device(
    name="small", memory_gb_per_s=1, memory_gb=1, int8_tops=0.001, float16_tflops=0.0005, float32_tflops=1e-4
)


def test_the_roofline_by_hand() -> None:
    """10^9 int8 products: 2 s at 10^9 operations a second; 10^9 bytes: 1 s; ridge 1 operation a byte."""
    found = roof(SMALL, 1e9, {"int8": 10**9, "float16": 0, "float32": 0}, 2e9)
    assert (found.memory_ms, found.compute_ms, found.floor_ms) == pytest.approx((1000, 2000, 2000))
    assert (found.intensity, found.ridge, found.bound, found.fits) == (2, pytest.approx(1), "compute", False)
    mixed = roof(SMALL, 1e9, {"int8": 10**8, "float16": 10**7, "float32": 0}, 1e9)
    assert mixed.compute_ms == pytest.approx(200 + 40) and mixed.bound == "memory" and mixed.fits
    assert mixed.ridge == pytest.approx(0.22 / 0.24)


def test_floors_of_the_published_shapes_on_an_h200() -> None:
    """Weights over 4.2 TB/s (GPU measurements: 3.04 and 3.80 ms were reached, 22 MB a layer at W4A8)."""
    h200, config = Device.read("h200"), shape("mamba2-2.7b")
    plain, small = (estimate(config, recipe, devices=[h200]) for recipe in ("float", "w4a8"))
    parameters = 2_702_579_200 + 64 * 2560  # counted by hand from the published file, and the layer norms
    assert plain.traffic["weights"] == pytest.approx(2 * parameters, rel=1e-3)
    assert plain.roofline["NVIDIA H200"].memory_ms == pytest.approx(1.33, abs=0.01)
    a_layer = (small.traffic["weights"] - 50288 * 2560 - 50288 * 4 + small.traffic["state"]) / 64
    assert a_layer == pytest.approx(22e6, rel=0.03)
    assert small.roofline["NVIDIA H200"].floor_ms == pytest.approx(0.368, abs=0.001)
    assert small.roofline["NVIDIA H200"].bound == "memory"


@pytest.mark.parametrize(("recipe", "measured_ms"), [("float", 22.73), ("quamba-w8a8", 12.61), ("w4a8", 7.43)])
def test_what_was_measured_on_an_a5000_is_above_the_floor(recipe: str, measured_ms: float) -> None:
    """Quamba2's table 5, Mamba2-8B: 60 to 95 % of what the memory allows."""
    found = estimate(shape("mamba2-8b"), recipe, devices=[Device.read("a5000")]).roofline["NVIDIA RTX A5000"]
    assert found.bound == "memory" and 0.60 < found.floor_ms / measured_ms < 0.95, found


def test_what_did_not_fit_there_does_not_fit_here() -> None:
    """Orin Nano, 8 GB: float16 and W8A8 of the 8B ran out of memory, W4A8 with small tables did not."""
    orin, config = Device.read("orin-nano"), shape("mamba2-8b")
    int4 = {"bits": 4, "granularity": "group(128)", "full_range": True, "scale_dtype": "float16"}
    tables = [{"site": site, "spec": int4} for site in ("embedding.weight", "head.weight")]
    fits = {}
    for recipe in ("float", "quamba-w8a8", recipe_of(*tables, extends="w4a8")):
        found = estimate(config, recipe, devices=[orin])
        fits[found.recipe] = found.roofline[orin.name].fits, found.model_bytes / 1e9
    assert not fits["float"][0] and fits["test"][0]
    assert fits["quamba-w8a8"][1] == pytest.approx(7.9, abs=0.4)  # table 4; what runs beside it needs the rest
    assert fits["test"][1] == pytest.approx(4.0, abs=0.3)


def test_a_batch_shares_the_weights_and_not_the_state() -> None:
    config, h200 = shape("mamba2-2.7b"), Device.read("h200")
    one, many = (estimate(config, "w4a8", batch=batch, devices=[h200]) for batch in (1, 256))
    assert many.dram_bytes_per_token == pytest.approx(
        one.dram_bytes_per_token - one.traffic["weights"] * 255 / 256, rel=1e-12
    )
    assert many.roofline["NVIDIA H200"].intensity > 10 * one.roofline["NVIDIA H200"].intensity
    assert many.energy_per_token_nj < one.energy_per_token_nj / 10
    plain = estimate(config, "float", batch=256, devices=[h200])
    assert plain.roofline["NVIDIA H200"].memory_ms == pytest.approx(11.6, abs=0.2)  # 10 ms of state, 1.3 of weights


@pytest.mark.parametrize("name", names("technologies"))
def test_every_technology_reads(name: str) -> None:
    assert Technology.read(name).name == name


@pytest.mark.parametrize("name", names("devices"))
def test_every_device_reads(name: str) -> None:
    device = Device.read(name)
    assert device.int8_tops > device.float16_tflops > device.float32_tflops


def test_a_technology_of_ones_own(tmp_path: Path) -> None:
    content = Technology.read("7nm").model_dump() | {"name": "mine", "sram_mm2_per_kb": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    found = estimate(shape("mamba2-2.7b"), "quamba-w8a8", Technology.read(tmp_path / "mine.yaml"))
    assert (found.technology, found.sram_mm2) == ("mine", 0.25)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dram_pj_per_byte": 3}, r"unknown key 'dram_pj_per_byte' \(did you mean 'dram_pj_per_bit'\?\)"),
        ({"sram_read_ns": 0}, "sram_read_ns: must be greater than 0, not 0"),
        ({"mux_ns": "fast"}, "mux_ns: must be a number"),
        ({"mux_ns": float("inf")}, "mux_ns: must be a finite number"),
        ({"range_bits": None}, "range_bits: "),
    ],
)
def test_a_wrong_technology_is_one_line(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(Technology.read("7nm").model_dump() | change))
    with pytest.raises(SquamataError, match=said) as caught:
        Technology.read(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "short.yaml").write_text("name: short\n")
    for name, said in (
        ("list.yaml", "is a YAML mapping of name"),
        ("broken.yaml", "not a readable YAML file"),
        ("short.yaml", "float_bits: is missing"),
        ("absent.yaml", "no such technology file"),
    ):
        with pytest.raises(SquamataError, match=said):
            Technology.read(tmp_path / name)
    with pytest.raises(SquamataError, match=r"no device named 'h20' \(did you mean 'h200'\?\)"):
        Device.read("h20")


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "from squamata.hardware import estimate\n"
        "from squamata.models.config import shape\n"
        "print(estimate(shape('mamba2-2.7b'), 'quamba-w8a8').scale_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "256.0\n"), done.stderr
