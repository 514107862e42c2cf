"""The whole story: what ``quantize`` and ``load`` promise, what they refuse, and that nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from judged import SHIPPED, model_folders
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of, write_tiny_folder

import squamata
from squamata import parts
from squamata.errors import SquamataError
from squamata.evaluate import perplexity
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import as_float
from squamata.load.random_model import RandomSource
from squamata.load.source import open_source
from squamata.load.tokenizer import Tokenizer
from squamata.models.config import ModelConfig
from squamata.models.lm import LanguageModel
from squamata.parts import QuantizedParts
from squamata.pipeline import load, quantize
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.scales.statistics import Statistics
from squamata.spec.recipe import Recipe
from squamata.text import read_documents
from squamata.transform import TRANSFORMS, Transform


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with use_backend("ref"):
        yield


def excerpt(folder: Path, tokens: int = 256) -> torch.Tensor:
    text = "".join(read_documents(squamata_excerpt(folder)))
    return torch.tensor([Tokenizer.read(folder).encode(text[: 8 * tokens])[:tokens]])


def squamata_excerpt(folder: Path) -> Path:
    return folder / "excerpt.jsonl"


@torch.no_grad()
def losses(folder: Path, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood a token."""
    logits = load(folder)(ids)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


@torch.no_grad()
def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of every token after one of ids (1, L): (L, V)."""
    return load(folder)(ids)[0].log_softmax(-1)


def divergence(folder: Path, plain: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean KL(float || quantized) a token, nats; ``plain``: the float model's ``log_probabilities``."""
    return float((plain.exp() * (plain - log_probabilities(folder, ids))).sum(-1).mean())


def test_the_report_of_a_quantization(bundled_folder: Path, bundled_calibration: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 3, "length": 20, "seed": 4}
    done = quantize(bundled_folder, "quamba-w8a8", tmp_path / "out", progress=lambda *step: steps.append(step), **drawn)
    assert (done.recipe, done.architecture, done.out) == ("quamba-w8a8", "mamba2", str(tmp_path / "out"))
    source = open_source(bundled_folder).tensors()
    assert done.bytes_float == sum(tensor.nbytes for tensor in source.values())
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert done.bytes_quantized == sum(tensor.nbytes for tensor in written.values())
    assert steps == [(number, 10) for number in range(1, 11)]
    assert done.calibration["samples"] == 3 and done.calibration["tokens"] == 60 and done.calibration["seed"] == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = config["quantization_config"]
    assert stored["calibration"] == done.calibration and stored["seed"] == 4
    tokenizer = (bundled_folder / "tokenizer.json").read_bytes()
    assert done.calibration["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert stored["squamata_version"] == squamata.__version__
    assert stored["recipe"]["calibration"] == {"samples": 3, "length": 20}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (bundled_folder / "tokenizer.json").read_bytes()
    assert done.seconds > 0 and done.peak_rss_bytes > 10**7


def test_layer_weights_are_as_small_as_promised(shipped: Callable[[str, str], Path], bundled_folder: Path) -> None:
    """Of bfloat16: W8A8 at most 0.53, W4A16 at most 0.30; embedding and head apart."""

    def layer_bytes(tensors: dict[str, torch.Tensor]) -> int:
        return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("layers."))

    bfloat16 = 2 * sum(
        t.numel() for name, t in open_source(bundled_folder).tensors().items() if name.startswith("layers.")
    )
    for recipe, share in (("quamba-w8a8", 0.53), ("w8a8-channel", 0.53), ("w4a16", 0.30)):
        written = safetensors.torch.load_file(shipped("mamba2", recipe) / "model.safetensors")
        assert layer_bytes(written) <= share * bfloat16, (recipe, layer_bytes(written) / bfloat16)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_the_float_recipe_is_the_source(
    kind: str, shipped: Callable[[str, str], Path], bundled_folder: Path, tiny_mamba1: Path
) -> None:
    source = bundled_folder if kind == "mamba2" else tiny_mamba1
    ids = excerpt(bundled_folder, 40)
    assert torch.equal(load(shipped(kind, "float"))(ids), load(source)(ids))


