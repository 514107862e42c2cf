"""SqueezeLLM: what it stores is what its formulas say, comes back from disk, and is nearer to the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import MemorySource, config_of, float_model, perturbed_tensors, quantized, random_ids, recipe_of

from squamata.errors import SquamataError
from squamata.evaluate.inspection import differences, site_rows
from squamata.evaluate.size import bytes_by_part, tensor_bytes
from squamata.kernels.dispatch import use_backend
from squamata.kernels.partition import Layout
from squamata.kernels.qtensor import QTensor
from squamata.load.source import open_source
from squamata.load.tokenizer import Tokenizer
from squamata.parts import QuantizedParts
from squamata.pipeline import check, load, quantize
from squamata.quantize.rtn import round_to_nearest
from squamata.quantize.squeezellm import Sensitivity, sensitivities, squeezellm
from squamata.run.model import Model
from squamata.save.read import read_checkpoint
from squamata.save.write import write_checkpoint
from squamata.spec.quant import QuantSpec
from squamata.text import read_documents

TABLE = {"bits": 4, "codec": "table", "granularity": "channel", "scale_dtype": "float16", "sparse": 0.02}
SPEC = QuantSpec(**TABLE)
RULES = [{"site": f"*.{name}_proj.weight", "spec": TABLE} for name in ("in", "x", "out")]


def problem(rows: int = 12, columns: int = 90, tail: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few large elements, and squared gradients over orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight.sign() * weight.abs() ** (1 + tail) * 0.1
    return weight, torch.randn(rows, columns, generator=generator).square() * torch.rand(
        rows, columns, generator=generator
    ).pow(4)


def layout_of(weight: torch.Tensor) -> Layout:
    return Layout(("out", "in"), tuple(weight.shape), flat=False)


def made(weight: torch.Tensor, squares: torch.Tensor | None, spec: QuantSpec = SPEC, **options: Any) -> QTensor:
    known = sensitivities({"w": weight}, {"w": spec}, None if squares is None else {"w": squares}, **options)
    return squeezellm(weight, spec, layout_of(weight), known["w"], **options)


def test_every_step_as_the_paper_says_it() -> None:
    """Again in float64 numpy: fences from the quartiles, the most sensitive, then the nearest value of the table."""
    weight, squares = problem()
    result = made(weight, squares)
    assert result.sparse is not None
    w, f = weight.double().numpy(), squares.double().numpy()
    reach = _reach(w, 0.9 * 0.02)
    q1, q3 = (np.quantile(w, share, method="nearest") for share in (0.25, 0.75))
    threshold = max(abs(q1 - reach * (q3 - q1)), abs(q3 + reach * (q3 - q1)))
    apart = np.abs(w) > threshold
    assert apart.sum() == round(0.9 * 0.02 * w.size)
    largest = np.argsort(f.ravel())[-round(0.1 * 0.02 * w.size) :]
    apart.ravel()[largest] = True
    table, values = result.scale.double().numpy(), result.dequantize().double().numpy()
    levels = np.abs(w[:, :, None] - table[:, None])
    inside = np.abs(values - w)[~apart]
    assert np.allclose(inside, levels.min(2)[~apart], atol=1e-7)
    assert np.abs(values - w)[apart].max() <= 2**-11 * np.abs(w[apart]).max() * 1.1
    assert result.sparse.pointers.tolist() == [0, *np.cumsum(apart.sum(1)).tolist()]
    assert result.sparse.columns.tolist() == np.nonzero(apart)[1].tolist()
    for row in range(len(w)):  # every value is the mean, weighted, of the elements that say it (to float16)
        mine, codes = ~apart[row], result.codes()[row].numpy()
        for code in set(codes[mine].tolist()):
            members = mine & (codes == code)
            mean = (w[row] * f[row])[members].sum() / f[row][members].sum()
            assert table[row, code] == pytest.approx(mean, abs=2e-3 * np.abs(w[row]).max())
    zero = np.abs(table).argmin(1)
    assert all(result.codes()[row, column] == zero[row] for row, column in np.argwhere(apart))


def _reach(w: np.ndarray, share: float) -> float:
    """Interquartile ranges outside the quartiles, by trying: half way between two elements' own."""
    q1, q3 = (np.quantile(w, part, method="nearest") for part in (0.25, 0.75))
    own = np.sort(((np.abs(w) - max(-q1, q3)) / (q3 - q1)).ravel())[::-1]
    count = round(share * w.size)
    return float((own[count - 1] + own[count]) / 2)


def test_outliers_go_where_they_are_however_large_the_weights() -> None:
    """One reach for the model: a heavy-tailed weight has more of them, one that is only larger has not."""
    heavy, light = problem(40, 90, tail=0.4)[0], problem(40, 90, tail=0.0, seed=1)[0]
    large = 100 * light
    weights = {"heavy": heavy, "light": light, "large": large}
    found = sensitivities(weights, dict.fromkeys(weights, SPEC), None)
    outside = {name: int((weights[name].abs() > found[name].fence).sum()) for name in weights}
    assert abs(sum(outside.values()) - 0.02 * 3 * heavy.numel()) <= 2  # elements that lie equally far out go together
    assert outside["heavy"] > 3 * outside["light"] and abs(outside["light"] - outside["large"]) <= 1
    assert outside["light"] > 0


