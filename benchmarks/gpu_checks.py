"""Real models on a GPU against simulation on the CPU: what ``gpu.py`` makes sure of before it times anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squamata import pipeline
from squamata.errors import SquamataError
from squamata.kernels import ops
from squamata.kernels.decode.triton import Mamba1Layer, Mamba2Layer
from squamata.kernels.dispatch import use_backend
from squamata.kernels.qtensor import QTensor
from squamata.load.hub import bundled
from squamata.models.block import ScanCache
from squamata.models.lm import LanguageModel
from squamata.run.graphs import CapturedDecoder
from squamata.save.read import read_checkpoint

PROMPT, NEW = 64, 32  # of the greedy check
# Relative error of logits while the tokens agree, times the reference's own: stepwise against parallel, in this run.
# A code that rounds the other way is carried on through all layers, in the reference as on the GPU.
NOISE_FACTOR, LEAST_TOLERANCE = 2.0, 1e-5
LAYER_TOKENS = 4
MOST_DIFFERING = 2e-3  # of the codes that layers leave, each fed with the reference's inputs: ties, by one step


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def greedy_check(recipe: str, folder: Path, source: Path) -> dict[str, Any]:
    """A real model, quantized: simulation on the CPU against the GPU's prefill and decode."""
    with use_backend("ref"), torch.no_grad():
        if recipe == "float":
            simulated = LanguageModel(pipeline.load(source).checkpoint)
        else:
            out = folder / f"{source.name}-{recipe}"
            pipeline.quantize(source, recipe, out, bundled() / "calibration.jsonl", samples=8, length=128)
            simulated = LanguageModel(read_checkpoint(out), "simulate")
        prompt = torch.randint(1, 8000, (1, PROMPT), generator=torch.Generator().manual_seed(3))
        cache = simulated.new_cache(1)
        logits = [simulated.forward(prompt, cache, last_only=True)[0, -1]]
        for _ in range(NEW):
            logits.append(simulated.step(logits[-1].argmax()[None], cache)[0])
        taken = torch.stack([each.argmax() for each in logits[:-1]])[None]
        parallel = simulated.forward(torch.cat([prompt, taken], 1), simulated.new_cache(1))[0, PROMPT - 1 :]
        noise = max(relative(a, b) for a, b in zip(parallel, logits, strict=True))
    model = LanguageModel(simulated.checkpoint)
    decoder = CapturedDecoder(model, 1, weights="float32")
    ours = [decoder.prefill(prompt.cuda())[0].cpu().clone()]
    ours += [decoder.step()[0].cpu().clone() for _ in range(NEW)]
    tokens = [(int(a.argmax()), int(b.argmax())) for a, b in zip(ours, logits, strict=True)]
    equal = next((at for at, (a, b) in enumerate(tokens) if a != b), NEW + 1)
    errors = [relative(a, b) for a, b in zip(ours, logits, strict=True)][: max(equal, 1)]
    found = {"model": source.name, "recipe": recipe, "first_error": errors[0], "worst_error": max(errors),
             "reference_noise": noise, "equal": equal, "of": NEW + 1} | layer_check(model)  # fmt: skip
    within = max(errors) <= max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
    if not (within and found["differing"] <= MOST_DIFFERING * max(1, found["codes"]) and found["most_apart"] <= 1):
        raise SquamataError(f"the check on a real model failed: {found}")
    return found


@torch.no_grad()
def layer_check(model: LanguageModel) -> dict[str, Any]:
    """Every layer's decode kernels, each fed with the reference's inputs and state: codes of the convolution's input
    and of the state that differ, by how much at most, and the worst relative error of a layer's output."""
    decoder = CapturedDecoder(model, 1, weights="float32", pdl=False)
    buffers, cache = decoder.plan.buffers, model.new_cache(1)
    found = {"codes": 0, "differing": 0, "most_apart": 0, "layer_error": 0.0}
    ids = torch.randint(1, 8000, (LAYER_TOKENS, 1), generator=torch.Generator().manual_seed(4))
    for token in ids:
        with use_backend("ref"):
            h, residual = ops.embedding(token[:, None], model.embedding, torch.float32), None
        for index, (block, layer) in enumerate(zip(model.blocks, decoder.plan.layers, strict=True)):
            before = h[:, 0] if residual is None else h[:, 0] + residual[:, 0]
            decoder.plan.begin(index, before)
            with use_backend("ref"):
                h, residual = block.forward(h, residual, cache[index])
            for _, launch in decoder.plan.layer(index):
                launch()
            found["layer_error"] = max(found["layer_error"], relative(buffers.h.cpu() - before, h[:, 0]))
            given = cache[index]
            assert isinstance(given, ScanCache)
            slot = int(buffers.position) % layer.state.ring.shape[0]
            for ours, theirs in ((layer.state.ring[slot], given.conv), (layer.state.state, given.state)):
                if isinstance(theirs, QTensor):
                    wanted = theirs.data[..., -1] if theirs is given.conv else theirs.data
                    apart = (ours.cpu().int().reshape(-1) - wanted.int().reshape(-1)).abs()
                    found["codes"] += apart.numel()
                    found["differing"] += int((apart > 0).sum())
                    found["most_apart"] = max(found["most_apart"], int(apart.max()))
            take_state(layer, slot, given)
        buffers.position += 1
    return found


def take_state(layer: Mamba1Layer | Mamba2Layer, slot: int, given: ScanCache) -> None:
    """The reference's newest input of the convolution and its state, for the next token."""
    conv, state = ((part.data if isinstance(part, QTensor) else part) for part in (given.conv, given.state))
    layer.state.ring[slot].copy_(conv[..., -1].reshape(layer.state.ring[slot].shape))
    layer.state.state.copy_(state.reshape(layer.state.state.shape))
    if layer.scan.grid is not None and layer.scan.grid.span > 0 and isinstance(given.state, QTensor):
        layer.scan.grid.scale.copy_(given.state.scale.reshape(-1))