def test_every_recipe_is_near_float_on_real_text(shipped: Callable[[str, str], Path], bundled_folder: Path) -> None:
    """MODELS.md's first simulation, with room: KL in nats a token, and Hadamard better than naive."""
    ids = excerpt(bundled_folder)
    plain_ones = log_probabilities(bundled_folder, ids)
    found = {recipe: divergence(shipped("mamba2", recipe), plain_ones, ids) for recipe in SHIPPED}
    assert found["float"] == pytest.approx(0, abs=1e-6)
    limits = {"w8a8": 0.2, "w8a8-channel": 0.1, "quamba-w8a8": 0.1, "quamba-w8a8-float-head": 0.1, "w4a16": 0.1}
    assert all(0 < found[recipe] < limit for recipe, limit in limits.items()), found
    plain = losses(bundled_folder, ids)
    assert abs(losses(shipped("mamba2", "quamba-w8a8"), ids) - plain) < 0.02 * plain


def _big(folder: Path) -> Any:
    return pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if "24m" in folder.name else [])


@pytest.mark.slow
@pytest.mark.parametrize("folder", [_big(folder) for folder in model_folders()])
def test_real_models_with_a_real_calibration(
    folder: Path, bundled_folder: Path, bundled_calibration: Path, tmp_path: Path
) -> None:
    ids = excerpt(bundled_folder, 1024)
    plain, found = log_probabilities(folder, ids), {}
    for recipe in ("w8a8", "quamba-w8a8", "w4a16"):
        quantize(folder, recipe, tmp_path / recipe, calibration=bundled_calibration, samples=16, length=256)
        found[recipe] = divergence(tmp_path / recipe, plain, ids)
    assert found["quamba-w8a8"] < 0.03 and found["w4a16"] < 0.08 and found["quamba-w8a8"] < found["w8a8"], found


@torch.no_grad()
def test_modes_of_load(shipped: Callable[[str, str], Path], bundled_folder: Path) -> None:
    ids = excerpt(bundled_folder, 24)
    folder = shipped("mamba2", "quamba-w8a8")
    integer, simulated, plain = (load(folder, mode=mode)(ids) for mode in ("integer", "simulate", "float"))
    assert torch.equal(integer, simulated) and not torch.equal(integer, plain)
    assert squamata.load(str(folder)).tokenizer.encode("a") == Tokenizer.read(folder).encode("a")


def test_a_model_without_a_tokenizer_loads_and_calibrates_not(tmp_path: Path, bundled_calibration: Path) -> None:
    folder = write_tiny_folder(tmp_path / "source", "mamba2")
    for path in folder.glob("*token*.json"):
        path.unlink()
    assert load(folder).tokenizer is None
    quantize(folder, "w4a16", tmp_path / "out")
    assert load(tmp_path / "out").tokenizer is None
    with pytest.raises(SquamataError, match=r"tokenizer\.json"):
        quantize(folder, "w8a8", tmp_path / "other", calibration=bundled_calibration)


def test_evaluate_takes_paths_as_well(shipped: Callable[[str, str], Path], bundled_folder: Path) -> None:
    folder, text = shipped("mamba2", "w4a16"), squamata_excerpt(bundled_folder)
    by_path = squamata.evaluate(str(folder), text, bundled_folder, window=32, max_tokens=48)
    by_model = perplexity.evaluate(load(folder), text, load(bundled_folder), window=32, max_tokens=48)
    assert by_path.to_dict() | {"seconds": 0} == by_model.to_dict() | {"seconds": 0} and by_path.kl > 0
    options = [dict(inspect.signature(verb).parameters) for verb in (squamata.evaluate, perplexity.evaluate)]
    assert list(options[0]) == list(options[1])
    assert all(options[0][name].default == options[1][name].default for name in options[0])


Tensors = dict[str, torch.Tensor]


