"""Parts of a checkpoint that is being made: each is on disk when it is finished, so that a killed writer can go on.

In the writer's temporary folder: ``part-00003.safetensors`` (tensors as stored), ``state-4.safetensors`` (what the
maker needs to go on after four parts), ``progress.json`` (how many parts are finished, of which work). The last is
replaced last, so the three always agree. A large state is written only as often as takes a tenth of the time; what was
made since is then made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

PROGRESS = "progress.json"
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

    def recover(self) -> None:
        """Take over what an earlier writer of the same work finished; parts it did not finish are overwritten."""
        found = read_progress(self.folder)
        if found is not None and found["work"] == self.work:
            self.count, self.record = found["parts"], found["record"]
            self.saved = self.count

    def finish(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write one part, what is needed to go on after it, and that both are there. OSError and SafetensorError."""
        safetensors.torch.save_file(dict(tensors), self._part(self.count))
        self.count, self.record = self.count + 1, dict(record)
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
        (self.folder / PROGRESS).unlink(missing_ok=True)
        self._state(self.saved).unlink(missing_ok=True)
        for number in range(self.count):
            self._part(number).unlink()

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
