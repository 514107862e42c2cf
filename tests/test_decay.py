"""The decay of the scan in few bits: the levels by their formula, the recurrence written out, both ways to run it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of
from torch.nn.functional import softplus

from squamata import scales
from squamata.errors import SquamataError
from squamata.kernels.codec import CODECS
from squamata.kernels.decay import DecaySites
from squamata.kernels.dispatch import use_backend
from squamata.kernels.grid import Grid
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.kernels.selective_scan.ref import run as selective_scan
from squamata.kernels.site import Mode, Site, encode
from squamata.kernels.ssd_scan import HeadLayout
from squamata.kernels.ssd_scan.ref import run as ssd_scan
from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import LanguageModel
from squamata.run.decode_plan import NotPlannableError, plan_model
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.quant import QuantSpec

ONE = Grid.of(torch.tensor(1.0))
LTSQ = [("ltsq", bits) for bits in (2, 3, 4, 5)] + [("ltsq-fine", bits) for bits in (5, 6, 7, 8)]
FORMATS: dict[str, dict[str, Any]] = {
    "ltsq-4": {"bits": 4, "codec": "ltsq"},
    "ltsq-fine-8": {"bits": 8, "codec": "ltsq-fine"},
    "int8": {"bits": 8},
    "int4": {"bits": 4, "symmetric": False},
    "log2-4": {"bits": 4, "codec": "log2"},
}


@pytest.mark.parametrize(("codec", "bits"), LTSQ)
def test_the_codes_and_levels_of_ltsq_are_the_papers_formula(codec: str, bits: int) -> None:
    """q = clip(round(-log2(1 - x) k), 0, 2^b - 1), value 1 - 2^(-q / k): k = 1, or 2^(b - 4) for the fine one."""
    spec = QuantSpec(bits=bits, codec=codec)
    steps = 1 if codec == "ltsq" else 2 ** (bits - 4)
    top = min(2**bits - 1, 24 * steps)
    assert spec.code_range == (0, top)
    x = torch.cat([torch.linspace(0, 1, 4001), 1 - 2.0 ** -torch.linspace(0.1, 23, 500)]).float()
    stored = encode(x, ONE, spec)
    for value, code, level in zip(x.tolist(), stored.data.tolist(), stored.dequantize().tolist(), strict=True):
        place = math.inf if value == 1.0 else -math.log2(1 - value) * steps
        assert abs(min(place, top) - code) <= 0.5 + 1e-9
        assert level == pytest.approx(1 - 2 ** (-code / steps), abs=6e-8)
    assert encode(torch.tensor([-0.5, -1e-9, 1.0, 7.0]), ONE, spec).data.tolist() == [0, 0, top, top]


def test_more_bits_double_ltsqs_range_and_refine_the_fine_ones_step() -> None:
    x = 1 - 2.0 ** -torch.empty(5000).uniform_(0.0, 15.0, generator=torch.Generator().manual_seed(0))

    def worst(codec: str, bits: int) -> float:
        """Largest error of log2(1 - x), in octaves."""
        found = encode(x, ONE, QuantSpec(bits=bits, codec=codec)).dequantize().double()
        return float((torch.log2(1 - found) - torch.log2(1 - x.double())).abs().max())

    assert [worst("ltsq", bits) for bits in (4, 5)] == pytest.approx([0.5, 0.5], rel=0.03)
    assert [worst("ltsq-fine", bits) for bits in (5, 6, 8)] == pytest.approx([1 / 4, 1 / 8, 1 / 32], rel=0.03)


@pytest.mark.parametrize(("codec", "bits"), LTSQ)
def test_gradients_pass_straight_through(codec: str, bits: int) -> None:
    x = torch.tensor([0.0, 0.3, 0.7, 0.74], requires_grad=True)
    encode(x, ONE, QuantSpec(bits=bits, codec=codec), carry_float=True).dequantize().sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0] * 4


def landing(spec: dict[str, Any] | None, sizes: tuple[int, ...], x: torch.Tensor, mode: Mode = "simulate") -> Site:
    """A site whose scale represents all of x."""
    axes = ("channel", "state") if len(sizes) == 2 else ("head",)
    site = Site("layers.0.mixer.decay", Layout(axes, sizes), QuantSpec.model_validate(spec), mode=mode)
    assert site.spec is not None
    statistics = scales.gather_for(site.partition, site.spec)
    statistics.update(x.reshape(1, 1, -1) if x.ndim < 3 else x.flatten(2))
    site.set_scale(*scales.compute(statistics, site.spec))
    return site


def rounded(site: Site, x: torch.Tensor) -> torch.Tensor:
    landed = site.land(x)
    assert isinstance(landed, QTensor)
    return landed.dequantize().double()


@pytest.mark.parametrize("where", ["decay", "log_decay"])
@pytest.mark.parametrize("name", FORMATS)
def test_mamba1s_scan_is_the_recurrence_with_rounded_decays(name: str, where: str) -> None:
    if where == "log_decay" and name.startswith("ltsq"):
        return
    generator = torch.Generator().manual_seed(0)
    B_, L, E, N = 2, 130, 3, 4
    u, dt, z = (torch.randn(B_, L, E, generator=generator) for _ in range(3))
    B, C = (torch.randn(B_, L, N, generator=generator) for _ in range(2))
    A, D, bias = -torch.rand(E, N, generator=generator), torch.randn(E, generator=generator), torch.zeros(E)
    exponent = softplus(dt)[..., None] * A
    seen = exponent if where == "log_decay" else exponent.exp()
    site = landing(FORMATS[name], (E, N), seen)
    out = Site("", Layout(("channel",), (E,)))
    sites = DecaySites.of({where: site})
    y, state = selective_scan(u, dt, A, B, C, D, z, bias, torch.zeros(B_, E, N), out, sites)

    landed = rounded(site, seen.flatten(2)).reshape(seen.shape)
    decays = landed.exp() if where == "log_decay" else landed
    expected, ys = torch.zeros(B_, E, N, dtype=torch.float64), []
    for t in range(L):
        expected = decays[:, t] * expected + (softplus(dt[:, t]) * u[:, t]).double()[..., None] * B[:, t, None, :]
        ys.append((expected * C[:, t, None, :]).sum(-1))
    plain = (torch.stack(ys, 1) + (D * u).double()) * (z * z.sigmoid()).double()
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(y.double(), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [3, 150])
@pytest.mark.parametrize("where", ["decay", "log_decay"])
@pytest.mark.parametrize("name", FORMATS)
def test_mamba2s_scan_is_the_recurrence_with_rounded_decays(name: str, where: str, length: int) -> None:
    """In steps and in chunks, decays of exactly 0 and 1 included."""
    if where == "log_decay" and name.startswith("ltsq"):
        return
    generator = torch.Generator().manual_seed(0)
    B_, L, H, P, N = 2, length, 3, 4, 5
    u, dt = (torch.randn(B_, L, n, generator=generator) for n in (H * P, H))
    dt[:, ::7] += 6.0  # decays that a coarse format rounds to 0
    B, C = (torch.randn(B_, L, N, generator=generator) for _ in range(2))
    A, D, bias = -torch.tensor([0.001, 0.3, 2.0]), torch.randn(H, generator=generator), torch.zeros(H)
    seen = softplus(dt) * A
    seen = seen if where == "log_decay" else seen.exp()
    site = landing(FORMATS[name], (H,), seen)
    layout = HeadLayout(H, P, 1, N, 64, (0.0, math.inf))
    state = torch.randn(B_, H, P, N, generator=generator)
    y, after = ssd_scan(u, dt, A, B, C, D, bias, state, layout, DecaySites.of({where: site}))

    landed = rounded(site, seen)
    decays = landed.exp() if where == "log_decay" else landed
    if where == "decay" and name in ("int4", "log2-4") and length > 3:
        assert bool((decays == 0).any())
    expected, ys = state.double(), []
    heads = u.double().reshape(B_, L, H, P)
    for t in range(L):
        entering = softplus(dt[:, t]).double()[..., None] * heads[:, t]
        expected = decays[:, t, :, None, None] * expected + entering[..., None] * B[:, t, None, None, :]
        ys.append((expected * C[:, t, None, None, :]).sum(-1) + D[:, None] * heads[:, t])
    torch.testing.assert_close(y.double(), torch.stack(ys, 1).reshape(B_, L, -1), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=2e-4)


def checkpoint_of(kind: str, *rules: dict[str, Any], base: str | None = None) -> Checkpoint:
    config = config_of(kind)
    recipe = recipe_of(*rules, **({"extends": base} if base else {}))
    return quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 2, 24)])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_decay_that_nobody_names_changes_nothing(kind: str) -> None:
    """Not a site, not a scale, not a digit; a rule for everything does not name it, and float mode ignores it."""
    everything = checkpoint_of(kind, {"site": "*.mixer.*", "spec": {"bits": 8}}, {"site": "*.y", "spec": "float"})
    assert not any("decay" in name for name in everything.site_tensors)
    model = LanguageModel(everything)
    assert not any("decay" in site.name for site in model.sites())
    plan_model(model)
    config = config_of(kind)
    named = checkpoint_of(kind, {"site": "*.mixer.decay", "spec": {"bits": 4, "codec": "ltsq"}})
    ids = random_ids(config, 2, 30, 3)
    plain = float_model(config, perturbed_tensors(config))
    assert torch.equal(LanguageModel(named, "float")(ids), plain(ids))
    with use_backend("ref"):
        assert not torch.allclose(LanguageModel(named)(ids), plain(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("name", FORMATS)
def test_prefill_is_decoding_and_integers_are_simulation(kind: str, name: str, tmp_path: Any) -> None:
    checkpoint = checkpoint_of(kind, {"site": "*.mixer.decay", "spec": FORMATS[name]})
    assert {part for part in checkpoint.site_tensors if part.endswith("scale")} == {
        f"layers.{layer}.mixer.decay.scale" for layer in (0, 1)
    }
    ids = random_ids(config_of(kind), 2, 40, 5)
    integer, simulated = LanguageModel(checkpoint), LanguageModel(checkpoint, "simulate")
    logits = integer(ids)
    assert torch.equal(logits, simulated(ids))
    cache = integer.new_cache(2)
    stepped = torch.stack([integer.step(ids[:, t], cache) for t in range(ids.shape[1])], 1)
    torch.testing.assert_close(stepped, logits, rtol=2e-4, atol=2e-4)
    write_checkpoint(checkpoint, tmp_path / "out")
    assert torch.equal(LanguageModel(read_checkpoint(tmp_path / "out"))(ids), logits)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_fine_formats_come_to_the_float_model_and_channels_have_scales_of_their_own(kind: str) -> None:
    config = config_of(kind)
    ids = random_ids(config, 2, 40, 5)
    plain = float_model(config, perturbed_tensors(config))(ids)
    errors = {}
    granularity = "channel,state" if kind == "mamba1" else "head"
    for name, spec in {
        "ltsq-4": FORMATS["ltsq-4"],
        "ltsq-fine-8": FORMATS["ltsq-fine-8"],
        "int16": {"bits": 16},
        "int8 each": {"bits": 8, "granularity": granularity},
    }.items():
        checkpoint = checkpoint_of(kind, {"site": "*.mixer.decay", "spec": spec})
        errors[name] = float((LanguageModel(checkpoint)(ids) - plain).abs().mean())
    assert errors["int16"] < 0.02 * errors["ltsq-4"] and errors["ltsq-fine-8"] < 0.2 * errors["ltsq-4"]
    scale = checkpoint.site_tensors["layers.0.mixer.decay.scale"]
    assert scale.shape == ((64, 16) if kind == "mamba1" else (4,))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_what_the_compiled_token_says(kind: str) -> None:
    for site in ("decay", "log_decay"):
        with pytest.raises(NotPlannableError, match="decay"):
            plan_model(LanguageModel(checkpoint_of(kind, {"site": f"*.mixer.{site}", "spec": {"bits": 8}})))


@pytest.mark.parametrize(
    ("site", "spec", "words"),
    [
        ("*.mixer.u", {"bits": 4, "codec": "ltsq"}, "no sign and ends at 1"),
        ("*.mixer.log_decay", {"bits": 4, "codec": "ltsq"}, "no sign and ends at 1"),
        ("*.mixer.decay", {"bits": 4, "codec": "ltsq", "dynamic": True, "granularity": "token"}, "no scale to take"),
        ("*.mixer.decay", {"bits": 8, "codec": "ltsq"}, "takes 2 to 5 bits, not 8"),
    ],
)
def test_what_the_recipe_checker_says(site: str, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(SquamataError) as caught:
        recipe_of({"site": site, "spec": spec}).resolve(("mamba2",))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_lies_beyond_ltsq() -> None:
    spec = QuantSpec(bits=3, codec="ltsq")
    x = torch.tensor([-0.3, 0.0, 0.5, 1 - 2.0**-7, 1.0])
    assert CODECS["ltsq"].beyond(x, ONE, spec).tolist() == [True, False, False, False, True]