def test_gradients_move_the_error_to_where_it_costs_least() -> None:
    weight, squares = problem(rows=20, columns=200)
    plain = QuantSpec(**(TABLE | {"sparse": 0.0, "bits": 3}))
    weighted, alike = made(weight, squares, plain), made(weight, None, plain, fisher=False)
    assert weighted.sparse is None and alike.sparse is None
    costs = [((result.dequantize() - weight).square() * squares).sum() for result in (weighted, alike)]
    errors = [(result.dequantize() - weight).square().sum() for result in (weighted, alike)]
    assert costs[0] < 0.7 * costs[1] and errors[1] < errors[0]
    nearest = round_to_nearest(weight, QuantSpec(bits=3, granularity="channel", full_range=True), layout_of(weight))
    assert errors[1] < 0.7 * (nearest.dequantize() - weight).square().sum()


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 16), (2, 17)])
def test_short_rows_are_said_exactly(rows: int, columns: int) -> None:
    weight, squares = problem(rows, columns)
    weight = weight.half().float()
    result = made(weight, squares, QuantSpec(**(TABLE | {"sparse": 0.0})))
    wrong = (result.dequantize() != weight).sum(1)
    assert int(wrong.max()) <= max(0, columns - 16) * 2


def test_a_spec_without_table_is_rounded_to_nearest_and_one_with_needs_a_text() -> None:
    weight, _ = problem()
    spec = QuantSpec(bits=8, granularity="channel")
    result = squeezellm(weight, spec, layout_of(weight), None)
    assert torch.equal(result.data, round_to_nearest(weight, spec, layout_of(weight)).data)
    with pytest.raises(SquamataError, match="--calibration"):
        squeezellm(weight, SPEC, layout_of(weight), None)
    unweighted = Sensitivity(None, float(weight.abs().max()))
    sparse = squeezellm(weight, SPEC, layout_of(weight), unweighted, fisher=False).sparse
    assert sparse is not None and len(sparse.values) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, "2 to 4 bits"),
        ({"granularity": "group(16)"}, "granularity: channel"),
        ({"symmetric": False}, "leave 'symmetric'"),
        ({"codec": "uniform"}, "'sparse' is for"),
    ],
)
def test_a_spec_that_is_no_table_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantSpec(**(TABLE | changes))


