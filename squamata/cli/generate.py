"""``squamata generate``: text, as it comes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from squamata.cli.output import Device, JsonFile, check_json, counted, emit, note, stdout, write_json

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel
    from squamata.run import Generation, Piece, SamplingOptions

Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws from the model's distribution.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this share of the mass.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens already used become less likely.")]
Seed = Annotated[int, typer.Option(help="Of the draws: the same seed, the same text.")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, or 'bundled'.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given several times.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    json_file: JsonFile = None,
) -> None:
    """Continue a prompt; the text streams as it is made."""
    check_json(json_file)
    from squamata import pipeline
    from squamata.run import SamplingOptions
    from squamata.run.device import check_device

    check_device(device.value)
    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, tuple(stop or ()))
    loaded = pipeline.load(model)
    result = stream(loaded, prompt, options, device.value)
    pace = "" if result.tpot_ms is None else f", then {1e3 / result.tpot_ms:.1f} tokens/s{_compiled(device)}"
    note(
        f"{counted(result.prompt_tokens, 'prompt token')}, {result.new_tokens} new, stopped by {result.stopped_by}; "
        f"first token after {result.ttft_ms:.0f} ms{pace}"
    )
    write_json(
        json_file, result.to_dict() | {"model": model, "recipe": loaded.checkpoint.recipe.name, "device": device.value}
    )


def _compiled(device: Device) -> str:
    """Says that a time is no measure of speed, if kernels were compiled meanwhile."""
    if device is not Device.cpu:
        return ""
    from squamata.kernels.compilation import announce_compilation

    return ", compiling kernels included" if announce_compilation().announced else ""


def stream(model: LanguageModel, prompt: str, options: SamplingOptions, device: str = "cpu") -> Generation:
    """Print prompt and continuation as they come."""
    from squamata.run import generate
    from squamata.run.generate import prompt_ids

    prompt_ids(model, prompt)  # what is wrong with it is said before it is printed

    def show(piece: Piece) -> None:
        emit(piece.text, end="")

    console = stdout()
    bold = console.is_terminal and not console.is_dumb_terminal
    emit(f"\033[1m{prompt}\033[0m" if bold else prompt, end="")
    result = generate(model, prompt, show, device, **asdict(options))
    emit("")
    return result
