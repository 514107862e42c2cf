"""Where rows are measured: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from squamata.errors import SquamataError
from squamata.report.measure import Outcome, measure_row
from squamata.report.plan import RowPlan
from squamata.report.verbs import Verbs
from squamata.run.simulated import share_devices

INSTALL = "pip install 'squamata[studies]'"
LIVES = 5  # how often a row begins again on another node of a cluster after its own has gone


@dataclass(frozen=True)
class Workforce:
    """Who measures: ``workers`` processes here, or the Ray cluster at ``ray``. ``device``: *cpu*, or *cuda*: the
    workers share out the GPUs in turn, so there may be several on each."""

    workers: int = 1
    ray: str | None = None
    device: str = "cpu"


def measure_all(plans: Sequence[RowPlan], verbs: Verbs, force: Workforce, scratch: Path) -> Iterator[Outcome]:
    """The outcome of every row, as each is ready."""
    if force.ray is not None:
        yield from _on_ray(plans, verbs, force.ray, force.device)
    elif force.workers > 1 and len(plans) > 1:
        yield from _in_processes(plans, verbs, force, scratch)
    else:
        yield from (measure_row(plan, verbs, scratch, force.device) for plan in plans)


def _in_processes(plans: Sequence[RowPlan], verbs: Verbs, force: Workforce, scratch: Path) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    workers = min(force.workers, len(plans))
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    begin = (_become_worker, (numbers, force.device))
    with ProcessPoolExecutor(workers, context, *begin) as pool:
        futures = [pool.submit(measure_row, plan, verbs, scratch, force.device) for plan in plans]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise SquamataError(
                "a worker died, most likely for want of memory; finished rows are kept: run again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _become_worker(numbers: Queue[int], device: str) -> None:
    """One thread for every worker, and no life after the parent's, which may be killed without a word; its GPU."""
    _calm()
    share_devices(device, numbers.get())
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _calm() -> None:
    torch.set_num_threads(1)
    if importlib.util.find_spec("numba") is not None:
        import numba

        numba.set_num_threads(1)


def _on_ray(plans: Sequence[RowPlan], verbs: Verbs, address: str, device: str) -> Iterator[Outcome]:
    """Rows as tasks of a cluster, each with a GPU of its own if it needs one; a row whose node dies begins again on
    another."""
    if importlib.util.find_spec("ray") is None:
        raise SquamataError(f"--ray needs the library 'ray': {INSTALL}")
    import ray

    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise SquamataError(f"--ray {address}: no cluster answers there ({str(error).splitlines()[0]})") from None
    task = ray.remote(num_cpus=1, num_gpus=int(device != "cpu"), max_retries=LIVES)(_measure_on_node)
    try:
        waiting = [task.remote(plan, verbs, device) for plan in plans]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            yield from ray.get(ready)
    except ray.exceptions.RayError as error:  # a lost cluster, a worker without memory
        raise SquamataError(f"--ray {address}: {str(error).splitlines()[0]}; run again to go on") from None
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """OSError if nothing listens at HOST:PORT; ray itself would try for minutes."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _measure_on_node(plan: RowPlan, verbs: Verbs, device: str) -> Outcome:
    _calm()
    return measure_row(plan, verbs, device=device)
