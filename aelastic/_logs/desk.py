"""The desk: small writes to many files, done together.

A job for a thread costs ten times what a short write does. So what many files have to be given at one time goes in one
job. A file that hangs holds up itself only: the jobs take from one queue, and what one could not do the next one does.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import ClassVar, final

from .logfile import Batch, LogFile

LOOK_EVERY = 0.05
"""Seconds after which the results of a job that goes on are handed out."""


@final
@dataclass(slots=True, eq=False)
class _Write:
    file: LogFile
    batch: Batch
    done: asyncio.Future[None]
    error: BaseException | None = field(default=None)
    finished: bool = False

    def run(self) -> None:
        try:
            self.file.writelines(self.batch)
        except BaseException as error:  # noqa: BLE001  # raised to whoever asked for the write
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
    """One executor's small writes, as asked for from one loop."""

    _of_executor: ClassVar[weakref.WeakKeyDictionary[Executor, Desk]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._asked: deque[_Write] = deque()
        self._unfinished: list[_Write] = []
        self._called = False
        self._jobs = 0

    @classmethod
    def of(cls, executor: Executor) -> Desk:
        """The desk of an executor, which all files that are written there share."""
        desk = cls._of_executor.get(executor)
        if desk is None:
            desk = cls._of_executor[executor] = cls()
        return desk

    async def writelines(self, executor: Executor, file: LogFile, batch: Batch) -> None:
        """Append a batch to a file, with whatever else is asked for in this turn of the loop.

        Raises:
            OSError: see `LogFile.writelines`.
        """
        loop = asyncio.get_running_loop()
        write = _Write(file, batch, loop.create_future())
        self._asked.append(write)
        self._unfinished.append(write)
        if not self._called:
            self._called = True
            loop.call_soon(self._start, executor)
        await write.done

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
                write = self._asked.popleft()
            except IndexError:  # another thread took the last one
                return
            write.run()

    def _job_done(self, job: asyncio.Future[None]) -> None:
        self._jobs -= 1
        self._hand_out()
        job.result()

    def _look(self) -> None:
        self._hand_out()
        if self._jobs:
            asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _hand_out(self) -> None:
        finished = [write for write in self._unfinished if write.finished]
        self._unfinished = [write for write in self._unfinished if not write.finished]
        for write in finished:
            write.tell()
