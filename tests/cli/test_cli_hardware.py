"""``squamata hardware``: the exact keys, the assumption beside the truth, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

KEYS = {
    *("scale_bytes_per_layer", "scale_bytes", "sram_mm2", "accelerator_share", "lookup_bits", "lookup_energy_nj"),
    *("conv_energy_nj", "lookup_latency_ns", "dram_bytes_per_token", "energy_per_token_nj"),
}


@pytest.fixture
def piecewise(tmp_path: Path) -> Path:
    """A recipe with ragged groups at u and the state."""
    content = {
        "name": "piecewise",
        "extends": "w4a8",
        "architectures": ["mamba2"],
        "rules": [
            {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index"}},
            {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state"}},
        ],
    }
    path = tmp_path / "piecewise.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_assumption_stands_beside_the_truth(succeed: Callable[..., dict[str, Any]], piecewise: Path) -> None:
    ask = ("hardware", "--shape", "mamba2-2.7b", "--recipe", piecewise, "--technology", "7nm")
    found = succeed(*ask, "--ssd-groups", 8)
    assert set(found) >= KEYS and set(found["lookup_latency_ns"]) == {"sequential", "parallel", "table"}
    assert (found["scale_bytes_per_layer"], found["scale_bytes"], found["lookup_bits"]) == (1152, 73728, 672)
    assert found["lookup_latency_ns"] == pytest.approx({"sequential": 7.4, "parallel": 2.0, "table": 1.0})
    assert found["sram_mm2"] == pytest.approx(2.88) and found["accelerator_share"] == pytest.approx(0.0443, abs=1e-4)
    assert found["lookup_energy_nj"] == pytest.approx(1.008) and found["conv_energy_nj"] == pytest.approx(2.048)
    assert found["assumed"] == {"ssd_groups": 8, "conv_channels": 2560, "table_entries": 1024}
    plain = succeed(*ask)
    assert found["true"] == {key: plain[key] for key in found["true"]} and "assumed" not in plain
    assert plain["scale_bytes_per_layer"] == 144 and plain["conv_energy_nj"] == pytest.approx(4.3008)
    assert set(plain["roofline"]) == {
        *("CPU, 2 cores of EPYC Zen 4", "NVIDIA H100 SXM", "NVIDIA H200", "NVIDIA RTX A5000"),
        "NVIDIA Jetson Orin Nano 8 GB",
    }


def test_two_recipes_side_by_side(
    succeed: Callable[..., dict[str, Any]], command: Callable[..., Any], piecewise: Path
) -> None:
    ask = ("hardware", "--shape", "mamba2-130m", "--recipe", piecewise, "--against", "float", "--device", "a5000")
    found = succeed(*ask)
    assert found["against"]["recipe"] == "float" and found["against"]["scale_bytes"] == 0
    assert found["dram_bytes_per_token"] < 0.5 * found["against"]["dram_bytes_per_token"]
    shown = command(*ask).out
    assert "float" in shown and "NVIDIA RTX A5000" in shown and "H200" not in shown
    assert f"{found['roofline']['NVIDIA RTX A5000']['floor_ms']:.3g}" in shown


def test_group_counts_are_the_users(succeed: Callable[..., dict[str, Any]], piecewise: Path) -> None:
    ask = ("hardware", "--shape", "mamba2-8b", "--recipe", piecewise)
    found = succeed(*ask, "--head-groups", 2, "--channel-groups", 16)
    assert found["groups"] == {"ssd": 8, "heads": 2, "channels": 16}
    assert found["scale_bytes_per_layer"] == 4 * (8 * 2 + 2 * 8 * 2 * 16)


def test_a_models_folder_serves_as_shape(succeed: Callable[..., dict[str, Any]], bundled_folder: Path) -> None:
    found = succeed("hardware", "--shape", bundled_folder, "--recipe", "quamba-w8a8", "--technology", "7nm-published")
    assert (found["layers"], found["scale_bytes"], found["technology"]) == (8, 32, "7nm-published")
    assert found["shape"] == str(bundled_folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--shape", "mamba2-27b"), "no shape named 'mamba2-27b' (did you mean 'mamba2-2.7b'?)"),
        (("--recipe", "quamba-w8a9"), "no recipe named 'quamba-w8a9'"),
        (("--technology", "7mn"), "no technology named '7mn' (did you mean '7nm'?)"),
        (("--device", "h20"), "no device named 'h20' (did you mean 'h200'?)"),
        (("--ssd-groups", 0), "--ssd-groups"),
        (("--shape", "mamba-130m", "--ssd-groups", 8), "SSD groups are Mamba-2's"),
        (("--shape", "no/such/model"), "no/such/model"),
    ],
)
def test_refusals(refuse: Callable[..., str], change: tuple[object, ...], said: str) -> None:
    options: dict[object, object] = {"--shape": "mamba2-130m", "--recipe": "w8a8"}
    options |= dict(zip(change[::2], change[1::2], strict=True))
    assert said in refuse("hardware", *(part for pair in options.items() for part in pair))