def group_by_magnitude(
    config: ModelConfig, kind: str, tensors: Tensors, statistics: dict[str, Statistics], groups: int = 2
) -> Tensors:
    """Loud and quiet channels of u apart, and the state's heads dealt out: maps alone, the layer stays as it is."""
    low, high = statistics["mixer.u"].magnitude()  # (H, P)
    loudness = torch.maximum(low.abs(), high.abs())
    maps = {
        "mixer.u.index": (loudness > loudness.median()).long(),
        "mixer.state.index": torch.arange(config.n_heads) % groups,
        "mixer.z.index": torch.zeros(config.n_heads, dtype=torch.int64),  # of a site that the recipe does not split
    }
    return tensors | maps


@torch.no_grad()
def test_a_transform_looks_first_and_leaves_index_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observed before it runs, ragged scales found along its maps, saved, loaded, and run."""
    monkeypatch.setitem(TRANSFORMS, "grouping", Transform(group_by_magnitude, needs=("mixer.u",)))
    config = config_of("mamba2")
    tensors, batches = perturbed_tensors(config), [random_ids(config, 2, 30), random_ids(config, 1, 50, seed=1)]
    recipe = recipe_of(
        {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index"}},
        {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state"}},
        {"site": "*.mixer.z", "spec": {"bits": 8}},
        transforms=[{"grouping": {"groups": 3}}],
    )
    checkpoint = quantized(config, tensors, recipe, batches)
    write_checkpoint(checkpoint, tmp_path / "saved")
    loaded = read_checkpoint(tmp_path / "saved")
    ids = random_ids(config, 2, 12, seed=2)
    logits, plain = LanguageModel(loaded)(ids), float_model(config, tensors)(ids)
    assert torch.equal(logits, LanguageModel(checkpoint)(ids))
    assert 0 < float((logits - plain).norm() / plain.norm()) < 0.1

    model, collected = float_model(config, tensors), defaultdict(list)
    for site in model.sites():
        site.mode, site.observer = "observe", collected[site.name].append
    for batch in batches:
        model(batch)
    stored = loaded.site_tensors
    assert not [name for name in stored if "mixer.z.index" in name]
    for layer in range(2):
        prefix = f"layers.{layer}.mixer"
        u = torch.cat([x.reshape(-1, 4, 16) for x in collected[f"{prefix}.u"]]).abs()
        index = stored[f"{prefix}.u.index"]
        assert torch.equal(index, (u.amax(0) > u.amax(0).median()).long())
        expected = torch.stack([u[:, index == value].max() for value in (0, 1)]) / 127
        torch.testing.assert_close(stored[f"{prefix}.u.scale"], expected, rtol=2e-5, atol=0)
        state = torch.cat(collected[f"{prefix}.state"]).abs()  # (observations, H, P, N)
        dealt = torch.arange(4) % 3
        expected = torch.stack([state[:, dealt == value].amax((0, 1, 2)) for value in range(3)]) / 127
        torch.testing.assert_close(stored[f"{prefix}.state.scale"], expected, rtol=2e-5, atol=0)


def test_a_transform_that_looks_needs_a_text(
    tmp_path: Path, tiny_mamba1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRANSFORMS, "grouping", Transform(group_by_magnitude, needs=("mixer.u",)))
    with pytest.raises(SquamataError, match=r"layers\.0\.mixer\.u.*--calibration"):
        quantize(tiny_mamba1, recipe_of(transforms=["grouping"]), tmp_path / "out")


def refused(tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path, **changed: Any) -> str:
    """What quantize says; nothing may be written."""
    out = tmp_path / "refused"
    given: dict[str, Any] = {"source": tiny_mamba1, "recipe": "w8a8", "out": out, "calibration": bundled_calibration}
    with pytest.raises(SquamataError) as caught:
        quantize(**(given | {"samples": 2, "length": 8} | changed))
    assert not out.exists() and not list(tmp_path.glob(".refused*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_refused_before_anything_is_written(
    tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path
) -> None:
    def said(**changed: Any) -> str:
        return refused(tiny_mamba1, tmp_path, bundled_calibration, **changed)

    assert "--calibration" in said(calibration=None)
    assert "no such file" in said(calibration=tmp_path / "none.txt")
    assert "did you mean 'w8a8'" in said(recipe="w8a")
    assert "samples" in said(samples=0)
    assert "samples" in said(samples=-3)
    assert "length" in said(length=1)
    assert "no such folder" in said(source=tmp_path / "nothing")
    mapping: dict[str, Any] = {"name": "mine", "rules": [{"site": "*.mixer.u", "spec": {"bits": 8, "scale": "minmx"}}]}
    for key, value, word in (
        ("rules", mapping["rules"], "did you mean 'minmax'"),
        ("transforms", ["hadamrd"], "did you mean 'hadamard'"),
        ("weights", "rtm", "did you mean 'rtn'"),
        ("architectures", ["mamba2"], "mamba1"),
    ):
        assert word in said(recipe=squamata_recipe({"name": "mine", key: value}))
    ragged = {"site": "*.mixer.z", "spec": {"bits": 8, "granularity": "index"}}
    assert "index" in said(recipe=squamata_recipe({"name": "mine", "rules": [ragged]}))


def squamata_recipe(mapping: dict[str, Any]) -> Any:
    from squamata.spec.recipe import Recipe

    return Recipe.from_mapping(mapping)


def test_a_checkpoint_is_not_quantized_again(
    shipped: Callable[[str, str], Path], tmp_path: Path, bundled_calibration: Path
) -> None:
    with pytest.raises(SquamataError, match="already"):
        quantize(shipped("mamba1", "w8a8"), "w8a8", tmp_path / "out", calibration=bundled_calibration)


GOES_ON = """
import os, sys, torch
from squamata.pipeline import quantize
torch.set_num_threads(1)
source, recipe, out, text, stop, resume = sys.argv[1:]
def killed(step, total):
    print(step, flush=True)
    if step == int(stop):
        os.kill(os.getpid(), 9)
