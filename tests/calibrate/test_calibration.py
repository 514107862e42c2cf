"""Sampling is seeded and recorded; statistics are those of every tensor that lands on a site."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ByteTokenizer
from tiny import config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.calibrate.observe import run_layer, watch_layer
from squamata.calibrate.tokens import CalibrationSet, joined, sample
from squamata.errors import SquamataError
from squamata.kernels.dispatch import use_backend
from squamata.spec.recipe import Calibration
from squamata.text import read_documents


def write_documents(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path, [f"{number:03d} " + "snake " * (number % 7) for number in range(50)])


def draw(path: Path, seed: int = 0, **settings: Any) -> CalibrationSet:
    return sample(path, ByteTokenizer(), Calibration(**settings), seed)


def text_of(sequence: tuple[int, ...]) -> str:
    return ByteTokenizer().decode(sequence)


def test_a_seed_gives_the_same_sample_and_another_seed_another(documents: Path) -> None:
    first, again, other = (draw(documents, seed, samples=20, length=16) for seed in (7, 7, 8))
    assert first == again and first.record() == again.record()
    assert first.sequences != other.sequences
    assert first.record()["tokens_sha256"] != other.record()["tokens_sha256"]
    assert first.record()["sha256"] == other.record()["sha256"]


def test_samples_are_beginnings_of_different_documents(documents: Path) -> None:
    drawn = draw(documents, samples=50, length=9)
    assert [sequence[0] for sequence in drawn.sequences] == [0] * 50
    assert sorted(text_of(sequence) for sequence in drawn.sequences) == sorted(
        document[:8] for document in read_documents(documents)
    )


def test_order_first_takes_the_first_documents(documents: Path) -> None:
    drawn = draw(documents, seed=3, samples=5, length=4, order="first")
    assert [text_of(sequence) for sequence in drawn.sequences] == ["000", "001", "002", "003", "004"]
    assert drawn.sequences == draw(documents, seed=4, samples=5, length=4, order="first").sequences


def test_the_record_is_exact(documents: Path) -> None:
    drawn = draw(documents, seed=5, samples=12, length=10)
    record = drawn.record()
    assert record["samples"] == 12 and record["seed"] == 5
    assert record["tokens"] == drawn.tokens == sum(map(len, drawn.sequences))
    assert record["sha256"] == hashlib.sha256(documents.read_bytes()).hexdigest()
    assert record["settings"] == {"samples": 12, "length": 10, "batch": 8, "order": "shuffled"}
    json.dumps(record)


def test_batches_hold_every_sample_once(documents: Path) -> None:
    drawn = draw(documents, samples=40, length=30, batch=3)
    batches = drawn.batches()
    rows = sorted(tuple(row) for batch in batches for row in batch.tolist())
    assert rows == sorted(drawn.sequences) and len({len(row) for row in rows}) > 1
    assert all(batch.dtype == torch.int64 and len(batch) <= 3 for batch in batches)


def test_batches_keep_the_order_drawn_within_a_length(documents: Path) -> None:
    drawn = draw(documents, samples=40, length=30, batch=3)
    rows = [tuple(row) for batch in drawn.batches() for row in batch.tolist()]
    assert [len(row) for row in rows] == sorted(map(len, drawn.sequences))
    for length in {len(row) for row in rows}:
        assert [row for row in rows if len(row) == length] == [row for row in drawn.sequences if len(row) == length]


def test_the_fingerprint_is_of_the_bytes_that_were_read(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read: a file that changes afterwards cannot lend its fingerprint to the old text."""
    reads = []
    honest = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), honest(path))[1])
    draw(documents, samples=5, length=8)
    assert reads == [documents]


@pytest.mark.parametrize("order", ["shuffled", "first"])
def test_a_text_file_is_cut_into_consecutive_pieces(tmp_path: Path, order: str) -> None:
    text = "".join(chr(97 + number % 26) for number in range(95))
    (tmp_path / "text.txt").write_text(text)
    drawn = draw(tmp_path / "text.txt", samples=100, length=11, order=order)
    pieces = [text_of(sequence) for sequence in drawn.sequences]
    expected = [text[start : start + 10] for start in range(0, 95, 10)]
    assert pieces == expected if order == "first" else sorted(pieces) == sorted(expected) and pieces != expected
    assert all(sequence[0] == 0 and 0 not in sequence[1:] for sequence in drawn.sequences)
    assert len(draw(tmp_path / "text.txt", samples=3, length=11).sequences) == 3


