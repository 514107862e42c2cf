"""``squamata profile``: bytes by part, TTFT, TPOT, TTLT, and the share of what memory bandwidth allows."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from squamata.cli.output import Device, JsonFile, check_json, counted, progress, size, table, write_json
from squamata.errors import SquamataError

if TYPE_CHECKING:
    from squamata.cli.gpu_profile import GpuProfile
    from squamata.evaluate.profile import Profile, Speed
    from squamata.models.lm import LanguageModel


def profile(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder, hub name, or 'bundled'.")] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: random weights, mamba-130m ... mamba2-2.7b.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Quantize --shape by it, in memory.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens to prefill.")] = 512,
    generate: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    repeats: Annotated[
        int | None, typer.Option(help="Times are the median and the spread of so many.", show_default="5; cuda: 60")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch and of the compiled kernels, on a CPU.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure size and speed. The fast kernels are checked against the reference before anything is timed."""
    check_json(json_file)
    if (model is None) == (shape is None):
        raise SquamataError("give either a MODEL or --shape NAME")
    if recipe is not None and shape is None:
        raise SquamataError("--recipe goes with --shape; a checkpoint has its own (squamata quantize makes one)")
    if threads is not None and device is Device.cuda:
        raise SquamataError("--threads is of a CPU: leave it out with --device cuda")
    from squamata.run.device import check_device

    check_device(device.value)
    name = model or f"{shape}, random weights"
    about = {"model": model, "shape": shape, "device": device.value}
    if device is Device.cuda:
        from squamata.cli.gpu_profile import profile_gpu

        loaded = _loaded_for_gpu(model, shape, recipe or "float")
        with progress("timing") as advance:
            on_gpu = profile_gpu(loaded, prompt, generate, batch, 60 if repeats is None else repeats, advance)
        _show_gpu(name, loaded.checkpoint.recipe.name, on_gpu)
        content = on_gpu.to_dict() | {"agreement": asdict(on_gpu.agreement)}
    else:
        from squamata.evaluate.profile import profile as measure
        from squamata.evaluate.profile import threads as using_threads

        with using_threads(threads):
            loaded = _loaded(model, shape, recipe or "float")
            with progress("timing") as advance:
                result = measure(loaded, prompt, generate, batch, 5 if repeats is None else repeats, advance)
        _show(name, loaded.checkpoint.recipe.name, result)
        content = result.to_dict() | {"agreement": asdict(result.agreement)}
    write_json(json_file, content | about | {"recipe": loaded.checkpoint.recipe.name})


def _loaded_for_gpu(model: str | None, shape_name: str | None, recipe: str) -> LanguageModel:
    """A checkpoint, or a shape with random codes made on the GPU itself."""
    if model is not None:
        return _loaded(model, None, recipe)
    import torch

    from squamata.cli.random_codes import random_checkpoint
    from squamata.models.config import shape
    from squamata.models.lm import LanguageModel
    from squamata.spec.recipe import Recipe

    assert shape_name is not None
    return LanguageModel(random_checkpoint(shape(shape_name), Recipe.read(recipe), "cuda"), dtype=torch.bfloat16)


def _loaded(model: str | None, shape: str | None, recipe: str) -> LanguageModel:
    from squamata import pipeline

    if model is not None:
        return pipeline.load(model)
    assert shape is not None
    with progress(f"making {shape}, {recipe}") as advance:
        return pipeline.random_model(shape, recipe, advance)


def _show(name: str, recipe: str, result: Profile) -> None:
    parts = ("embedding", "layers", "head", "sites", "total", "cache")
    table(f"{name}, {recipe}", parts, [[size(result.bytes[part]) for part in parts]])
    _show_times(f"threads {result.threads}", result, ("median", "min", "max"), digits=2)
    table(
        "",
        ("<", "", "<"),
        [
            ("prefill", f"{result.prefill_tokens_per_s:.1f}", "tokens/s"),
            ("decode", f"{result.decode_tokens_per_s:.1f}", "tokens/s"),
            ("weights read a token", size(result.weight_bytes_per_token), ""),
            ("memory read", f"{result.dram_read_bytes_per_s / 1e9:.1f}", "GB/s, measured"),
            ("floor of a token", f"{result.floor_ms:.2f}", f"ms, {100 * result.floor_share:.0f} % of TPOT"),
            ("memory while timed", size(result.rss_bytes), f"peak of the process {size(result.peak_rss_bytes)}"),
            (
                "against the reference",
                f"{result.agreement.layer_error:.1e}",
                f"relative error of a layer; of a token {result.agreement.token_error:.1e}",
            ),
        ],
    )


def _show_times(on: str, result: Speed, parts: tuple[str, ...], digits: int) -> None:
    """TTFT, TPOT and TTLT, with the parts of their spread that are known."""
    times = (("TTFT, ms", result.ttft_ms), ("TPOT, ms", result.tpot_ms), ("TTLT, ms", result.ttlt_ms))
    table(
        f"{on}: {counted(result.prompt, 'token')} of prompt, {result.generate} generated, batch {result.batch}, "
        f"{counted(result.repeats, 'repeat')}",
        ("<", *parts),
        [
            [label, *(f"{spread[part]:.{digits}f}" if part in spread else "" for part in parts)]
            for label, spread in times
        ],
    )


def _show_gpu(name: str, recipe: str, result: GpuProfile) -> None:
    _show_times(f"{name}, {recipe}, {result.gpu}", result, ("median", "p10", "p90"), digits=3)
    table(
        "",
        ("<", "", "<"),
        [
            ("prefill", f"{result.prefill_tokens_per_s:.0f}", "tokens/s"),
            ("decode", f"{result.decode_tokens_per_s:.0f}", "tokens/s"),
            ("moved a token", size(result.bytes_per_step), f"at {result.achieved_bytes_per_s * 1e-12:.2f} TB/s"),
            ("device copy", f"{result.copy_bytes_per_s * 1e-12:.2f}", "TB/s, read and written"),
            ("floor of a token", f"{result.floor_ms:.3f}", f"ms, {100 * result.floor_share:.0f} % of TPOT"),
            ("peak GPU memory", size(result.peak_gpu_bytes), ""),
            (
                "against the reference",
                f"{result.agreement.error:.1e}",
                f"relative error of logits; as timed {result.agreement.fast_error:.1e} against that",
            ),
        ],
    )
    for phase, kernels in result.kernels.items():
        total = sum(entry["launches"] * entry["microseconds"] for entry in kernels.values())
        found = sorted(kernels.items(), key=lambda entry: -entry[1]["launches"] * entry[1]["microseconds"])
        lines = [
            [kernel, f"{entry['launches']:.0f}", f"{entry['microseconds']:.2f}",
             f"{entry['launches'] * entry['microseconds'] / 1e3:.3f}",
             f"{100 * entry['launches'] * entry['microseconds'] / total:.0f}"]
            for kernel, entry in found
        ]  # fmt: skip
        table(f"kernels of one {phase}, back to back", ("<kernel", "launches", "us each", "ms", "%"), lines)
