"""What tests of kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is never zero here, and the random numbers of a test are always the same."""
    torch.manual_seed(0)
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        room = original(*args, **kwargs)
        return room.fill_(torch.nan if room.dtype.is_floating_point else 77)

    monkeypatch.setattr(torch, "empty", empty)
