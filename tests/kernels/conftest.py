"""What tests of kernels share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from squamata.load.tokenizer import Tokenizer
from squamata.text import read_documents


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is never zero here, and the random numbers of a test are always the same."""
    torch.manual_seed(0)
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        room = original(*args, **kwargs)
        return room.fill_(torch.nan if room.dtype.is_floating_point else 77)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(scope="session")
def real_ids(bundled_folder: Path) -> Tensor:
    """The first tokens of the bundled excerpt, (1, 48)."""
    document = read_documents(bundled_folder / "excerpt.jsonl")[0]
    return torch.tensor([Tokenizer.read(bundled_folder).encode(document[:2000])[:48]])
