"""Every combination that can be asked for comes back: architecture, precision, embedding, head, grouping, quantizer."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny import config_of, perturbed_tensors, quantized, random_ids, recipe_of
from torch import Tensor

from squamata.models.checkpoint import Checkpoint
from squamata.models.lm import Cache
from squamata.quantize import QUANTIZERS
from squamata.run.model import Model
from squamata.save.write import write_checkpoint
from squamata.spec.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
Rules = list[dict[str, Any]]

W4_GROUPS = {"bits": 4, "granularity": "group(16)", "full_range": True, "scale_dtype": "float16"}
W4: Rules = [{"site": f"*.{name}_proj.weight", "spec": W4_GROUPS} for name in ("in", "x", "out")]
A4: Rules = [{"site": f"*.mixer.{name}", "spec": {"bits": 4}} for name in ("in", "u", "out")]
PRECISIONS: dict[str, tuple[str, Rules]] = {
    "w8a8": ("quamba-w8a8", []),
    "w4a8": ("quamba-w8a8", W4),
    "w4a16": ("w4a16", W4),
    "w4a4": ("quamba-w8a8", W4 + A4),
}
RUNS = ("first", "second")
TABLES = ("float", 8, 4)  # bits of the embedding, bits of the head
GROUPED: Rules = [
    {"site": "*.mixer.u", "spec": {"bits": 8, "granularity": "index"}, "architectures": ["mamba2"]},
    {"site": "*.mixer.state", "spec": {"bits": 8, "granularity": "index,state"}, "architectures": ["mamba2"]},
    {"site": "*.mixer.[BC]_conv", "spec": {"bits": 8, "granularity": "ssd_group"}},
]
COMBINATIONS = [
    combination
    for combination in itertools.product(
        ("mamba1", "mamba2"), PRECISIONS, TABLES, TABLES, ("none", "reorder"), QUANTIZERS
    )
    if combination[-1] not in ("adaround", "squeezellm")
    or combination[2:5] == (8, 4, "reorder")  # one learns: slow; the other's tables: tests/quantize/test_squeezellm.py
]
QUICK: dict[str, object] = {"adaround": {"adaround": {"steps": 3}}}  # what is learned does not matter here


def recipe_for(precision: str, embedding: Any, head: Any, grouping: str, quantizer: str) -> Recipe:
    parent, rules = PRECISIONS[precision]
    rules = list(rules)
    for site, bits in (("embedding.weight", embedding), ("head.weight", head)):
        rules.append({"site": site, "spec": bits if bits == "float" else {"bits": bits, "granularity": "channel"}})
    activations = head != "float" and precision != "w4a16"
    rules.append({"site": "head.in", "spec": {"bits": 8} if activations else "float"})
    transforms: list[Any] = [] if precision == "w4a16" else ["hadamard"]
    if grouping == "reorder":
        transforms = [{"reorder": {"head_groups": 2, "channel_groups": 3}}, *transforms]
        rules += GROUPED if precision != "w4a16" else []
    return recipe_of(*rules, extends=parent, transforms=transforms, weights=QUICK.get(quantizer, quantizer))


def checkpoint_for(kind: str, *choice: Any) -> Checkpoint:
    config = config_of(kind, blocks=(kind,), vocab_size=37)
    return quantized(config, perturbed_tensors(config), recipe_for(*choice), [random_ids(config, 2, 12)])


@torch.no_grad()
def logits_of(model: Model) -> Tensor:
    """A prefill of five tokens and one token after it, by whatever runs them unless told otherwise; (2, V)."""
    cache: Cache = model.new_cache()
    first = model.forward(torch.tensor([[1, 5, 2, 30, 7]]), cache, last_only=True)
    return torch.cat([first[0], model.step(torch.tensor([9]), cache)])


def test_every_combination_comes_back_in_a_new_process_and_twice_the_same(tmp_path: Path) -> None:
    expected = {}
    for combination in COMBINATIONS:
        name = "-".join(map(str, combination))
        checkpoint = checkpoint_for(*combination)
        write_checkpoint(checkpoint, tmp_path / "first" / name)
        write_checkpoint(checkpoint_for(*combination), tmp_path / "second" / name)
        one, two = ({path.name: path.read_bytes() for path in (tmp_path / run / name).iterdir()} for run in RUNS)
        assert one == two, name
        expected[name] = logits_of(Model(checkpoint))
        assert bool(expected[name].isfinite().all()), name
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "load"), str(ROOT / "tests" / "save")]!r}
import safetensors.torch, torch
torch.set_num_threads(1)
from pathlib import Path
import squamata
from test_combinations import logits_of
found = {{path.name: logits_of(squamata.load(path)) for path in Path({str(tmp_path / "first")!r}).iterdir()}}
safetensors.torch.save_file(found, {str(tmp_path / "found.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    found = safetensors.torch.load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys() and len(found) == len(COMBINATIONS)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
