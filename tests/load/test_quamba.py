"""Upstream Quamba checkpoints: the integers and scales of the files, and the logits of the model that was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import model_folders
from quamba_writer import QuambaWriter, marlin_rows, marlin_tiles, qqq_rows, quamba_config, save, write_quamba
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids

from squamata.errors import SquamataError
from squamata.evaluate.profile import TOLERANCE_SIXTEEN_BITS
from squamata.kernels.dispatch import use_backend
from squamata.kernels.hadamard.matrices import base_matrix, hadamard_matrix
from squamata.kernels.qtensor import QTensor, as_float
from squamata.load.marlin import unpack_embedding, unpack_weight, unpermute_scales
from squamata.load.quamba import is_quamba_checkpoint, read_quamba
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.pipeline import quantize
from squamata.run.model import Model
from squamata.save.read import read_checkpoint
from squamata.spec.recipe import Recipe

INT8 = {"bits": 8, "full_range": True}
AWAY = INT8 | {"rounding": "half-away"}
SEGMENT = INT8 | {"granularity": "segment"}
GROUP = {"bits": 4, "full_range": True, "granularity": "group(128)"}
ROW = {"full_range": True, "granularity": "channel", "scale_dtype": "float16"}


def recipe(kind: str, precision: str, small_ends: bool) -> Recipe:
    """What upstream does at this precision. ``small_ends``: embedding and head in few bits too."""
    rules: list[dict[str, Any]] = []
    if precision == "W4A16":
        group = GROUP | {"scale_dtype": "float16"}
    else:
        group = GROUP
        rules += [{"site": "*.mixer.*", "spec": INT8}, {"site": "*.mixer.y", "spec": "float"}]
        rules += [{"site": "*.mixer.u", "spec": AWAY}, {"site": "*.mixer.[BC]_conv", "spec": AWAY}]
        if kind == "mamba1":
            rules += [{"site": "*.mixer.state", "spec": AWAY}]
        else:
            rules += [{"site": f"*.mixer.{name}", "spec": SEGMENT} for name in ("in_proj.weight", "conv.*")]
            rules += [{"site": "*.mixer.dt_bias", "spec": "float"}]
    if precision.startswith("W4"):
        rules += [{"site": f"*.mixer.{name}.weight", "spec": group} for name in ("in_proj", "x_proj", "out_proj")]
    if small_ends:
        rules += [{"site": "embedding.weight", "spec": ROW | {"bits": int(precision[1])}}]
        rules += [{"site": "head.weight", "spec": group if precision.startswith("W4") else INT8}]
        rules += [] if precision == "W4A16" else [{"site": "head.in", "spec": INT8}]
    return Recipe.from_mapping({"name": "upstream", "transforms": ["hadamard"], "rules": rules})


def made(kind: str, precision: str, small_ends: bool = True, **overrides: Any) -> Checkpoint:
    """A checkpoint of ours that upstream's format can say: sites that share a scale there share it here."""
    sizes: dict[str, Any] = {"d_model": 256, "d_inner": 512, "vocab_size": 72, "tie_embeddings": False}
    sizes |= {"dt_rank": 16} if kind == "mamba1" else {"head_dim": 64, "n_groups": 2}
    sizes |= {"blocks": (kind,)} if precision.startswith("W4") else {}
    config = config_of(kind, **(sizes | overrides))
    batches = [random_ids(config, 2, 24)] if precision != "W4A16" else []
    checkpoint = quantized(config, perturbed_tensors(config), recipe(kind, precision, small_ends), batches)
    sites = dict(checkpoint.site_tensors)
    for name in list(sites):
        layer, _, last = name.removesuffix(".scale").rpartition(".")
        if kind == "mamba1" and last in ("z", "B", "C"):
            sites[name] = sites[f"{layer}.{'x' if last == 'z' else 'dt_low'}.scale"]
    return replace(checkpoint, site_tensors=sites)


