"""Parts of a checkpoint that is being made: each is on disk when it is finished, so that a killed writer can go on.

In the writer's temporary folder: ``part-00003.safetensors`` (tensors as stored), ``state-4.safetensors`` (what the
maker needs to go on after four parts), ``progress.json`` (how many parts are finished, of which work). The last is
replaced last, so the three always agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

PROGRESS = "progress.json"


class PartFiles:
    """The parts in one folder. ``work``: fingerprint of everything that decides the result."""

    def __init__(self, folder: Path, work: str) -> None:
        self.folder = folder
        self.work = work
        self.count = 0
        self.record: dict[str, Any] = {}

    def recover(self) -> None:
        """Take over what an earlier writer of the same work finished; parts it did not finish are overwritten."""
        found = read_progress(self.folder)
        if found is not None and found["work"] == self.work:
            self.count, self.record = found["parts"], found["record"]

    def finish(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write one part, what is needed to go on after it, and that both are there. OSError and SafetensorError."""
        safetensors.torch.save_file(dict(tensors), self._part(self.count))
        old, new = self._state(self.count), self._state(self.count + 1)
        if state:
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, new)
        draft = self.folder / f"{PROGRESS}.new"
        draft.write_text(json.dumps({"work": self.work, "parts": self.count + 1, "record": dict(record)}))
        draft.rename(self.folder / PROGRESS)
        old.unlink(missing_ok=True)
        self.count, self.record = self.count + 1, dict(record)

    def state(self) -> dict[str, Tensor]:
        """What the last finished part left to go on with."""
        path = self._state(self.count)
        return safetensors.torch.load_file(path) if path.is_file() else {}

    def take(self) -> Iterator[dict[str, Tensor]]:
        """Every part's tensors in order; its file is gone by then."""
        for number in range(self.count):
            tensors = safetensors.torch.load_file(self._part(number))
            self._part(number).unlink()
            yield tensors
        self._state(self.count).unlink(missing_ok=True)
        (self.folder / PROGRESS).unlink(missing_ok=True)

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
