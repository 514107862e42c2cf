"""What kernels read and write, and when, that start before their predecessors have ended: seen by Triton's interpreter.

It runs one kernel after the other, program by program, so it cannot show a race. But it sees every address.
``recorded`` notes them, apart for what a program does before it waits, after it has waited for a counter, and after it
has waited for the whole kernel before; ``violations`` applies the rules of ``kernels.decode.triton`` to that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from triton.runtime import interpreter

EARLY, COUNTED, LATE = range(3)  # before any wait; after one for a counter; after one for the whole kernel before
CAN_RECORD = all(hasattr(interpreter, name) for name in ("GridExecutor", "_interpreter", "interpreter_builder"))
_HOOKS = ("wait_for_previous", "wait_for_programs", "let_next_start", "count_program")

Bytes = NDArray[np.int64]  # sorted addresses, each once


@dataclass
class Program:
    """One program's addresses, by when. ``told``: written before it counted itself, if it did."""

    phase: int = EARLY
    reads: tuple[list[Bytes], list[Bytes], list[Bytes]] = field(default_factory=lambda: ([], [], []))
    writes: tuple[list[Bytes], list[Bytes], list[Bytes]] = field(default_factory=lambda: ([], [], []))
    atomics: list[Bytes] = field(default_factory=list)
    told: list[Bytes] = field(default_factory=list)


@dataclass
class Launch:
    """One kernel: its programs, and whether it starts before its predecessor has ended."""

    name: str
    dependent: bool
    programs: list[Program] = field(default_factory=list)

    def read(self, *phases: int) -> Bytes:
        """What all programs read in these phases."""
        return _union([part for program in self.programs for phase in phases for part in program.reads[phase]])

    def written(self, *phases: int) -> Bytes:
        """What all programs write in these phases, atomics left out."""
        return _union([part for program in self.programs for phase in phases for part in program.writes[phase]])

    def not_told(self) -> Bytes:
        """What is written but by programs that had not counted themselves yet."""
        told = _union([part for program in self.programs for part in program.told])
        return np.setdiff1d(self.written(EARLY, COUNTED, LATE), told, assume_unique=True)


def _union(parts: list[Bytes]) -> Bytes:
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def _shared(first: Bytes, second: Bytes) -> int:
    """Bytes in both."""
    return len(np.intersect1d(first, second, assume_unique=True))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of the Triton kernels called inside, as they come. Kernels are to be launched with ``pdl=True``."""
    launches: list[Launch] = []
    where: list[Any] = [None]

    def program() -> Program:
        index = tuple(interpreter.interpreter_builder.grid_idx)
        if where[0] != (len(launches), index):
            where[0] = (len(launches), index)
            launches[-1].programs.append(Program())
        return launches[-1].programs[-1]

    def wait_for_previous(PDL: object) -> None:
        program().phase = LATE

    def wait_for_programs(after: object, wanted: object, PDL: object, NATIVE: object) -> None:
        program().phase = LATE if after is None else max(COUNTED, program().phase)

    def count_program(counter: Any) -> None:
        if counter is not None:
            now = program()
            now.told += [part for phase in now.writes for part in phase]
            original["count_program"](counter)

    hooks: dict[str, Callable[..., None]] = {
        "wait_for_previous": wait_for_previous,
        "wait_for_programs": wait_for_programs,
        "let_next_start": lambda PDL: None,
        "count_program": count_program,
    }
    original = {name: getattr(sys.modules["squamata.kernels.gpu.math"], name) for name in _HOOKS}
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(self.fn.__name__, bool(options.get("PDL"))))
        run(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter, "_interpreter", _watched(interpreter._interpreter, program))
        for module in list(sys.modules.values()):
            for name, hook in hooks.items():
                if vars(module).get(name) is original[name]:
                    patch.setattr(module, name, hook)
        yield launches


def _watched(memory: Any, program: Callable[[], Program]) -> SimpleNamespace:
    """The interpreter's memory, whose every access is noted with the program that makes it."""

    def bytes_of(pointers: Any, mask: Any, size: int) -> Bytes:
        addresses = np.asarray(pointers).reshape(-1).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask, bool).reshape(-1), addresses.shape)]
        return np.unique(addresses[:, None] + np.arange(size))

    def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        now = program()
        now.reads[now.phase].append(bytes_of(pointers, mask, np.dtype(dtype).itemsize))
        return memory.load(pointers, mask, other, dtype)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        now = program()
        now.writes[now.phase].append(bytes_of(pointers, mask, value.dtype.itemsize))
        return memory.store(pointers, value, mask)

    def atomic_rmw(operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        program().atomics.append(bytes_of(pointers, mask, value.dtype.itemsize))
        return memory.atomic_rmw(operation, pointers, value, mask, order)

    return SimpleNamespace(
        **{name: getattr(memory, name) for name in dir(memory) if not name.startswith("__")}
        | {"load": load, "store": store, "atomic_rmw": atomic_rmw}
    )


def violations(launches: list[Launch]) -> list[str]:
    """What could go wrong if every kernel of one token started at once and went as far as its waits let it."""
    found = []
    before = np.zeros(0, np.int64)  # what the token has written until here
    for index, kernel in enumerate(launches):
        name = f"{index} ({kernel.name})"
        if index == 0 and kernel.dependent:
            found.append(f"{name} begins the token and does not wait for the last one to end")
        if index and kernel.dependent:
            missing = sum(program.phase != LATE for program in kernel.programs)
            if missing:
                found.append(f"{missing} programs of {name} end without having waited")
            if len(kernel.written(EARLY)):
                found.append(f"{name} writes before it waits")
            if count := _shared(kernel.read(EARLY), before):
                found.append(f"{name} reads before it waits {count} bytes that this token writes")
            last = launches[index - 1]
            if count := _shared(kernel.read(COUNTED), last.not_told()):
                found.append(f"{name} reads {count} bytes that the counter does not tell of")
            if count := _shared(kernel.written(COUNTED), np.union1d(last.read(EARLY, COUNTED, LATE), last.not_told())):
                found.append(f"{name} writes {count} bytes that {last.name} may still use")
        if count := _between_programs(kernel):
            found.append(f"programs of {name} share {count} bytes that one of them writes")
        before = np.union1d(before, np.union1d(kernel.written(EARLY, COUNTED, LATE), _atomics(kernel)))
    return found


def _atomics(kernel: Launch) -> Bytes:
    return _union([part for program in kernel.programs for part in program.atomics])


def _between_programs(kernel: Launch) -> int:
    """Bytes that one program writes and another reads or writes; what a program reads of its own is its own."""
    written = [_union([part for phase in program.writes for part in phase]) for program in kernel.programs]
    addresses = np.concatenate([np.zeros(0, np.int64), *written])
    owners = np.repeat(np.arange(len(written)), [len(part) for part in written])
    order = np.argsort(addresses, kind="stable")
    addresses, owners = addresses[order], owners[order]
    clashes = [addresses[1:][addresses[1:] == addresses[:-1]]]
    for number, program in enumerate(kernel.programs):
        read = np.intersect1d(_union([part for phase in program.reads for part in phase]), addresses)
        clashes.append(read[owners[np.searchsorted(addresses, read)] != number])
    return len(_union(clashes))
