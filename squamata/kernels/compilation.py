"""Says, once a process, that kernels are being compiled: the first call after an installation takes seconds."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from numba.core import event
from rich.console import Console

log = logging.getLogger(__name__)


class _Announcer(event.Listener):
    """Hears every compilation of numba that no cache on disk spared."""

    def __init__(self) -> None:
        self.announced = False

    def on_start(self, event: event.Event) -> None:
        function = event.data["dispatcher"].py_func
        if not function.__module__.startswith("squamata."):
            return
        log.debug("compiling %s.%s", function.__module__, function.__qualname__)
        if not self.announced:
            self.announced = True
            Console(stderr=True).print("compiling CPU kernels, once: later runs find them on disk", style="dim")

    def on_end(self, event: event.Event) -> None:
        """Nothing to say."""


@cache
def announce_compilation() -> Any:
    """Listen from now on; calling it again changes nothing."""
    announcer = _Announcer()
    event.register("numba:compile", announcer)
    return announcer