@pytest.mark.parametrize(
    ("rule", "fields", "words"),
    [
        ({}, {"weights": "gptq"}, "gptq finds no tables; use 'weights: squeezellm'"),
        ({}, {"transforms": ["fold_norm"]}, "before 'fold_norm' changes it"),
        ({}, {"weights": {"squeezellm": {"sensitve": 0.1}}}, "did you mean 'sensitive'"),
        ({"site": "head.weight"}, {}, "head.weight: codec 'table' is for"),
        ({"site": "*.conv.weight"}, {}, "conv.weight: codec 'table' is for"),
        ({"site": "*.mixer.u"}, {}, "mixer.u: codec 'table' is for"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_one_line(
    rule: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    recipe = recipe_of(*RULES, {"site": "head.in", "spec": {"bits": 8}} | rule, **({"weights": "squeezellm"} | fields))
    if rule:
        recipe = recipe_of(*RULES, rule | {"spec": TABLE}, weights="squeezellm")
    with pytest.raises(SquamataError, match=words):
        check(recipe, config_of("mamba2"))


def test_without_a_text_it_says_why_one_is_needed(bundled_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SquamataError, match="gradients of weights, for squeezellm"):
        quantize(bundled_folder, "squeezellm-w4a16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_it_comes_back_from_disk_to_the_last_bit_in_every_mode(kind: str, bits: int, tmp_path: Path) -> None:
    """Activations in 8 bits too: the products dequantize both, and simulation is what the integers say."""
    config = config_of(kind)
    rules = [rule | {"spec": TABLE | {"bits": bits}} for rule in RULES]
    rules += [{"site": "*.mixer.in", "spec": {"bits": 8}}, {"site": "embedding.weight", "spec": {"bits": 8}}]
    batches = [random_ids(config, 3, 12)]
    checkpoint = quantized(config, perturbed_tensors(config), recipe_of(*rules, weights="squeezellm"), batches)
    size = write_checkpoint(checkpoint, tmp_path / "out")
    again, ids = read_checkpoint(tmp_path / "out"), random_ids(config, 2, 9, seed=5)
    logits = {mode: Model(checkpoint, mode)(ids) for mode in ("integer", "simulate")}
    assert torch.equal(logits["integer"], logits["simulate"])
    assert all(torch.equal(Model(again, mode)(ids), expected) for mode, expected in logits.items())
    model = Model(again)
    cache = model.new_cache(2)
    steps = [model.step(ids[:, place], cache) for place in range(3)]  # no compiled plan takes it: composed instead
    torch.testing.assert_close(torch.stack(steps, 1), logits["integer"][:, :3], rtol=1e-3, atol=1e-3)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert size == sum(tensor.nbytes for tensor in stored.values()) == bytes_by_part(model)["total"]
    name = "layers.0.mixer.in_proj.weight"
    assert tensor_bytes(model)[name] == sum(part.nbytes for key, part in stored.items() if key.startswith(name))
    assert stored[name].nbytes == checkpoint.tensors[name].shape[0] * bits * 32 // 8
    row = next(row for row in site_rows(model) if row.site == name)
    assert (row.format, row.bits, row.strategy) == (f"{bits}-bit table", bits, f"{2**bits} values + 2 % sparse")
    assert row.scale_median is None and row.scales == 0
    assert not differences(model, Model(checkpoint))


@pytest.mark.parametrize("broken", ["sparse_rows", "sparse_columns", "sparse_values", "table"])
def test_a_damaged_sparse_part_is_refused(broken: str, tmp_path: Path) -> None:
    config = config_of("mamba2")
    recipe = recipe_of(*RULES, weights="squeezellm")
    write_checkpoint(quantized(config, perturbed_tensors(config), recipe, [random_ids(config, 1, 9)]), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = f"layers.0.mixer.in_proj.weight.{broken}"
    tensors[name] = {
        "sparse_rows": lambda part: part.flip(0),
        "sparse_columns": lambda part: part + 32,
        "sparse_values": lambda part: part[:-1],
        "table": lambda part: part[:, :-1],
    }[broken](tensors[name]).contiguous()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(SquamataError, match=r"in_proj\.weight\.(sparse_rows|sparse_columns|table)"):
        read_checkpoint(tmp_path / "out")


def test_parts_made_after_a_restart_are_the_same() -> None:
    """The squares are gathered anew where a killed run goes on."""
    config = config_of("mamba2")
    source, batches = MemorySource(config, perturbed_tensors(config)), [random_ids(config, 2, 10)]
    recipe = recipe_of(*RULES, weights="squeezellm")
    with use_backend("ref"):
        whole, resumed = (QuantizedParts(source, recipe, batches) for _ in range(2))
        parts = [whole.make(number) for number in range(3)]
        resumed.restore(2, whole.streams())
        again = resumed.make(2)
    name = "layers.1.mixer.in_proj.weight"
    first, second = parts[2][name], again[name]
    assert isinstance(first, QTensor) and isinstance(second, QTensor)
    assert torch.equal(first.dequantize(), second.dequantize()) and whole.tables == {}


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_without_rounding_only_sparse_it_is_the_model(kind: str) -> None:
    """Half of the elements apart in float16, so few are left that the tables say them closely."""
    config = config_of(kind)
    tensors, ids = perturbed_tensors(config), random_ids(config, 2, 16)
    errors = []
    for sparse in (0.0, 0.5):
        rules = [rule | {"spec": TABLE | {"sparse": sparse}} for rule in RULES]
        checkpoint = quantized(config, tensors, recipe_of(*rules, weights="squeezellm"), [ids])
        errors.append(float((Model(checkpoint)(ids) - float_model(config, tensors)(ids)).square().mean()))
    assert errors[1] < 0.3 * errors[0]


@torch.no_grad()
def test_it_is_nearer_than_rounding_to_nearest_on_real_text(
    bundled_folder: Path, bundled_calibration: Path, tmp_path: Path
) -> None:
    """KL on text that it was not calibrated with, beside the same bits in groups of 128, in 4 and in 3 bits."""
    text = "".join(read_documents(bundled_folder / "excerpt.jsonl"))
    ids = torch.tensor([Tokenizer.read(bundled_folder).encode(text[:3000])[:384]])
    plain = load(bundled_folder)(ids)[0].log_softmax(-1)
    found = {}
    groups = {"bits": 3, "granularity": "group(128)", "full_range": True, "scale_dtype": "float16"}
    w3a16 = recipe_of(*(rule | {"spec": groups} for rule in RULES))
    for name, recipe in (("w4", "w4a16"), ("s4", "squeezellm-w4a16"), ("w3", w3a16), ("s3", "squeezellm-w3a16")):
        quantize(bundled_folder, recipe, tmp_path / name, bundled_calibration, samples=8, length=128)
        found[name] = float((plain.exp() * (plain - load(tmp_path / name)(ids)[0].log_softmax(-1))).sum(-1).mean())
    assert found["s4"] < 0.8 * found["w4"] and found["s3"] < 0.6 * found["w3"], found
    sizes = {name: bytes_by_part(load(tmp_path / name))["layers"] for name in ("s3", "s4")}
    tensors = open_source(bundled_folder).tensors()
    elements = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_proj.weight"))
    assert sizes["s4"] - sizes["s3"] > elements / 8  # three bits are stored as three, and half the table