quantize(source, recipe, out, text, samples=3, length=24, resume=resume == "resume", progress=killed)
"""


def run_whole(source: Path, recipe: str, out: Path, text: Path) -> list[int]:
    """The same without a break, in this process, by the kernels that a process takes by itself; the steps it made."""
    steps: list[int] = []
    with use_backend(None):
        quantize(source, recipe, out, text, samples=3, length=24, progress=lambda step, _: steps.append(step))
    return steps


def run_until(stop: int, source: Path, recipe: str, out: Path, text: Path, resume: str = "anew") -> list[int]:
    """Quantize in a process that kills itself after a step; the steps it made."""
    arguments = [sys.executable, "-c", GOES_ON, *map(str, (source, recipe, out, text, stop, resume))]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == (-9 if stop else 0), done.stderr
    return [int(step) for step in done.stdout.split()]


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("recipe", ["quamba-w4a8", "w8a8", "klt-w8a8"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    kind: str, recipe: str, tmp_path: Path, bundled_calibration: Path
) -> None:
    source = write_tiny_folder(tmp_path / "source", kind, blocks=(kind,) * 3)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_whole(source, recipe, whole, bundled_calibration) == [1, 2, 3, 4, 5]
    assert run_until(2, source, recipe, out, bundled_calibration) == [1, 2]
    assert not out.exists()
    assert run_until(4, source, recipe, out, bundled_calibration, "resume") == [3, 4]  # killed again
    assert run_until(0, source, recipe, out, bundled_calibration, "resume") == [5]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


JOINS = GOES_ON.replace(
    "quantize(source",
    """from squamata.save.write import CheckpointWriter
if resume == "anew":
    CheckpointWriter._flush, flush = lambda self: (flush(self), os.kill(os.getpid(), 9)), CheckpointWriter._flush