def test_a_tokenizer_without_a_begin_token_loses_and_invents_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij")
    drawn = sample(tmp_path / "text.txt", ByteTokenizer(None), Calibration(samples=9, length=5, order="first"), 0)
    assert "".join(text_of(sequence) for sequence in drawn.sequences) == "abcdefghij"


def test_a_huge_document_is_not_tokenised_whole(tmp_path: Path) -> None:
    path = write_documents(tmp_path, ["x" * 10_000_000, "y"])
    seen = []

    class Counting(ByteTokenizer):
        def encode(self, text: str, begin: bool = True) -> list[int]:
            seen.append(len(text))
            return super().encode(text, begin)

    drawn = sample(path, Counting(), Calibration(samples=2, length=32), 0)
    assert max(seen) <= 32 * 40 and max(map(len, drawn.sequences)) == 32


def test_text_that_cannot_calibrate(tmp_path: Path) -> None:
    with pytest.raises(SquamataError, match="no such file"):
        draw(tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(SquamataError, match="no text"):
        draw(tmp_path / "blank.txt")


GRANULAR = {
    "mamba1": {"x": "channel", "u": "tensor", "state": "channel", "B": "tensor", "dt": "channel", "in": "tensor"},
    "mamba2": {
        "x": "head",
        "u": "head,channel",
        "state": "head",
        "B_conv": "ssd_group",
        "z": "channel",
        "out": "tensor",
    },
}


@pytest.mark.parametrize("kind", list(GRANULAR))
def test_scales_equal_brute_force_over_the_collected_tensors(kind: str) -> None:
    """One pass over batches of different lengths equals keeping every tensor that landed."""
    config = config_of(kind)
    tensors = perturbed_tensors(config)
    batches = [random_ids(config, 3, 40, seed=1), random_ids(config, 2, 64, seed=2)]
    rules = [
        {"site": f"*.mixer.{name}", "spec": {"bits": 8, "granularity": granularity}}
        for name, granularity in GRANULAR[kind].items()
    ]
    found = quantized(config, tensors, recipe_of(*rules), batches).site_tensors

    model = float_model(config, tensors)
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    for site in model.sites():
        site.mode, site.observer = "observe", collected[site.name].append
    with use_backend("ref"), torch.no_grad():
        for ids in batches:
            model(ids)
    checked = 0
    for layer in range(2):
        for name, granularity in GRANULAR[kind].items():
            site = f"layers.{layer}.mixer.{name}"
            sizes = type(model.blocks[0]).site_sizes(config)[name]
            everything = torch.cat([x.reshape(-1, *sizes) for x in collected[site]])
            axes = {"tensor": (), "head": (1,), "ssd_group": (1,), "head,channel": (1, 2)}.get(granularity)
            if axes is None:  # channel: all axes but the state's
                axes = tuple(range(1, 1 + len(sizes) - (name == "state")))
            summed = [axis for axis in range(everything.ndim) if axis not in axes]
            expected = everything.abs().amax(summed) / 127
            torch.testing.assert_close(found[f"{site}.scale"], expected, rtol=2e-5, atol=0)
            checked += 1
    assert checked == 2 * len(GRANULAR[kind])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_every_static_site_gets_a_scale_and_no_other(kind: str) -> None:
    config = config_of(kind)
    recipe = recipe_of(
        {"site": "*.mixer.*", "spec": {"bits": 8}},
        {"site": "*.mixer.in", "spec": {"bits": 8, "granularity": "token", "dynamic": True}},
        {"site": "*.mixer.z", "spec": "float"},
        {"site": "head.in", "spec": {"bits": 8, "symmetric": False}},
    )
    found = quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 2, 20)]).site_tensors
    model = float_model(config, perturbed_tensors(config))
    names = {site.name for site in model.sites() if not site.name.endswith((".in", ".z"))} | {"head.in"}
    assert set(found) == {f"{name}.scale" for name in names} | {"head.in.zero"}
    assert all(bool((scale > 0).all()) for name, scale in found.items() if name.endswith("scale"))