def assert_same(found: Checkpoint, written: Checkpoint) -> None:
    """Integers, scales and specs are those of the files, exactly; the rotation is theirs."""
    assert found.config == written.config
    kinds = written.config.blocks
    assert found.recipe.resolve(kinds) == {
        name: spec.model_copy(update={"scale": type(spec.scale)()})
        for name, spec in written.recipe.resolve(kinds).items()
    }
    for name, value in written.tensors.items():
        other = found.tensors[name]
        if isinstance(value, QTensor):
            assert isinstance(other, QTensor), name
            assert torch.equal(other.codes(), value.codes()), name
            assert torch.equal(other.scale, value.scale), name
        else:
            assert torch.equal(other, value), name
    extra = found.tensors.keys() - written.tensors.keys()
    assert {name.rpartition(".")[2] for name in extra} == {"rotation_family"}
    assert found.site_tensors.keys() == written.site_tensors.keys()
    for name, tensor in written.site_tensors.items():
        assert torch.equal(found.site_tensors[name], tensor.float() if tensor.is_floating_point() else tensor), name


@torch.no_grad()
def assert_same_logits(found: Checkpoint, written: Checkpoint) -> None:
    """The rotations agree where the inner size is a power of two, so nothing may differ: prefill and decode."""
    ids = random_ids(written.config, 1, 12, seed=3)
    for backend in ("ref", None):
        with use_backend(backend) if backend else torch.no_grad():
            models = [LanguageModel(checkpoint) for checkpoint in (found, written)]
            assert torch.equal(*(model(ids) for model in models))
            caches = [model.new_cache() for model in models]
            for token in ids[0, :4]:
                steps = [model.step(token[None], cache) for model, cache in zip(models, caches, strict=True)]
                assert torch.equal(*steps)


@pytest.mark.parametrize("small_ends", [True, False], ids=["whole", "layers-only"])
@pytest.mark.parametrize("precision", ["W8A8", "W4A8", "W4A16"])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_reading_gives_what_was_written(tmp_path: Path, kind: str, precision: str, small_ends: bool) -> None:
    written = write_quamba(tmp_path, made(kind, precision, small_ends), precision)
    assert is_quamba_checkpoint(tmp_path)
    found = read_quamba(tmp_path)
    assert_same(found, written)
    assert_same_logits(found, written)


def grouped(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[torch.Tensor, torch.Tensor]]:
    """The same with Quamba2's scales: u a (head group, channel group), the state one more a state index, B and C an
    SSD group; and the ends of the groups, different in every SSD group."""
    config = checkpoint.config
    G, heads, P, N = config.n_groups, config.n_heads // config.n_groups, config.head_dim, config.d_state
    assert (G, heads, P) == (2, 4, 64)
    head_ends = torch.tensor([[1, 2, 3, 4], [1, 3, 4, 4]])
    channel_ends = torch.tensor([[[3, 17, 40, 64], [16, 32, 48, 64], [1, 2, 3, 64], [60, 61, 62, 64]]]).repeat(2, 1, 1)
    index = torch.empty(config.n_heads, P, dtype=torch.int64)
    for head in range(config.n_heads):
        group, local = divmod(head, heads)
        h = next(i for i, end in enumerate(head_ends[group].tolist()) if local < end)
        for p in range(P):
            c = next(i for i, end in enumerate(channel_ends[group, h].tolist()) if p < end)
            index[head, p] = (group * 4 + h) * 4 + c
    sites = dict(checkpoint.site_tensors)
    generator = torch.Generator().manual_seed(5)
    for layer in range(config.n_layers):
        mixer = f"layers.{layer}.mixer."
        for name, shape in (("u", (32,)), ("state", (32, N)), ("B_conv", (G,)), ("C_conv", (G,))):
            spread = 0.7 + 0.6 * torch.rand(shape, generator=generator)
            sites[f"{mixer}{name}.scale"] = sites[f"{mixer}{name}.scale"] * spread
        sites[f"{mixer}u.index"] = sites[f"{mixer}state.index"] = index
    rules = [{"site": "*.mixer.u", "spec": AWAY | {"granularity": "index"}}]
    rules += [{"site": "*.mixer.state", "spec": INT8 | {"granularity": "index,state"}}]
    rules += [{"site": "*.mixer.[BC]_conv", "spec": AWAY | {"granularity": "ssd_group"}}]
    mapping = checkpoint.recipe.to_mapping()
    ragged = Recipe.from_mapping(mapping | {"rules": mapping["rules"] + rules})
    return replace(checkpoint, recipe=ragged, site_tensors=sites), (head_ends, channel_ends)


