"""Threads of a run's own, for what may block: disks, /proc, pickles.

The host's default executor is never used: a stalled disk of ours must not starve it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar, final

P = ParamSpec("P")
T = TypeVar("T")


@final
class Threads(ThreadPoolExecutor):
    """An executor that can be closed from the loop without waiting for a stuck job.

    Args:
        name: begins the names of the threads.
        count: threads at the most; none is started before the first job.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__(max_workers=count, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._unfinished = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a job; see `concurrent.futures.Executor.submit`."""
        future = super().submit(fn, *args, **kwargs)
        with self._lock:
            self._unfinished += 1
        future.add_done_callback(self._finished)
        return future

    def _adjust_thread_count(self) -> None:
        """Do with the threads that are there when the system gives no further one: their jobs must be done."""
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise

    def _finished(self, _future: Future[T]) -> None:
        with self._lock:
            self._unfinished -= 1

    def close(self) -> None:
        """End the threads; they are gone on return, but for one that is stuck in a job, which ends after it."""
        with self._lock:
            idle = self._unfinished == 0
        # Idle threads end within microseconds, so that waiting for them doesn't hold the loop.
        self.shutdown(wait=idle, cancel_futures=True)