@pytest.mark.parametrize(
    ("recipe", "site"),
    [
        ({"rules": [{"site": "*.mixer.u", "spec": {"bits": 8}}]}, "u"),
        ({"rules": [{"site": "*.mixer.z", "spec": {"bits": 8, "scale": "mse"}}]}, "z"),
        ({"rules": [{"site": "*.out_proj.weight", "spec": {"bits": 8}}], "weights": "gptq"}, "out"),
        ({"transforms": ["smooth"]}, "out"),
    ],
)
def test_a_model_that_overflows_is_told_where(recipe: dict[str, Any], site: str) -> None:
    config = config_of("mamba2")
    tensors = perturbed_tensors(config)
    tensors["layers.1.mixer.in_proj.weight"][:] = 3e38
    with pytest.raises(SquamataError, match=rf"^layers\.1\.mixer\.{site}: values that are not finite"):
        quantized(config, tensors, recipe_of(**recipe), [random_ids(config, 2, 20)])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_watching_a_layer_leaves_the_stream(kind: str) -> None:
    config = config_of(kind)
    block = float_model(config, perturbed_tensors(config)).blocks[1]
    stream = [torch.randn(2, 9, 32), torch.randn(1, 4, 32)]
    before = [h.clone() for h in stream]
    with use_backend("ref"):
        watch_layer(block, stream)
        assert all(torch.equal(h, h_before) for h, h_before in zip(stream, before, strict=True))
        run_layer(block, stream)
        written, residual = block.forward(before[0], None, block.new_cache(2))
    assert torch.equal(stream[0], residual + written) and not torch.equal(stream[0], before[0])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_watching_goes_no_further_than_the_last_observer(kind: str) -> None:
    """They see what a whole pass shows them, and what follows is not computed."""
    config = config_of(kind)
    block = float_model(config, perturbed_tensors(config)).blocks[1]
    stream = [torch.randn(2, 9, 32), torch.randn(1, 4, 32)]
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name in ("in", "u"):
        block.sites[name].observer = seen[name].append
    with use_backend("ref"):
        run_layer(block, list(stream))
        whole = {name: list(tensors) for name, tensors in seen.items()}
        seen["in"].clear(), seen["u"].clear()
        block.out_proj = None  # type: ignore[attr-defined]
        watch_layer(block, stream)
    for name, tensors in whole.items():
        assert all(torch.equal(one, other) for one, other in zip(seen[name], tensors, strict=True))
    assert block.sites["u"].observer == seen["u"].append  # as it was


def test_batches_are_joined_in_their_order() -> None:
    """Those of one length; or all, filled up, with their lengths."""
    batches = [torch.arange(rows * length).reshape(rows, length) for rows, length in ((2, 4), (3, 4), (2, 4), (1, 6))]
    found, lengths = joined(batches, 20, unequal=False)
    assert [tuple(ids.shape) for ids in found] == [(5, 4), (2, 4), (1, 6)] and lengths == [None] * 3
    assert torch.equal(torch.cat([ids.flatten() for ids in found]), torch.cat([ids.flatten() for ids in batches]))
    assert [len(ids) for ids in joined(batches, 1, unequal=True)[0]] == [2, 3, 2, 1]
    found, lengths = joined(batches, 20, unequal=True)
    assert [tuple(ids.shape) for ids in found] == [(5, 4), (3, 6)] and lengths == [None, [4, 4, 6]]
    assert torch.equal(found[1][:2, :4], batches[2]) and torch.equal(found[1][2], batches[3][0])


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_observers_see_of_a_filled_up_batch_what_they_see_of_its_documents(kind: str) -> None:
    config = config_of(kind)
    block = float_model(config, perturbed_tensors(config)).blocks[0]
    apart = [torch.randn(1, length, 32) for length in (3, 9, 5)]
    filled = [torch.cat([torch.nn.functional.pad(h, (0, 0, 0, 9 - h.shape[1])) for h in apart])]
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name in ("in", "u", "out"):
        block.sites[name].observer = seen[name].append
    with use_backend("ref"):
        run_layer(block, apart)
        for watch in (run_layer, watch_layer):
            alone = {name: list(tensors) for name, tensors in seen.items()}
            seen["in"].clear(), seen["u"].clear(), seen["out"].clear()
            watch(block, list(filled), [[3, 9, 5]])
            for name, tensors in alone.items():
                for one, other in zip(seen[name], tensors, strict=True):
                    torch.testing.assert_close(one, other)
        run_layer(block, filled, [[3, 9, 5]])
    for row, h in enumerate(apart):
        torch.testing.assert_close(filled[0][row, : h.shape[1]], h[0])


def test_scales_are_taken_after_the_transform() -> None:
    """The scale at `out` is that of the rotated tensor."""
    config = config_of("mamba1")
    tensors = perturbed_tensors(config)
    rule = {"site": "*.mixer.out", "spec": {"bits": 8}}
    batches = [random_ids(config, 2, 30)]
    plain = quantized(config, tensors, recipe_of(rule), batches).site_tensors
    rotated = quantized(config, tensors, recipe_of(rule, transforms=["hadamard"]), batches).site_tensors
    assert all(plain[name] != rotated[name] for name in plain)
