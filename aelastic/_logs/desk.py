"""The desk: short calls that touch the disk, for many files, done together.

A job for a thread costs ten times what a short write does. So what many files ask for at one time, to be opened or
to be given a few lines, goes in one job. A file that hangs holds up itself only: the jobs take from one queue, and what
one could not do the next one does.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import ClassVar, final

LOOK_EVERY = 0.05
"""Seconds after which the results of a job that goes on are handed out."""


@final
@dataclass(slots=True, eq=False)
class _Errand:
    call: Callable[[], None]
    done: asyncio.Future[None]
    error: BaseException | None = field(default=None)
    finished: bool = False

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:  # noqa: BLE001  # raised to whoever asked for it
            self.error = error
        self.finished = True

    def tell(self) -> None:
        if self.done.done():
            return  # its owner gave up
        if self.error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self.error)


@final
class Desk:
    """One executor's short calls, as asked for from one loop."""

    _of_executor: ClassVar[weakref.WeakKeyDictionary[Executor, Desk]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._asked: deque[_Errand] = deque()
        self._unfinished: list[_Errand] = []
        self._called = False
        self._jobs = 0

    @classmethod
    def of(cls, executor: Executor) -> Desk:
        """The desk of an executor, which all files that are written there share."""
        desk = cls._of_executor.get(executor)
        if desk is None:
            desk = cls._of_executor[executor] = cls()
        return desk

    async def run(self, executor: Executor, call: Callable[[], None]) -> None:
        """Make a short call on the executor, with whatever else is asked for in this turn of the loop.

        Raises:
            BaseException: what the call raised.
        """
        loop = asyncio.get_running_loop()
        errand = _Errand(call, loop.create_future())
        self._asked.append(errand)
        self._unfinished.append(errand)
        if not self._called:
            self._called = True
            loop.call_soon(self._start, executor)
        await errand.done

    def _start(self, executor: Executor) -> None:
        self._called = False
        loop = asyncio.get_running_loop()
        self._jobs += 1
        loop.run_in_executor(executor, self._work).add_done_callback(self._job_done)
        if self._jobs == 1:
            loop.call_later(LOOK_EVERY, self._look)

    def _work(self) -> None:
        while self._asked:
            try:
                errand = self._asked.popleft()
            except IndexError:  # another thread took the last one
                return
            errand.run()

    def _job_done(self, job: asyncio.Future[None]) -> None:
        self._jobs -= 1
        self._hand_out()
        job.result()

    def _look(self) -> None:
        self._hand_out()
        if self._jobs:
            asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _hand_out(self) -> None:
        finished = [errand for errand in self._unfinished if errand.finished]
        self._unfinished = [errand for errand in self._unfinished if not errand.finished]
        for errand in finished:
            errand.tell()
