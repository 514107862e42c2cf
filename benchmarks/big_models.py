"""Memory and time of quantizing a model that is larger than the memory it may use.

    python benchmarks/big_models.py --shape mamba2-2.7b --recipe quamba-w4a8 --samples 4 --length 128 --folder FOLDER

Writes a float16 checkpoint of random weights in the exact shape (once, sharded, state-spaces layout; it stays in
FOLDER), quantizes it with the command line in a process of its own, kills that after ``--kill`` layers if asked and
goes on with --resume, and prints peak memory (resident set, mapped file pages included) and seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from squamata.load.hub import bundled
from squamata.load.layouts import foreign_name, foreign_shape
from squamata.load.random_model import random_tensors
from squamata.models.config import SHAPES, ModelConfig

LAYERS_A_SHARD = 8


def write_source(folder: Path, config: ModelConfig) -> None:
    """Random float16 weights, a few layers a shard, with the bundled tokenizer (its ids fit any vocabulary)."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    prefixes = ["embedding.", *(f"layers.{layer}." for layer in range(config.n_layers)), "final_norm.", "head."]
    groups = [prefixes[start : start + LAYERS_A_SHARD] for start in range(0, len(prefixes), LAYERS_A_SHARD)]
    for number, group in enumerate(groups):
        shard = {}
        for prefix in group:
            for name, tensor in random_tensors(config, dtype=torch.float16, prefix=prefix).items():
                shape = foreign_shape(name, tuple(tensor.shape))
                shard[foreign_name(name, config, ())] = tensor.reshape(shape).half()
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ssm: dict[str, object] = {"layer": "Mamba1"}
    if config.architecture == "mamba2":
        ssm = {"layer": "Mamba2", "ngroups": config.n_groups, "d_state": config.d_state, "headdim": config.head_dim}
    described = {
        "d_model": config.d_model, "n_layer": config.n_layers, "vocab_size": config.vocab_size, "ssm_cfg": ssm,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    for path in bundled().glob("*token*.json"):
        shutil.copyfile(path, folder / path.name)


def kill_after(process: subprocess.Popen[bytes], parent: Path, parts: int) -> None:
    """SIGKILL as soon as so many parts are finished."""
    while process.poll() is None:
        for progress in parent.glob(".out.partial-*/progress.json"):
            if json.loads(progress.read_text())["parts"] >= parts:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mamba2-2.7b", choices=sorted(SHAPES))
    parser.add_argument("--recipe", default="quamba-w4a8")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kill", type=int, default=0, help="kill after so many parts, then go on with --resume")
    arguments = parser.parse_args()
    source = arguments.folder / arguments.shape
    if not source.is_dir():
        write_source(source, SHAPES[arguments.shape])
    out, report = arguments.folder / "out", arguments.folder / "report.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "squamata", "quantize", str(source), "--recipe", arguments.recipe, "--out", str(out),
        "--calibration", str(bundled() / "calibration.jsonl"), "--samples", str(arguments.samples),
        "--length", str(arguments.length), "--json", str(report),
    ]  # fmt: skip
    if arguments.kill:
        kill_after(subprocess.Popen(command), arguments.folder, arguments.kill)
        command.append("--resume")
    subprocess.run(command, check=True)
    result = json.loads(report.read_text())
    print(
        f"{arguments.shape} {arguments.recipe}: {result['bytes_float'] / 1e9:.2f} GB -> "
        f"{result['bytes_quantized'] / 1e9:.2f} GB, peak {result['peak_rss_bytes'] / 2**30:.2f} GiB, "
        f"{result['seconds']:.0f} s, calibration {result['calibration'].get('tokens', 0)} tokens"
    )


if __name__ == "__main__":
    main()