def without_empty_groups(checkpoint: Checkpoint) -> Checkpoint:
    """Groups that no head is in have a scale in upstream's table and none in ours."""
    sites = dict(checkpoint.site_tensors)
    for name in [name for name in sites if name.endswith(".index")]:
        used, sites[name] = torch.unique(sites[name], return_inverse=True)
        scale = name.removesuffix("index") + "scale"
        sites[scale] = sites[scale][used]
    return replace(checkpoint, site_tensors=sites)


@pytest.mark.parametrize("precision", ["W8A8", "W4A8"])
def test_groups_of_heads_and_channels(tmp_path: Path, precision: str) -> None:
    source, ranges = grouped(made("mamba2", precision))
    written = without_empty_groups(write_quamba(tmp_path, source, precision, ranges))
    found = read_quamba(tmp_path)
    assert_same(found, written)
    assert found.site_tensors["layers.0.mixer.u.index"].unique().numel() == 28  # 1 of 8 head groups is empty
    assert_same_logits(found, written)


GROUPS_OF_NOBODY = {
    "missing": ("conv1d.x_dim_group_range", None, "is not a tensor of rising ends"),
    "number": ("conv1d.x_dim_group_range", 3, "is not a tensor of rising ends"),
    "falling": ("conv1d.x_head_group_range", torch.tensor([[2, 1, 4], [2, 3, 4]]), "is not a tensor of rising ends"),
    "few": ("qchunk_scan.ssm_state_scale", torch.ones(3), "fewer scales of 'state'"),
}


@pytest.mark.parametrize("case", list(GROUPS_OF_NOBODY))
def test_groups_that_cannot_be_are_named(tmp_path: Path, case: str) -> None:
    source, ranges = grouped(made("mamba2", "W8A8"))
    write_quamba(tmp_path, source, "W8A8", ranges)
    name, value, message = GROUPS_OF_NOBODY[case]
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state[f"backbone.layers.0.mixer.{name}"] = value
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(SquamataError, match=message):
        read_quamba(tmp_path)


