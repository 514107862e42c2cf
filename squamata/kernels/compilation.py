"""Where compiled kernels are kept, and a note, once a process, that some are being compiled, which takes seconds.

Numba looks only at the file of a function to see whether its machine code is out of date, not at the files of what
that function calls. So each version of the kernels' sources has a folder of its own. Every module with
``njit(cache=True)`` imports this one first, directly or through ``simd``, ``memory`` or ``landing``.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.misc.appdirs import AppDirs
from rich.console import Console

from squamata.errors import SquamataError

log = logging.getLogger(__name__)

KEPT_DAYS = 30  # unused folders of other versions


def fingerprint(folder: Path) -> str:
    """Twelve hex digits of the names and contents of all Python files below a folder."""
    digest = sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cache_folder(sources: Path, parents: Iterable[Path]) -> Path | None:
    """Make and return the folder for what these sources compile to, in the first of ``parents`` that is this user's
    own and can be written to; None if none is. Folders beside it that nobody has used for ``KEPT_DAYS`` are deleted.
    """
    name = f"kernels-{fingerprint(sources)}"
    user = getattr(os, "getuid", int)()  # 0 without users, as st_uid is there
    for parent in parents:
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if parent.stat().st_uid != user:  # in a shared folder another could put code there
                continue
            folder = parent / name
            folder.mkdir(exist_ok=True)
            folder.touch()  # used now
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            log.debug("no compiled kernels in %s: %s", parent, error)
            continue
        for other in parent.glob("kernels-*"):
            if other != folder and time.time() - _last_used(other) > KEPT_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
        return folder
    return None


def _last_used(folder: Path) -> float:
    """Seconds since the epoch; now if another process has just deleted the folder."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()


def _name_cache() -> None:
    """Tell numba the folder, unless the user has (NUMBA_CACHE_DIR)."""
    if numba.config.CACHE_DIR:  # type: ignore[attr-defined]
        return
    user = getattr(os, "getuid", int)()
    parents = [Path(AppDirs("squamata", False).user_cache_dir)]
    with suppress(FileNotFoundError):  # no temporary folder can be written to
        parents.append(Path(tempfile.gettempdir()) / f"squamata-{user}")
    folder = cache_folder(Path(__file__).parent, parents)
    if folder is None:
        tried = " nor ".join(map(str, parents))
        raise SquamataError(f"compiled kernels cannot be kept in {tried}: set NUMBA_CACHE_DIR to a folder of yours")
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]


_name_cache()


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
