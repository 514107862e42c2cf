"""Parts of a checkpoint that is being made: each is on disk when it is finished, so that a killed writer can go on.

In the writer's temporary folder: ``part-00003.safetensors`` (tensors as stored), ``state-4.safetensors`` (what the
maker needs to go on after four parts), ``progress.json`` (how many parts are finished, of which work). The last is
replaced last, so the three always agree. A large state is written only as often as takes a tenth of the time; what was
made since is then made again. Anything else that a killed writer left in the folder (the drafts of safetensors, shards
that were being joined) is removed when its parts are taken over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PROGRESS = "progress.json"
LOCK = ".lock"  # held by the writer of the folder while it lives
SMALL_STATE = 2**28  # bytes that are always worth writing
SHARE = 0.1  # of the time that may go into writing larger ones


class PartFiles:
    """The parts in one folder. ``work``: fingerprint of everything that decides the result."""

    def __init__(self, folder: Path, work: str) -> None:
        self.folder = folder
        self.work = work
        self.count = 0
        self.record: dict[str, Any] = {}
        self.saved = 0  # parts after which the newest state was written
        self.cost = 0.0  # seconds that this took
        self.since = time.monotonic()

    def recover(self) -> bool:
        """Take over what an earlier writer of the same work finished, and remove what it did not.

        False, and nothing is touched, if the files are not what ``progress.json`` says (a power cut, a hand).
        """
        found = read_progress(self.folder)
        if found is None or found["work"] != self.work:
            return True
        count = found["parts"]
        state = self._state(count)
        kept = [*map(self._part, range(count)), *([state] if state.is_file() else [])]
        if not all(map(_is_whole, kept)):
            return False
        self.count = self.saved = count
        self.record = found["record"]
        for path in self.folder.iterdir():
            if path not in kept and path.name not in (PROGRESS, LOCK):
                path.unlink()
        return True

    def finish(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor] | None, record: Mapping[str, Any]
    ) -> None:
        """Write one part, what is needed to go on after it, and that both are there. OSError and SafetensorError.

        ``state`` None: nobody will go on after it, so neither is written.
        """
        safetensors.torch.save_file(dict(tensors), self._part(self.count))
        self.count, self.record = self.count + 1, dict(record)
        if state is None:
            return
        size = sum(tensor.nbytes for tensor in state.values())
        started = time.monotonic()
        if size > SMALL_STATE and SHARE * (started - self.since) < self.cost:
            return
        if state:
            safetensors.torch.save_file(
                {name: part.contiguous() for name, part in state.items()}, self._state(self.count)
            )
        draft = self.folder / f"{PROGRESS}.new"
        draft.write_text(json.dumps({"work": self.work, "parts": self.count, "record": self.record}))
        draft.rename(self.folder / PROGRESS)
        self._state(self.saved).unlink(missing_ok=True)
        self.since = time.monotonic()
        self.saved, self.cost = self.count, self.since - started

    def state(self) -> dict[str, Tensor]:
        """What the last finished part left to go on with."""
        path = self._state(self.saved)
        return safetensors.torch.load_file(path) if path.is_file() else {}

    def each(self) -> Iterator[dict[str, Tensor]]:
        """Every part's tensors in order."""
        return (safetensors.torch.load_file(self._part(number)) for number in range(self.count))

    def clear(self) -> None:
        """Remove all of it, when the parts have become something else."""
        for path in self.files():
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Every file of the parts, ``progress.json`` first: what is removed after it is not missed."""
        return [self.folder / PROGRESS, self._state(self.saved), *map(self._part, range(self.count))]

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.safetensors"

    def _state(self, parts: int) -> Path:
        return self.folder / f"state-{parts}.safetensors"


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What ``progress.json`` of a temporary folder says, or None if there is none to be read."""
    try:
        found = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"work", "parts", "record"} else None


def _is_whole(path: Path) -> bool:
    """Whether a file of tensors is there, as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
