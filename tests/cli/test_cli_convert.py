"""``squamata convert``, and what the other verbs make of a folder of another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron_writer import megatron_content, write_megatron
from quamba_writer import write_quamba
from test_quamba import made
from test_sentencepiece import trained
from tiny import config_of, perturbed_tensors

import squamata
from squamata.pipeline import load


def test_megatron_with_its_tokenizer(
    succeed: Callable[..., dict[str, Any]], refuse: Callable[..., str], tmp_path: Path, bundled_calibration: Path
) -> None:
    config = config_of("mamba2", vocab_size=1024, n_groups=2, d_state=128, tie_embeddings=False)
    write_megatron(tmp_path / "given", megatron_content(config, perturbed_tensors(config)))
    trained(tmp_path / "given", "mt_nlg_256k", model_type="bpe", byte_fallback=True)
    arguments = ("--recipe", "w8a8", "--calibration", bundled_calibration, "--out", tmp_path / "no")
    assert "'squamata convert' makes a folder" in refuse("quantize", tmp_path / "given", *arguments)
    found = succeed("convert", tmp_path / "given", "--out", tmp_path / "ours")
    assert found["layout"] == "Megatron" and found["tokenizer"] == "converted from mt_nlg_256k.model"
    assert found["bytes"] == sum(tensor.nbytes for tensor in perturbed_tensors(config).values())
    out = tmp_path / "quantized"
    small = ("--samples", 2, "--length", 16)
    succeed("quantize", tmp_path / "ours", *arguments[:4], *small, "--out", out)
    tokenizer = load(out).tokenizer
    assert tokenizer.decode(tokenizer.encode("The snake", begin=False)) == "The snake"
    assert "exists already" in refuse("convert", tmp_path / "given", "--out", tmp_path / "ours")
    assert succeed("convert", tmp_path / "given", "--out", tmp_path / "ours", "--force")["bytes"] == found["bytes"]
    assert "is a Squamata checkpoint already" in refuse("convert", out, "--out", tmp_path / "no")
    assert "no such folder" in refuse("convert", tmp_path / "nothing/", "--out", tmp_path / "no")


@torch.no_grad()
def test_quamba_checkpoints(
    command: Callable[..., Any], succeed: Callable[..., dict[str, Any]], refuse: Callable[..., str], tmp_path: Path
) -> None:
    """Converted, the model is the same to the last bit; inspect reads either; quantize refuses."""
    write_quamba(tmp_path / "given", made("mamba2", "W4A8"), "W4A8")
    found = succeed("convert", tmp_path / "given", "--out", tmp_path / "ours")
    assert (found["layout"], found["recipe"]) == ("Quamba", "quamba2-w4a8-upstream")
    ids = torch.arange(10)[None]
    first, second = squamata.load(tmp_path / "given"), squamata.load(tmp_path / "ours")
    assert torch.equal(first(ids), second(ids))
    assert second.checkpoint.provenance["converted_from"] == "Quamba W4A8QMamba2"
    for folder in ("given", "ours"):
        outcome = command("inspect", tmp_path / folder)
        assert outcome.status == 0 and "converted from Quamba W4A8QMamba2" in outcome.out, outcome
        rows = {row["site"]: row for row in succeed("inspect", tmp_path / folder)["sites"]}
        assert rows["layers.0.mixer.in_proj.weight"]["granularity"] == "group(128)"
    differing = succeed("inspect", tmp_path / "given", "--against", tmp_path / "ours")["differences"]
    assert differing == []
    assert "quantized already" in refuse("quantize", tmp_path / "given", "-r", "w4a16", "--out", tmp_path / "no")
