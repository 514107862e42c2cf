"""``squamata demo``: the whole story on the bundled model: float against W8A8 against W4A16."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squamata.cli.output import JsonFile, check_json, note, progress, say, size, table, write_json
from squamata.errors import SquamataError

if TYPE_CHECKING:
    from squamata.models.lm import LanguageModel

RECIPES = ("quamba-w8a8", "w4a16")
NOTE = "README.txt"
NOTE_TEXT = "Made by 'squamata demo', which replaces what is in this folder when it runs again.\n"
PROMPT = "The snake"
NEW_TOKENS = 40
TOKENS = 8192  # of the excerpt: enough to tell the recipes apart, few enough for a laptop
CALIBRATION = (48, 512)  # samples, tokens of each: the text that comes with the model holds no more
TIMED = (256, 64, 3)  # tokens of prompt, tokens generated, repeats
COLOURS = ("#5b6770", "#2a7f62", "#c8792b")


@dataclass(frozen=True)
class Row:
    """One model of the demo. ``kl`` and ``top1_agreement`` are None for the float model itself."""

    name: str
    bytes: dict[str, int]  # see evaluate.size.bytes_by_part
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    text: str


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for checkpoints and plot.")] = Path(
        "squamata-demo"
    ),
    json_file: JsonFile = None,
) -> None:
    """Quantize the bundled model in two ways and compare size, quality, speed and text; ends with a picture."""
    check_json(json_file)
    started = time.perf_counter()
    _make_folder(out)
    from squamata import pipeline

    samples, length = CALIBRATION
    for recipe in RECIPES:
        with progress(f"quantizing by {recipe}") as advance:
            pipeline.quantize(
                "bundled", recipe, out / recipe, None, samples, length, force=True, progress=advance, recoverable=False
            )
    reference = pipeline.load("bundled")
    rows = [_judge("float", reference, None)]
    rows += [_judge(recipe, pipeline.load(out / recipe), reference) for recipe in RECIPES]
    _show(rows)
    picture = out / "demo.png"
    plot(rows, picture)
    say(f"picture: {picture}    checkpoints: {', '.join(str(out / recipe) for recipe in RECIPES)}")
    note(f'{time.perf_counter() - started:.0f} s; next: squamata generate {out / RECIPES[0]} "Once upon a time"')
    content = {"models": [asdict(row) for row in rows], "picture": picture, "seconds": time.perf_counter() - started}
    write_json(json_file, content)


def _make_folder(out: Path) -> None:
    """The folder, with a note in it, without which nothing that is there is replaced."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not _is_ours(out / NOTE):
            raise SquamataError(f"{out} holds files already, and no demo made them; choose another --out")
        (out / NOTE).write_text(NOTE_TEXT)
    except OSError as error:
        raise SquamataError(f"cannot write to the folder {out}: {error.strerror}") from None


def _is_ours(note: Path) -> bool:
    return note.is_file() and note.read_bytes() == NOTE_TEXT.encode()


def _judge(name: str, model: LanguageModel, reference: LanguageModel | None) -> Row:
    from squamata import pipeline
    from squamata.evaluate.profile import profile
    from squamata.load.hub import bundled

    with progress(f"judging {name}") as advance:
        excerpt = bundled() / "excerpt.jsonl"
        judged = pipeline.evaluate(model, excerpt, reference, max_tokens=TOKENS, progress=advance)
    with progress(f"timing {name}") as advance:
        timed = profile(model, *TIMED[:2], repeats=TIMED[2], progress=advance)
    return Row(
        name=name,
        bytes=timed.bytes,
        perplexity=judged.perplexity,
        kl=judged.kl,
        top1_agreement=judged.top1_agreement,
        prefill_tokens_per_s=timed.prefill_tokens_per_s,
        decode_tokens_per_s=timed.decode_tokens_per_s,
        text=pipeline.generate(model, PROMPT, max_new_tokens=NEW_TOKENS, repetition_penalty=1.3).text,
    )


def _show(rows: list[Row]) -> None:
    table(
        f"the bundled model, mamba2-5m, on {TOKENS} tokens of articles it has never seen",
        (
            "<",
            "bytes",
            "of float",
            "layers\nof float",
            "perplexity",
            "KL to float",
            "same top\nword, %",
            "prefill\ntokens/s",
            "decode\ntokens/s",
        ),
        [
            (
                row.name,
                size(row.bytes["total"]),
                *(f"{row.bytes[part] / rows[0].bytes[part]:.2f}" for part in ("total", "layers")),
                f"{row.perplexity:.2f}",
                "" if row.kl is None else f"{row.kl:.4f}",
                "" if row.top1_agreement is None else f"{100 * row.top1_agreement:.1f}",
                f"{row.prefill_tokens_per_s:.0f}",
                f"{row.decode_tokens_per_s:.0f}",
            )
            for row in rows
        ],
    )
    said = [(row.name, " ".join(row.text.split())) for row in rows]
    table(f"how each goes on after '{PROMPT}'", ("<", "<"), said)


def plot(rows: list[Row], path: Path) -> None:
    """A PNG: bytes (layers, and paler the rest) beside what they cost in perplexity and in KL to the float model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, list[Any]]] = [
        ("size, MB (pale: embedding and head)", "{:.1f}", [row.bytes["total"] / 1e6 for row in rows]),
        ("perplexity, held-out articles", "{:.2f}", [row.perplexity for row in rows]),
        ("KL to float, nats a token", "{:.4f}", [row.kl or 0.0 for row in rows]),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 3.6), layout="constrained")
    for axis, (title, form, values) in zip(axes, panels, strict=True):
        bars = axis.bar([row.name for row in rows], values, color=COLOURS, width=0.65)
        axis.bar_label(bars, [form.format(value) if value else "itself" for value in values], padding=2)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_ylim(0, 1.15 * max(values))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False, labelleft=False, bottom=False)
    rest = [(row.bytes["total"] - row.bytes["layers"]) / 1e6 for row in rows]
    axes[0].bar([row.name for row in rows], rest, color="white", alpha=0.45, width=0.65)
    figure.suptitle("mamba2-5m (bundled): float, W8A8 and W4A16", x=0.01, ha="left", fontweight="bold")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SquamataError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