quantize(source""",
)


def test_a_run_killed_while_its_parts_become_shards_goes_on(tmp_path: Path, bundled_calibration: Path) -> None:
    source, whole, out = write_tiny_folder(tmp_path / "source", "mamba2"), tmp_path / "whole", tmp_path / "out"
    run_whole(source, "w8a8", whole, bundled_calibration)
    for resume, status, steps in (("anew", -9, ["1", "2", "3", "4"]), ("resume", 0, [])):
        arguments = [sys.executable, "-c", JOINS, *map(str, (source, "w8a8", out, bundled_calibration, 0, resume))]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()) == (status, steps), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert all(path.read_bytes() == (out / path.name).read_bytes() for path in whole.iterdir())


def test_only_the_same_work_is_gone_on_with(tmp_path: Path, bundled_calibration: Path) -> None:
    source, out = write_tiny_folder(tmp_path / "source", "mamba1"), tmp_path / "out"
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 3, "length": 24, "resume": True}
    run_until(2, source, "w8a8", out, bundled_calibration)
    kept = {path.name for path in tmp_path.iterdir()}
    for other in ({"recipe": "quamba-w8a8"}, {"recipe": "w8a8", "seed": 1}):
        with pytest.raises(SquamataError, match=r"other arguments.*--no-resume"):
            quantize(source, out=out, **drawn | other)
    config = source / "config.json"
    config.write_text(config.read_text())
    before = config.stat()
    os.utime(config, ns=(1, 1))
    with pytest.raises(SquamataError, match="of another model"):
        quantize(source, "w8a8", out, **drawn)
    assert {path.name for path in tmp_path.iterdir()} == kept  # nothing of the two layers is lost
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SquamataError, match=r"finished 2 parts.*--resume.*--no-resume"):
        quantize(source, "w8a8", out, **drawn | {"resume": None})
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert run_until(1, source, "quamba-w8a8", out, bundled_calibration) == [1]  # told to start anew
    assert {path.name for path in tmp_path.iterdir()} & kept == {"source"}


def test_drafts_of_a_killed_run_are_not_published(tmp_path: Path, bundled_calibration: Path) -> None:
    """safetensors writes to a file of another name first, which a kill leaves in the folder that is renamed."""
    source, out = write_tiny_folder(tmp_path / "source", "mamba2"), tmp_path / "out"
    run_until(2, source, "w8a8", out, bundled_calibration)
    (partial,) = tmp_path.glob(".out.partial-*")
    for name in (".tmpAbCdEf", "state-7.safetensors", "part-00002.safetensors", "shard-0.safetensors", "config.json"):
        (partial / name).write_bytes(b"half a file")
    run_until(0, source, "w8a8", out, bundled_calibration, "resume")
    run_whole(source, "w8a8", tmp_path / "whole", bundled_calibration)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("cut", ["part-00001.safetensors", "state-2.safetensors"])
def test_parts_that_are_damaged_are_not_gone_on_with(cut: str, tmp_path: Path, bundled_calibration: Path) -> None:
    source, out = write_tiny_folder(tmp_path / "source", "mamba1"), tmp_path / "out"
    run_until(2, source, "w8a8", out, bundled_calibration)
    (partial,) = tmp_path.glob(".out.partial-*")
    (partial / cut).write_bytes((partial / cut).read_bytes()[:-9])
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 3, "length": 24}
    with pytest.raises(SquamataError, match=r"is damaged: --no-resume"):
        quantize(source, "w8a8", out, resume=True, **drawn)
    assert quantize(source, "w8a8", out, resume=False, **drawn).parts_resumed == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_full_disk_keeps_what_is_finished(
    tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 2, "length": 8}
    quantize(tiny_mamba1, "w8a8", tmp_path / "whole", **drawn)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        fill = lambda step, _: patch.setattr(safetensors.torch, "save_file", full) if step == 2 else None  # noqa: E731
        with pytest.raises(SquamataError, match=r"No space left on device; finished parts are kept, and --resume"):
            quantize(tiny_mamba1, "w8a8", tmp_path / "out", progress=fill, **drawn)
    with monkeypatch.context() as patch, pytest.raises(SquamataError, match=r"finished parts are kept"):
        patch.setattr(Path, "write_text", full)  # the config, when all parts are there
        quantize(tiny_mamba1, "w8a8", tmp_path / "out", resume=True, recoverable=False, **drawn)
    assert not (tmp_path / "out").exists()
    assert quantize(tiny_mamba1, "w8a8", tmp_path / "out", resume=True, **drawn).parts_resumed == 2
    whole, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert out == whole


def test_who_comes_second_to_a_place_keeps_what_is_finished(
    tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path
) -> None:
    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 2, "length": 8}

    def overtake(step: int, total: int) -> None:
        if step == total:
            quantize(tiny_mamba1, "w4a16", tmp_path / "out")

    with pytest.raises(SquamataError, match=r"exists already.*finished parts are kept"):
        quantize(tiny_mamba1, "w8a8", tmp_path / "out", progress=overtake, **drawn)
    again = quantize(tiny_mamba1, "w8a8", tmp_path / "out", resume=True, force=True, **drawn)
    assert again.parts_resumed == 4 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_nobody_can_resume_leaves_nothing_to_resume(
    tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path
) -> None:
    def interrupt(step: int, total: int) -> None:
        raise KeyboardInterrupt

    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 2, "length": 8}
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_mamba1, "w8a8", tmp_path / "out", progress=interrupt, recoverable=False, **drawn)
    assert not list(tmp_path.iterdir())


def test_the_place_is_looked_at_before_any_work(tiny_mamba1: Path, tmp_path: Path) -> None:
    """A calibration text that is not there would be named later."""
    (tmp_path / "thesis.tex").write_text("years")
    for out, said in ((tmp_path, "is no checkpoint"), (tmp_path / "thesis.tex", "is no checkpoint")):
        with pytest.raises(SquamataError, match=said):
            quantize(tiny_mamba1, "w8a8", out, calibration=tmp_path / "none.txt")


def test_a_link_to_a_folder_stays_a_link(tiny_mamba1: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "model")
    for force in (False, True):
        quantize(tiny_mamba1, "w4a16", tmp_path / "out", force=force)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "model" / "config.json").is_file()
    assert {path.name for path in tmp_path.rglob(".*")} == set()


def test_an_interrupted_run_can_go_on(tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path) -> None:
    def interrupt(step: int, total: int) -> None:
        raise KeyboardInterrupt

    drawn: dict[str, Any] = {"calibration": bundled_calibration, "samples": 2, "length": 8}
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_mamba1, "w8a8", tmp_path / "out", progress=interrupt, **drawn)
    steps: list[int] = []
    quantize(tiny_mamba1, "w8a8", tmp_path / "out", resume=True, progress=lambda step, _: steps.append(step), **drawn)
    assert steps == [2, 3, 4] and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_nan_in_the_weights_is_named_and_nothing_is_written(tmp_path: Path, bundled_calibration: Path) -> None:
    folder = write_tiny_folder(tmp_path / "source", "mamba2")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["backbone.layers.1.mixer.out_proj.weight"][3, 4] = float("nan")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(SquamataError, match=r"layers\.1\.mixer\.out_proj\.weight.*NaN"):
        quantize(folder, "w4a16", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_seed_changes_the_sample_and_the_scales(tiny_mamba1: Path, tmp_path: Path, bundled_calibration: Path) -> None:
    reports = [
        quantize(
            tiny_mamba1, "w8a8", tmp_path / str(seed), calibration=bundled_calibration, samples=2, length=16, seed=seed
        )
        for seed in (0, 1)
    ]
    assert reports[0].calibration["tokens_sha256"] != reports[1].calibration["tokens_sha256"]
    scales = [
        safetensors.torch.load_file(tmp_path / seed / "model.safetensors")["layers.0.mixer.u.scale"] for seed in "01"
    ]
    assert scales[0] != scales[1]


@pytest.mark.parametrize("recipe", ["quamba-w8a8", "quamba-w4a8", "w4a16"])
def test_a_table_dealt_with_some_rows_at_a_time_is_the_same(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ids = config_of("mamba2"), random_ids(config_of("mamba2"), 2, 40)
    whole = list(QuantizedParts(RandomSource(config), Recipe.read(recipe), [ids]).each())
    monkeypatch.setattr(parts, "TABLE_BLOCK", 7 * config.d_model)  # the last rows do not fill a block
    some = list(QuantizedParts(RandomSource(config), Recipe.read(recipe), [ids]).each())
    for ours, theirs in zip(some, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(as_float(value), as_float(theirs[name]), rtol=0, atol=0)
