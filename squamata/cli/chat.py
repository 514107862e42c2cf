"""``squamata chat``: a small read-eval-print loop that keeps the state between turns."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from squamata.cli.generate import Penalty, Seed, Temperature, TopK, TopP
from squamata.cli.output import JsonFile, check_json, emit, note, write_json

if TYPE_CHECKING:
    from squamata.run import Chat

HELP = "write, and the model goes on; an empty line lets it go on; /reset forgets everything, /quit ends"


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, or 'bundled'.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a reply may have.")] = 64,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Write a text together with a model: its state is kept, so a turn costs only its own tokens."""
    check_json(json_file)
    from squamata import pipeline
    from squamata.run import Chat

    conversation = Chat(
        pipeline.load(model),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # arrow keys and history for input()
    note(HELP)
    turns: list[dict[str, str]] = []
    try:
        while (line := _read()) is not None and line.strip() != "/quit":
            if line.strip() == "/reset":
                conversation.reset()
                note("forgotten")
            elif line.startswith("/"):
                note(HELP)
            elif line or conversation.tokens:
                turns.append({"said": line, "reply": _reply(conversation, line)})
    finally:  # Ctrl-C ends a conversation too
        write_json(json_file, {"model": model, "turns": turns, "tokens": conversation.tokens})


def _read() -> str | None:
    """A line of the user's, or None at the end of the input. A prompt only where somebody sees it."""
    if sys.stdin is None:  # closed by whoever started this
        return None
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _reply(conversation: Chat, line: str) -> str:
    """Stream a reply; Ctrl-C ends it, not the conversation."""
    text = ""
    try:
        for piece in conversation.say(f"\n{line}" if conversation.tokens and line else line):
            emit(piece, end="")
            text += piece
    except KeyboardInterrupt:
        pass
    emit("")
    return text
