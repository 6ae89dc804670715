"""Waiting until every rank of a run is ready, for whoever asks. Observing is `_health`'s; nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from ._failures import ProcessFailure, WorkerNotReady
from ._run import Run
from ._worker import Worker


async def wait_ready(run: Run, timeout: float | None) -> None:
    """Wait until every rank is ready; see `PContext.wait_ready`.

    Raises:
        TimeoutError: at the timeout.
        WorkerNotReady: if it will not become true any more.
    """
    health = run.spec.health
    if health is None or not any(health.condition_of(rank) for rank in range(run.spec.nprocs)):
        return
    try:
        async with asyncio.timeout(timeout):
            await _all_ready(run)
    except TimeoutError:
        raise TimeoutError(f"{run.spec.name} is not ready within {timeout:g} s: {_missing(run)}") from None


async def _all_ready(run: Run) -> None:
    while not is_ready(run):
        lost = [worker for worker in _workers(run) if worker.has_missed_ready]
        if run.finished.done() or any(not run.may_restart(worker.rank) for worker in lost):
            raise await _not_ready(run, lost)
        await run.bus.news(*(worker.ended for worker in _workers(run) if not worker.ended.done()))


def _workers(run: Run) -> Collection[Worker]:
    return run.round.workers.values()


def is_ready(run: Run) -> bool:
    """Whether all ranks are ready now."""
    workers = _workers(run)
    return len(workers) == run.spec.nprocs and all(worker.has_become_ready for worker in workers)


async def _not_ready(run: Run, lost: Collection[Worker]) -> WorkerNotReady:
    if run.finished.done():
        run.finished.result()  # an error of the supervision itself is what there is to tell
    failures: dict[int, ProcessFailure] = {}
    for worker in lost:
        failure = worker.failure if worker.ended.done() else await worker.failure_so_far()
        if failure is not None:
            failures[worker.rank] = failure
    unready = [worker for worker in _workers(run) if not worker.has_become_ready]
    tails = [failure.tail for failure in failures.values()] + [worker.tail for worker in unready]
    return WorkerNotReady(f"{run.spec.name} is not ready: {_missing(run)}", failures, next(filter(None, tails), ()))


def _missing(run: Run) -> str:
    """What keeps the run from being ready, rank by rank."""
    workers = _workers(run)
    unready = [worker.why_not_ready() for worker in workers if not worker.has_become_ready]
    if len(workers) < run.spec.nprocs:
        started = {worker.rank for worker in workers}
        waiting = [str(rank) for rank in range(run.spec.nprocs) if rank not in started]
        unready.append(f"rank {', '.join(waiting)} was not started")
    return "; ".join(unready)
