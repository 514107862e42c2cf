"""``squamata generate`` and ``squamata chat``."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import squamata

PROMPT = "The snake"


def test_generate_streams_what_the_function_returns(
    command: Callable[..., Any], succeed: Callable[..., dict[str, Any]], shipped: Callable[[str, str], Path]
) -> None:
    folder = shipped("mamba2", "w4a16")
    sampled = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    flags = [part for name, value in sampled.items() for part in (f"--{name.replace('_', '-')}", value)]
    expected = squamata.generate(squamata.load(folder), PROMPT, **sampled)
    found = succeed("generate", folder, PROMPT, *flags)
    assert (found["text"], tuple(found["ids"])) == (expected.text, expected.ids)
    assert (found["prompt"], found["prompt_tokens"], found["new_tokens"]) == (PROMPT, expected.prompt_tokens, 6)
    assert found["stopped_by"] == "length" and found["ttft_ms"] > 0 and found["tpot_ms"] > 0
    assert found["recipe"] == "w4a16"
    outcome = command("generate", folder, PROMPT, *flags)
    assert outcome.out == f"{PROMPT}{expected.text}\n"
    assert "6 new, stopped by length" in outcome.err


def test_generate_stops_before_a_stop_string(succeed: Callable[..., dict[str, Any]]) -> None:
    whole = succeed("generate", "bundled", PROMPT, "--max-new-tokens", 8)["text"]
    stop = whole[len(whole) // 2 :][:3]
    found = succeed("generate", "bundled", PROMPT, "--max-new-tokens", 8, "--stop", stop, "--stop", "@@@")
    assert found["text"] == whole[: whole.index(stop)] and found["stopped_by"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("./nowhere", "x"), "no such folder"),
        (("bundled", "x", "--temperature", "-1"), "temperature"),
        (("bundled", "x", "--top-p", "0"), "top-p"),
        (("bundled", "x", "--max-new-tokens", "0"), "max-new-tokens"),
    ],
)
def test_generate_refuses(refuse: Callable[..., str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refuse("generate", *arguments)


def test_generate_shows_nothing_of_a_prompt_that_it_cannot_read(
    command: Callable[..., Any], bundled_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "speechless"
    shutil.copytree(bundled_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    outcome = command("generate", folder, PROMPT)
    assert outcome.status == 2 and outcome.out == "" and "tokenizer.json" in outcome.err


def test_chat_keeps_the_state_until_it_is_reset(
    succeed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [PROMPT, "", "/reset", PROMPT, "/what", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    options = ("--max-new-tokens", 4, "--temperature", 0, "--repetition-penalty", 1)
    found = succeed("chat", "bundled", *options)
    (first, more, again) = found["turns"]
    assert [turn["said"] for turn in found["turns"]] == [PROMPT, "", PROMPT]
    assert again["reply"] == first["reply"]
    model = squamata.load("bundled")
    assert first["reply"] + more["reply"] == squamata.generate(model, PROMPT, max_new_tokens=8).text
    assert found["tokens"] == len(model.tokenizer.encode(PROMPT)) + 4


def test_a_prompt_that_is_not_text_is_one_line(refuse: Callable[..., str]) -> None:
    """What Python makes of an argument whose bytes are not UTF-8."""
    assert "not UTF-8" in refuse("generate", "bundled", "caf\udce9")


def test_ctrl_c_ends_a_conversation_and_its_json_is_kept(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = iter([PROMPT])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    outcome = command("chat", "bundled", "--max-new-tokens", 2, "--json", tmp_path / "turns.json")
    assert outcome.status == 130
    assert [turn["said"] for turn in json.loads((tmp_path / "turns.json").read_text())["turns"]] == [PROMPT]


def test_chat_ends_with_its_input(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in (io.StringIO(""), None):
        monkeypatch.setattr("sys.stdin", nothing)
        assert command("chat", "bundled").status == 0
