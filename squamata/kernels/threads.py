"""Threads of the compiled kernels: as many as torch has, in every thread of the program, and none in a fork."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from threading import RLock

import numba
import torch

import squamata.kernels.compilation  # noqa: F401  before numba starts
from squamata.errors import SquamataError

_forked = False
_kernels = RLock()


def share_threads() -> None:
    """Let this thread's kernels use as many threads as torch has now. SquamataError where they cannot run any more.

    Numba counts for every thread of the program by itself, and begins with all cores.
    """
    if _forked:
        raise SquamataError(
            "this process was forked from one whose kernels had started threads, which GNU OpenMP does not survive: "
            "start it with multiprocessing.get_context('spawn')"
        )
    wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)


def alone() -> AbstractContextManager[object]:
    """Within it no other thread of the program runs kernels, if numba's threads end the process when two do.

    Those of its own (``workqueue``) do: they are what there is without the system's OpenMP library.
    """
    return _kernels if numba.threading_layer() == "workqueue" else nullcontext()


def _start() -> None:
    """Numba's threads, whose start, on first use, would reset the number of torch's: both run on one OpenMP."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


def _note_fork() -> None:
    """In a child: numba would end it with a line on stderr at its first kernel."""
    global _forked
    _forked = numba.threading_layer() == "omp"


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