def test_tensors_without_names_are_refused(tmp_path: Path) -> None:
    folder, _, state = folder_of(tmp_path)
    torch.save({**state, 3: torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(SquamataError, match="not named tensors"):
        read_quamba(folder)


def test_layers_of_different_precision(tmp_path: Path) -> None:
    """W4AX: the precision is part of the names, and the recipe says which layer has which."""
    parts = {precision: made("mamba2", precision, blocks=("mamba2",) * 3) for precision in ("W4A8", "W4A16")}
    choice = ["W4A16", "W4A8", "W4A16"]
    writer = QuambaWriter(parts["W4A8"])
    for layer, precision in enumerate(choice):
        one = QuambaWriter(parts[precision])
        one.layer(layer, precision)
        for name, value in one.state.items():
            _, _, number, what, rest = name.split(".", 4)
            writer.state[f"backbone.layers.{number}.{what}s.{precision}.{rest}"] = value
    embedding, head = writer.embedding(), writer.head(four_bits=True)
    layers = [{precision: f"{precision}QMamba2"} for precision in choice]
    config = quamba_config(parts["W4A8"].config, layers, embedding, head) | {"is_hybrid": True}
    save(tmp_path, writer.state, config)
    found = read_quamba(tmp_path)
    assert found.recipe.name == "quamba2-w4ax-upstream"
    specs = found.recipe.resolve(found.config.blocks)
    assert [f"layers.{layer}.mixer.u" in specs for layer in range(3)] == [False, True, False]
    for layer, precision in enumerate(choice):
        name = f"layers.{layer}.mixer.out_proj.weight"
        theirs, ours = found.tensors[name], parts[precision].tensors[name]
        assert isinstance(theirs, QTensor) and isinstance(ours, QTensor)
        assert torch.equal(theirs.codes(), ours.codes())
        assert theirs.spec.scale_dtype == ("float32" if precision == "W4A8" else "float16")
    ids = random_ids(found.config, 1, 6)
    assert torch.isfinite(LanguageModel(found)(ids)).all()
    writer.state["backbone.layers.1.mixers.W4A16.D"] = torch.zeros(1)
    save(tmp_path, writer.state, config)
    with pytest.raises(SquamataError, match="layer 1 has mixers of W4A16 and W4A8"):
        read_quamba(tmp_path)


LIBRARY_12 = ["+-++++++++++", "--+-+-+-+-+-", "+++-++----++", "+---+--+-++-", "+++++-++----", "+-+---+--+-+"]
LIBRARY_40 = {
    0: "+-------------------+-------------------",
    1: "++-++----+-+-++++--+++-++----+-+-++++--+",
    19: "+-++----+-+-++++--+++-++----+-+-++++--++",
    20: "+--------------------+++++++++++++++++++",
    21: "++-++----+-+-++++--+--+--++++-+-+----++-",
    39: "+-++----+-+-++++--++-+--++++-+-+----++--",
}


def test_matrices_of_the_library_that_upstream_uses() -> None:
    """Rows of its generated kernels; and they are Hadamard matrices that are not ours."""
    for order, rows in ((12, dict(enumerate(LIBRARY_12))), (40, LIBRARY_40)):
        matrix = base_matrix(order, "fast-hadamard-transform")
        for row, signs in rows.items():
            assert torch.equal(matrix[row], torch.tensor([1.0 if sign == "+" else -1.0 for sign in signs])), row
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    assert not torch.equal(base_matrix(12, "fast-hadamard-transform"), base_matrix(12))


@pytest.mark.parametrize("d_inner", [384, 640, 512], ids=["12*32", "40*16", "2^9"])
@torch.no_grad()
def test_their_rotation_is_undone_by_theirs(tmp_path: Path, d_inner: int) -> None:
    """At W4A16 the model is the float model of its dequantized weights with the library's rotation taken out."""
    heads = {"n_groups": 1, "d_inner": d_inner, "blocks": ("mamba2",), "tie_embeddings": False}
    config = config_of("mamba2", d_model=256, vocab_size=72, head_dim=32, **heads)
    write_quamba(tmp_path, quantized(config, perturbed_tensors(config), recipe("mamba2", "W4A16", True), []), "W4A16")
    found = read_quamba(tmp_path)
    plain = {name: as_float(tensor).float() for name, tensor in found.tensors.items() if ".rotation" not in name}
    name = "layers.0.mixer.out_proj.weight"
    plain[name] = plain[name] @ hadamard_matrix(d_inner, "fast-hadamard-transform") / d_inner**0.5
    ids = random_ids(config, 2, 9)
    expected = float_model(config, plain)(ids)

    def error(checkpoint: Checkpoint, backend: str | None) -> float:
        with use_backend(backend) if backend else torch.no_grad():
            return float((LanguageModel(checkpoint)(ids) - expected).norm() / expected.norm())

    assert error(found, "ref") < 1e-5
    assert error(found, None) < TOLERANCE_SIXTEEN_BITS / 4  # one layer, whose products take activations of 16 bits
    compiled = Model(found)
    decoded = compiled.step(ids[:1, 0], compiled.new_cache())
    assert compiled._decoder is not None and torch.allclose(decoded, expected[:1, 0], rtol=1e-3, atol=1e-3)
    kept = {name: value for name, value in found.tensors.items() if not name.endswith("rotation_family")}
    assert (error(replace(found, tensors=kept), "ref") > 0.1) == (d_inner != 512)


@pytest.mark.parametrize("kernel", ["marlin", "qqq"])
def test_tiles(kernel: Any) -> None:
    codes = torch.randint(0, 16, (48, 128), generator=torch.Generator().manual_seed(1))
    packed = marlin_tiles(codes, marlin_rows if kernel == "marlin" else qqq_rows)
    assert packed.dtype == torch.int32 and packed.shape == (3, 256)
    assert torch.equal(unpack_weight(packed, 100, kernel), codes.T[:100].to(torch.int8) - 8)


def test_rows_of_an_embedding_without_a_positive_value() -> None:
    """Upstream takes the largest value for the magnitude: such a row has a scale below or at zero."""
    codes = unpack_embedding(torch.tensor([[0x76543210]], dtype=torch.int32))
    assert codes.tolist() == [[code - 8 for code in (0, 4, 1, 5, 2, 6, 3, 7)]]


def test_what_qqq_computes_instead_is_near(tmp_path: Path) -> None:
    """Its kernel rounds code * group scale to int8 steps of the channel: never more than half a step from what we read.

    That is 0.4 % of a row's largest weight; the 4-bit steps are 13 % of a group's.
    """
    write_quamba(tmp_path, made("mamba2", "W4A8"), "W4A8")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    where = "backbone.layers.0.mixer.out_proj."
    weight = read_quamba(tmp_path).tensors["layers.0.mixer.out_proj.weight"]
    assert isinstance(weight, QTensor)
    rows = len(weight.data)
    group = unpermute_scales(state[f"{where}s_group"], per_group=True)[:, :rows].T.float().repeat_interleave(128, dim=1)
    channel = unpermute_scales(state[f"{where}s_channel"], per_group=False)[0, :rows, None]
    theirs = torch.round(weight.codes() * group).clamp(-128, 127) * channel
    step = (theirs - weight.dequantize()).abs() / channel
    assert 0.3 < float(step.max()) <= 0.5 + 1e-4
    assert float(step.max() * channel.max()) < 0.005 * float(weight.dequantize().abs().max())


@pytest.mark.parametrize("folder", model_folders("5m"), ids=lambda folder: folder.name)
@torch.no_grad()
def test_trained_models(tmp_path: Path, folder: Path, bundled_calibration: Path) -> None:
    """A trained model quantized as upstream does, written in its layout and read again: the same logits."""
    kind = folder.name.split("-")[0]
    quantize(folder, recipe(kind, "W8A8", True), tmp_path / "ours", bundled_calibration, samples=2, length=48)
    checkpoint = read_checkpoint(tmp_path / "ours")
    sites = dict(checkpoint.site_tensors)
    for name in sites:
        for shared, source in (("z", "x"), ("B", "dt_low"), ("C", "dt_low")) if kind == "mamba1" else ():
            if name.endswith(f".{shared}.scale"):
                sites[name] = sites[name.replace(f".{shared}.scale", f".{source}.scale")]
    written = write_quamba(tmp_path / "theirs", replace(checkpoint, site_tensors=sites), "W8A8")
    found = read_quamba(tmp_path / "theirs")
    assert_same(found, written)
    assert_same_logits(found, written)


def folder_of(tmp_path: Path, **changes: Any) -> tuple[Path, ModelConfig, dict[str, Any]]:
    """A small W8A8 folder with some names of its state dict removed (None) or replaced."""
    checkpoint = made("mamba1", "W8A8", blocks=("mamba1",))
    write_quamba(tmp_path, checkpoint, "W8A8")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    return tmp_path, checkpoint.config, state


BAD: dict[str, tuple[str, Any, str]] = {
    "missing": ("mixer.in_proj.weight", None, "tensor 'backbone.layers.0.mixer.in_proj.weight' is missing"),
    "misshapen": ("mixer.conv1d.weight", torch.zeros(3, 4).char(), r"has shape \[3, 4\], \[512, 4\] was expected"),
    "float codes": ("mixer.selective_scan.D", torch.zeros(512), "is float32, int8 was expected"),
    "no scale": ("mixer.had.x_H_scale", None, "scale 'backbone.layers.0.mixer.had.x_H_scale' is missing"),
    "scale zero": ("norm.output_scale", 0.0, "is not a number above zero"),
    "NaN": ("norm.weight", torch.full((256,), float("nan")), "holds NaN"),
    "many scales": ("mixer.selective_scan.dt_scale", torch.ones(3), r"has shape \[3\], one expected"),
}


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder, _, state = folder_of(tmp_path)
    for name, value, message in BAD.values():
        damaged = dict(state)
        damaged[f"backbone.layers.0.{name}"] = value
        torch.save(damaged, folder / "pytorch_model.bin")
        with pytest.raises(SquamataError, match=message) as caught:
            read_quamba(folder)
        assert str(caught.value).startswith(f"{folder / 'pytorch_model.bin'}: ") and "\n" not in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"ssm_cfg": config["ssm_cfg"] | {"layer": "W2A8QMamba"}}, "mixers of W2A8 are not supported"),
        ({"embedding_cfg": {"layer": "W2O16Embedding"}}, "class W2O16Embedding is not supported"),
        ({"lm_head_cfg": {"layer": "W2A16"}}, "class W2A16 is not supported"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(SquamataError, match=message):
            read_quamba(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SquamataError, match=r"no pytorch_model\.bin"):
        read_quamba(folder)
