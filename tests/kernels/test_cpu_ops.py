"""The CPU siblings of the fine ops against their references: odd shapes, every kind of scale, poisoned outputs."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

import squamata
from squamata.errors import SquamataError
from squamata.kernels.causal_conv1d import cpu as conv_cpu
from squamata.kernels.causal_conv1d import empty_state
from squamata.kernels.causal_conv1d import ref as conv_ref
from squamata.kernels.compilation import KEPT_DAYS, _Announcer, _name_cache, cache_folder, fingerprint
from squamata.kernels.conv_selective_scan.ref import tokens
from squamata.kernels.gated_rms_norm import cpu as gated_cpu
from squamata.kernels.gated_rms_norm import ref as gated_ref
from squamata.kernels.hadamard import Rotation
from squamata.kernels.hadamard import cpu as hadamard_cpu
from squamata.kernels.hadamard import ref as hadamard_ref
from squamata.kernels.linear import Linear
from squamata.kernels.linear import cpu as linear_cpu
from squamata.kernels.linear import ref as linear_ref
from squamata.kernels.packing import pack_int4
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor, Value
from squamata.kernels.rms_norm import cpu as norm_cpu
from squamata.kernels.rms_norm import ref as norm_ref
from squamata.kernels.selective_scan import cpu as scan_cpu
from squamata.kernels.selective_scan import ref as scan_ref
from squamata.kernels.site import Site, observing
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan import cpu as ssd_cpu
from squamata.kernels.ssd_scan import ref as ssd_ref
from squamata.spec.quant import QuantSpec

PACKAGE = Path(squamata.__file__).parent

pytestmark = pytest.mark.usefixtures("poisoned")

LENGTHS = (1, 2, 63, 130)


def make_site(
    *sizes: int,
    axes: tuple[str, ...] = ("channel",),
    per: str = "tensor",
    scale: float = 0.03,
    rounding: str = "half-even",
    mode: str = "integer",
    dynamic: bool = False,
) -> Site:
    spec = QuantSpec.model_validate({"bits": 8, "granularity": per, "rounding": rounding, "dynamic": dynamic})
    site = Site("site", Layout(axes, sizes), spec, mode=mode)  # type: ignore[arg-type]
    if not dynamic:
        site.set_scale(scale * (0.5 + torch.rand(site.partition.shape())))
    return site


def float_site(size: int) -> Site:
    return Site("site", Layout(("channel",), (size,)))


def landings(size: int) -> list[Site]:
    """Every way in which an output can land."""
    return [
        float_site(size),
        make_site(size),
        make_site(size, per="channel", rounding="half-away"),
        make_site(size, rounding="truncate"),
        make_site(size, per="token", dynamic=True),
        make_site(size, dynamic=True),
        make_site(size, mode="simulate"),
    ]


def quantized(x: Tensor, per: str = "tensor", scale: float = 0.03) -> Value:
    return make_site(x.shape[-1], per=per, dynamic=per == "token", scale=scale).land(x)


def assert_same(result: Value, expected: Value, exact: bool = False, tolerance: float = 1e-6) -> None:
    """Integers: equal, or one unit off in at most one in 1e5 values; floats: relative L2 distance."""
    if not isinstance(expected, QTensor):
        assert isinstance(result, Tensor) and result.shape == expected.shape and result.dtype == expected.dtype
        if exact:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
        assert (result - expected).norm() <= tolerance * expected.norm()
        return
    assert isinstance(result, QTensor) and result.spec == expected.spec and result.data.dtype == expected.data.dtype
    torch.testing.assert_close(result.scale, expected.scale, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-8)
    difference = (result.data.float() - expected.data.float()).abs()
    assert (difference > 1).sum() == 0
    assert (difference > 0).sum() <= (0 if exact else 1 + difference.numel() / 1e5)


@pytest.mark.parametrize("length", LENGTHS)
def test_rms_norm(length: int) -> None:
    h, residual, weight = torch.randn(3, length, 50), torch.randn(3, length, 50), torch.rand(50)
    for site in landings(50):
        for before in (None, residual):
            assert norm_cpu.accepts(h, before, weight, 1e-5, site)
            y, total = norm_cpu.run(h, before, weight, 1e-5, site)
            expected, expected_total = norm_ref.run(h, before, weight, 1e-5, site)
            assert_same(y, expected)
            assert_same(total, expected_total, exact=True)


@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("length", (1, 63))
def test_gated_rms_norm(length: int, groups: int) -> None:
    y, z, weight = torch.randn(2, length, 48), 3 * torch.randn(2, length, 48), torch.rand(48)
    for site in landings(48):
        for gate in (z, quantized(z), quantized(z, "channel"), quantized(z, "token")):
            assert gated_cpu.accepts(y, gate, weight, 1e-5, groups, site)
            result = gated_cpu.run(y, gate, weight, 1e-5, groups, site)
            assert_same(result, gated_ref.run(y, gate, weight, 1e-5, groups, site))


@pytest.mark.parametrize("size", (7, 16, 48, 56, 160, 64, 1536, 36))
def test_hadamard(size: int) -> None:
    y, rotation = torch.randn(2, 5, size), Rotation.of_size(size)
    for site in landings(size):
        assert hadamard_cpu.accepts(y, rotation, site)
        assert_same(hadamard_cpu.run(y, rotation, site), hadamard_ref.run(y, rotation, site))
    site = make_site(size, per="channel")
    assert_same(hadamard_cpu.run(y, None, site), hadamard_ref.run(y, None, site), exact=True)


def make_weight(rows: int, columns: int, bits: int = 8, per: str = "channel") -> QTensor:
    """Random codes with a scale per tensor, per row, or per group of 32."""
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (rows, columns), dtype=torch.int8)
    groups = {f"group({size})": (rows, -(-columns // size)) for size in (32, 128)}
    shape = ({"tensor": (), "channel": (rows, 1)} | groups)[per]
    spec = QuantSpec.model_validate({"bits": bits, "granularity": per})
    scale = 0.01 * (0.5 + torch.rand(shape))
    return QTensor(pack_int4(codes), scale, spec, length=columns) if bits == 4 else QTensor(codes, scale, spec)


PROJECTIONS = (
    (33, 77, (11, 22)),
    (3352, 96, (3000, 352)),
    (1, 1, (1,)),
    (80, 48, (48, 16, 16)),
    (24, 1, (8, 16)),  # dt_proj where dt_rank is 1
    (24, 33, (24,)),
)
FORMATS = ((8, "tensor"), (8, "channel"), (4, "channel"), (4, "group(32)"), (8, "group(32)"))


@pytest.mark.parametrize("rows, columns, segments", PROJECTIONS)
@pytest.mark.parametrize("bits, per", FORMATS)
def test_linear_is_exact(rows: int, columns: int, segments: tuple[int, ...], bits: int, per: str) -> None:
    for length, bias in ((1, None), (21, torch.randn(rows))):
        layer = Linear(make_weight(rows, columns, bits, per), bias, segments)
        float_x = torch.randn(3, length, columns)
        extreme = torch.full((2, columns), -128, dtype=torch.int8)
        largest = QTensor(extreme, torch.tensor(0.5), QuantSpec(bits=8, full_range=True))
        for x in (quantized(float_x), quantized(float_x, "token"), largest):
            choices = [None, make_site(segments[-1], per="channel", rounding="half-away", scale=0.05)]
            out = [choices[index % 2] for index in range(len(segments))]
            assert linear_cpu.accepts(x, layer, out)
            for result, expected in zip(linear_cpu.run(x, layer, out), linear_ref.run(x, layer, out), strict=True):
                assert_same(result, expected, exact=True)
    for site in landings(rows):
        layer = Linear(layer.weight, bias)
        (result,), (expected,) = linear_cpu.run(x, layer, [site]), linear_ref.run(x, layer, [site])
        assert_same(result, expected, exact=True)


def test_linear_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "ACCUMULATOR_BYTES", 0)
    layer = Linear(make_weight(40, 64, 4, "group(32)"), torch.randn(40))
    x, site = quantized(torch.randn(2, 101, 64)), make_site(40)
    (result,), (expected,) = linear_cpu.run(x, layer, [site]), linear_ref.run(x, layer, [site])
    assert_same(result, expected, exact=True)


@pytest.mark.parametrize("rows, columns", ((33, 128), (80, 384), (16, 256), (1, 128), (40, 200)))
def test_linear_in_nibbles_of_128_is_exact(rows: int, columns: int) -> None:
    layer = Linear(make_weight(rows, columns, 4, "group(128)"), torch.randn(rows))
    layer.weight.data[:1] = 0x88  # type: ignore[union-attr]  # all -8
    for length in (1, 8, 21):
        x = quantized(torch.randn(2, length, columns), "token")
        for site in (None, make_site(rows)):
            (result,), (expected,) = linear_cpu.run(x, layer, [site]), linear_ref.run(x, layer, [site])
            assert_same(result, expected, exact=True)


@pytest.mark.parametrize("bits, per", ((8, "channel"), (4, "channel"), (4, "group(32)"), (8, "tensor")))
def test_linear_with_float_activations(bits: int, per: str) -> None:
    layer = Linear(make_weight(33, 77, bits, per), torch.randn(33), (11, 22))
    x, out = torch.randn(2, 9, 77), (make_site(11), None)
    assert linear_cpu.accepts(x, layer, out)
    for result, expected in zip(linear_cpu.run(x, layer, out), linear_ref.run(x, layer, out), strict=True):
        assert_same(result, expected)


def conv_case(batch: int, length: int, sizes: tuple[int, ...], kind: str, width: int) -> tuple[Any, ...]:
    """``kind``: float, tensor or channel (scales of the int8 inputs), or dynamic (int8 inputs, float state)."""
    per = "channel" if kind == "channel" else "tensor"
    sites = [float_site(n) if kind == "float" else make_site(n, per=per, dynamic=kind == "dynamic") for n in sizes]
    state = empty_state(batch, width, sites, torch.float32)
    carrier = state.data if isinstance(state, QTensor) else state
    carrier.copy_(torch.randint(-127, 128, carrier.shape))
    return [site.land(torch.randn(batch, length, n)) for site, n in zip(sites, sizes, strict=True)], state


@pytest.mark.parametrize("kind", ("float", "tensor", "channel", "dynamic"))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch, sizes, width", ((3, (48,), 4), (1, (300, 7, 16), 3), (2, (20,), 1)))
def test_causal_conv1d(batch: int, sizes: tuple[int, ...], width: int, length: int, kind: str) -> None:
    channels = sum(sizes)
    codes = torch.randint(-127, 128, (channels, width), dtype=torch.int8)
    out = [make_site(n, scale=0.02, rounding="half-away") for n in sizes]
    for weight in (torch.randn(channels, width), QTensor(codes, torch.rand(channels, 1) * 0.01, QuantSpec(bits=8))):
        for bias in (None, torch.randn(channels)):
            inputs, state = conv_case(batch, length, sizes, kind, width)
            expected_state = copy.deepcopy(state)
            assert conv_cpu.accepts(inputs, weight, bias, state, out)
            results = conv_cpu.run(inputs, weight, bias, state, out)
            for result, expected in zip(results, conv_ref.run(inputs, weight, bias, expected_state, out), strict=True):
                assert_same(result, expected)
            assert_same(state, expected_state, exact=True)


def scan_case(batch: int, length: int, channels: int, states: int, per: str | None) -> list[Any]:
    def value(size: int) -> Value:
        x = torch.randn(batch, length, size)
        return x if per is None else quantized(x, per)

    A = -torch.exp(torch.arange(1, states + 1).log() + 0.1 * torch.randn(channels, states))
    D, bias = torch.rand(channels), 4 * torch.rand(channels) - 5
    u, dt, z = (value(channels) for _ in range(3))
    state = torch.randn(batch, channels, states)
    return [u, dt, A, value(states), value(states), D, z, bias, state]


@pytest.mark.parametrize("per", (None, "tensor", "channel", "token"))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch, channels, states", ((3, 48, 5), (1, 300, 16), (2, 1, 1)))
def test_selective_scan(batch: int, channels: int, states: int, length: int, per: str | None) -> None:
    case = scan_case(batch, length, channels, states, per)
    for site in landings(channels)[:5]:
        assert scan_cpu.accepts(*case, site)
        (y, state), (expected, expected_state) = scan_cpu.run(*case, site), scan_ref.run(*case, site)
        assert_same(y, expected)
        assert_same(state, expected_state)


def test_selective_scan_goes_on_where_it_stopped() -> None:
    u, dt, A, B, C, D, z, bias, state = scan_case(2, 50, 70, 16, "tensor")
    site = make_site(70)
    whole, last = scan_cpu.run(u, dt, A, B, C, D, z, bias, state, site)
    parts = []
    for start, stop in ((0, 23), (23, 50)):
        cut = [tokens(value, start, stop) for value in (u, dt, B, C, z)]
        y, state = scan_cpu.run(*cut[:2], A, *cut[2:4], D, cut[4], bias, state, site)
        parts.append(y.data)
    assert torch.equal(torch.cat(parts, dim=1), whole.data) and torch.equal(state, last)


def test_selective_scan_survives_extreme_steps() -> None:
    case = scan_case(1, 20, 16, 4, None)
    case[1] = case[1] * 1e4  # the state is forgotten at once, or kept for good
    (y, state), (expected, expected_state) = scan_cpu.run(*case, float_site(16)), scan_ref.run(*case, float_site(16))
    assert_same(y, expected)
    assert_same(state, expected_state)


def ssd_case(batch: int, length: int, layout: HeadLayout, integer: bool) -> list[Any]:
    H, P, G, N = layout.heads, layout.head_dim, layout.groups, layout.d_state

    def value(axes: tuple[str, ...], sizes: tuple[int, ...], per: str) -> Value:
        size = torch.Size(sizes).numel()
        x = torch.randn(batch, length, size)
        return make_site(*sizes, axes=axes, per=per).land(x) if integer else x

    u, dt = value(("head", "channel"), (H, P), "head"), value(("head",), (H,), "tensor")
    B, C = (value(("ssd_group", "state"), (G, N), per) for per in ("ssd_group", "tensor"))
    A, D, bias = -torch.exp(2.7 * torch.rand(H)), torch.rand(H), 4 * torch.rand(H) - 5
    return [u, dt, A, B, C, D, bias, torch.randn(batch, H, P, N), layout]


UNLIMITED = (0.0, float("inf"))


@pytest.mark.parametrize("integer", (False, True))
@pytest.mark.parametrize("length", (*LENGTHS, 4, 5))
@pytest.mark.parametrize(
    "batch, layout",
    (
        (3, HeadLayout(4, 8, 2, 16, 64, UNLIMITED)),
        (1, HeadLayout(6, 16, 3, 13, 64, (0.01, 0.1))),
        (2, HeadLayout(2, 80, 1, 24, 64, UNLIMITED)),
    ),
)
def test_ssd_scan(batch: int, layout: HeadLayout, length: int, integer: bool) -> None:
    case = ssd_case(batch, length, layout, integer)
    assert ssd_cpu.accepts(*case)
    (y, state), (expected, expected_state) = ssd_cpu.run(*case), ssd_ref.run(*case)
    assert_same(y, expected, tolerance=5e-6)
    assert_same(state, expected_state, tolerance=5e-6)


def test_ssd_scan_goes_on_where_it_stopped() -> None:
    u, dt, A, B, C, D, bias, state, layout = ssd_case(2, 150, HeadLayout(4, 16, 2, 16, 64, UNLIMITED), True)
    whole, last = ssd_cpu.run(u, dt, A, B, C, D, bias, state, layout)
    parts = []
    for start, stop in ((0, 71), (71, 73), (73, 150)):
        cut = [tokens(value, start, stop) for value in (u, dt, B, C)]
        y, state = ssd_cpu.run(*cut[:2], A, *cut[2:], D, bias, state, layout)
        parts.append(y)
    assert_same(torch.cat(parts, dim=1), whole, tolerance=5e-6)
    assert_same(state, last, tolerance=5e-6)


@pytest.mark.parametrize("step", [1e4, 1e15, 1e20, 1e30, 3e38])
def test_ssd_scan_survives_extreme_steps(step: float) -> None:
    """A token that forgets everything before it takes nothing from those after it."""
    layout = HeadLayout(4, 8, 2, 16, 32, UNLIMITED)
    u, dt, A, B, C, D, bias, state, _ = ssd_case(2, 50, layout, False)
    for place in (5, 40):
        dt[:, place], u[:, place] = step, u[:, place] / step
    for backend in (ssd_cpu, ssd_ref):
        running, ys = state.double(), []
        y, last = backend.run(u, dt, A, B, C, D, bias, state, layout)
        for t in range(50):
            case = [value[:, t : t + 1].double() for value in (u, dt)], [x[:, t : t + 1].double() for x in (B, C)]
            one, running = ssd_ref.run(*case[0], A.double(), *case[1], D.double(), bias.double(), running, layout)
            ys.append(one)
        assert_same(y.double(), torch.cat(ys, dim=1), tolerance=5e-6)
        assert_same(last.double(), running, tolerance=5e-6)


def test_what_is_left_to_the_reference() -> None:
    """Gradients, double precision, simulated values and zero points."""
    weight, site = torch.rand(16), make_site(16)
    h = torch.randn(1, 2, 16)
    refused: list[Callable[[], bool]] = [
        lambda: norm_cpu.accepts(h.clone().requires_grad_(), None, weight, 1e-5, site),
        lambda: norm_cpu.accepts(h.double(), None, weight.double(), 1e-5, site),
        lambda: gated_cpu.accepts(h, make_site(16, mode="simulate").land(h), weight, 1e-5, 1, site),
        lambda: hadamard_cpu.accepts(h, None, float_site(16)),
        lambda: linear_cpu.accepts(h, Linear(torch.randn(4, 16)), [None]),
    ]
    asymmetric = Site("site", Layout(("channel",), (16,)), QuantSpec(bits=8, symmetric=False), mode="integer")
    asymmetric.set_scale(torch.tensor(0.03), torch.tensor(5.0))
    refused.append(lambda: linear_cpu.accepts(asymmetric.land(h), Linear(make_weight(4, 16)), [None]))
    assert not any(call() for call in refused)
    with torch.no_grad():
        assert norm_cpu.accepts(h.clone().requires_grad_(), None, weight, 1e-5, site)
    case = (h, asymmetric.land(h), weight, 1e-5, 1, site)
    assert_same(gated_cpu.run(*case), gated_ref.run(*case))


def test_an_observed_site_is_landed_on_and_seen() -> None:
    """By static and by per-token scales, which a kernel would else apply to a row that nobody sees."""
    h, weight = torch.randn(2, 3, 16), torch.rand(16)
    x, layer = quantized(torch.randn(2, 3, 16)), Linear(make_weight(16, 16))
    for site in landings(16):
        expected, _ = norm_cpu.run(h, None, weight, 1e-5, site)
        (product,) = linear_cpu.run(x, layer, [site])
        seen: list[Tensor] = []
        with observing([site], lambda _, value, seen=seen: seen.append(value)):
            landed, _ = norm_cpu.run(h, None, weight, 1e-5, site)
            (landed_product,) = linear_cpu.run(x, layer, [site])
        assert_same(landed, expected)
        assert_same(landed_product, product)
        assert [value.dtype for value in seen] == [torch.float32] * 2
        assert_same(site.land(seen[0]), expected)


def test_every_version_of_the_sources_has_its_folder_of_machine_code(tmp_path: Path) -> None:
    sources = tmp_path / "kernels"
    shutil.copytree(PACKAGE / "kernels", sources, ignore=shutil.ignore_patterns("__pycache__"))
    blocked, cache = tmp_path / "file", tmp_path / "cache"
    blocked.touch()
    first = cache_folder(sources, [blocked / "cache", cache])
    assert first is not None and first.parent == cache and first.is_dir()
    assert first.name == f"kernels-{fingerprint(PACKAGE / 'kernels')}"
    assert cache_folder(sources, [cache]) == first
    helper = sources / "linear" / "cpu.py"
    content = helper.read_bytes()
    helper.write_bytes(content[:-2] + b"#" + content[-1:])
    second = cache_folder(sources, [cache])
    assert second is not None and second != first and first.is_dir()
    old = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(first, (old, old))
    assert cache_folder(sources, [cache]) == second
    assert not first.exists()
    assert cache_folder(sources, [blocked / "cache"]) is None


def test_without_a_folder_to_keep_machine_code_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(SquamataError, match="set NUMBA_CACHE_DIR to a folder of yours"):
        _name_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a temporary folder is not needed then
    _name_cache()
    assert Path(numba.config.CACHE_DIR).is_relative_to(tmp_path)


CACHED = [path for path in (PACKAGE / "kernels").rglob("*.py") if "cache=True" in path.read_text()]


@pytest.mark.parametrize("path", CACHED, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_folder_is_named_before_a_kernel_is_cached(path: Path) -> None:
    names = "(compilation|simd|memory|landing|lanes|gemv)"
    imported = rf"^(from|import) squamata\.kernels(\.| import ){names}\b"
    assert path.name == "compilation.py" or re.search(imported, path.read_text(), re.MULTILINE)


def test_compilation_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    def compiled(module: str) -> Any:
        function = SimpleNamespace(__module__=module, __qualname__="function")
        return SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=function)})

    announcer = _Announcer()
    announcer.on_start(compiled("elsewhere"))
    assert capsys.readouterr().err == ""
    announcer.on_start(compiled("squamata.kernels.linear.cpu"))
    announcer.on_start(compiled("squamata.kernels.linear.cpu"))
    assert capsys.readouterr().err.count("compiling CPU kernels") == 1
