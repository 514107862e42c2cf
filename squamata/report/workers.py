"""Where rows are measured: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from squamata.errors import SquamataError
from squamata.report.measure import Outcome, measure_row
from squamata.report.plan import RowPlan
from squamata.report.verbs import Verbs

INSTALL = "pip install 'squamata[studies]'"
LIVES = 5  # how often a row begins again on another node of a cluster after its own has gone


def measure_all(
    plans: Sequence[RowPlan], verbs: Verbs, workers: int, ray_address: str | None, scratch: Path
) -> Iterator[Outcome]:
    """The outcome of every row, as each is ready."""
    if ray_address is not None:
        yield from _on_ray(plans, verbs, ray_address)
    elif workers > 1 and len(plans) > 1:
        yield from _in_processes(plans, verbs, min(workers, len(plans)), scratch)
    else:
        yield from (measure_row(plan, verbs, scratch) for plan in plans)


def _in_processes(plans: Sequence[RowPlan], verbs: Verbs, workers: int, scratch: Path) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_become_worker) as pool:
        futures = [pool.submit(measure_row, plan, verbs, scratch) for plan in plans]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise SquamataError(
                "a worker died, most likely for want of memory; finished rows are kept: run again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _become_worker() -> None:
    """One thread for every worker, and no life after the parent's, which may be killed without a word."""
    _calm()
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


def _on_ray(plans: Sequence[RowPlan], verbs: Verbs, address: str) -> Iterator[Outcome]:
    """Rows as tasks of a cluster; a row whose node dies begins again on another."""
    if importlib.util.find_spec("ray") is None:
        raise SquamataError(f"--ray needs the library 'ray': {INSTALL}")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise SquamataError(f"--ray {address}: no cluster answers there ({str(error).splitlines()[0]})") from None
    task = ray.remote(num_cpus=1, max_retries=LIVES)(_measure_on_node)
    try:
        waiting = [task.remote(plan, verbs) for plan in plans]
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            yield from ray.get(ready)
    except ray.exceptions.RaySystemError as error:
        raise SquamataError(f"--ray {address}: {str(error).splitlines()[0]}; run again to go on") from None
    finally:
        ray.shutdown()


def _measure_on_node(plan: RowPlan, verbs: Verbs) -> Outcome:
    _calm()
    return measure_row(plan, verbs)
