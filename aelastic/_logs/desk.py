"""The desk: short calls that touch the disk, for many files, done together.

A job for a thread, and waking a task when it is done, cost ten times what a short write does. So what many files ask
for at one time, to be opened or to be given a few lines, goes in one job, and each is told by a plain call. A file that
hangs holds up itself only: the jobs take from one queue, and while one hangs another goes on with it.
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

MOST_JOBS = 8
"""How many jobs are started at the most because others hang."""


@final
@dataclass(slots=True, eq=False)
class _Errand:
    call: Callable[[], None]
    tell: Callable[[BaseException | None], None]
    error: BaseException | None = field(default=None)
    finished: bool = False

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:  # noqa: BLE001  # told to whoever asked for it
            self.error = error
        self.finished = True


@final
class Desk:
    """One executor's short calls, as asked for from one loop."""

    _of_executor: ClassVar[weakref.WeakKeyDictionary[Executor, Desk]] = weakref.WeakKeyDictionary()

    def __init__(self, executor: Executor) -> None:
        self._executor = weakref.ref(executor)
        self._asked: deque[_Errand] = deque()
        self._unfinished: list[_Errand] = []
        self._left_at_last_look = 0
        self._called = False
        self._jobs = 0
        self._next_look: asyncio.TimerHandle | None = None
        self._later: dict[float, tuple[asyncio.TimerHandle, list[Callable[[], None]]]] = {}
        """By time: its one timer, and whom it calls."""

    @classmethod
    def of(cls, executor: Executor) -> Desk:
        """The desk of an executor, which all files that are written there share."""
        desk = cls._of_executor.get(executor)
        if desk is None:
            desk = cls._of_executor[executor] = cls(executor)
        return desk

    def at(self, when: float, ask: Callable[[], None]) -> None:
        """Call `ask` in the loop at a time of the loop's clock; all that wait for one time have one timer."""
        if when in self._later:
            self._later[when][1].append(ask)
        else:
            self._later[when] = asyncio.get_running_loop().call_at(when, self._due, when), [ask]

    def not_at(self, when: float, ask: Callable[[], None]) -> None:
        """Take that back, if it is still to come; the last one takes the timer along, which would keep a run alive."""
        timer, asks = self._later.get(when, (None, []))
        if ask in asks:
            asks.remove(ask)
        if timer is not None and not asks:
            timer.cancel()
            del self._later[when]

    def _due(self, when: float) -> None:
        _, asks = self._later.pop(when)
        for ask in asks:
            ask()

    def ask(self, call: Callable[[], None], tell: Callable[[BaseException | None], None]) -> None:
        """Make a short call on the executor, with whatever else is asked for in this turn of the loop.

        Args:
            call: what to do there.
            tell: called in the loop, with what the call raised.
        """
        errand = _Errand(call, tell)
        self._asked.append(errand)
        self._unfinished.append(errand)
        if not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._start)

    async def run(self, call: Callable[[], None]) -> None:
        """The same, waited for.

        Raises:
            BaseException: what the call raised.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell(error: BaseException | None) -> None:
            if done.done():
                return  # whoever asked gave up
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self.ask(call, tell)
        await done

    def _start(self) -> None:
        self._called = False
        self._start_job()
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _start_job(self) -> None:
        if (executor := self._executor()) is not None:
            self._jobs += 1
            job = asyncio.get_running_loop().run_in_executor(executor, self._work)
            job.add_done_callback(self._job_done)

    def _work(self) -> None:
        while self._asked:
            try:
                errand = self._asked.popleft()
            except IndexError:  # another thread took the last one
                return
            errand.run()

    def _job_done(self, job: asyncio.Future[None]) -> None:
        self._jobs -= 1
        if not self._jobs and self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._hand_out()
        if not job.cancelled():  # as it is when the executor is closed while others hang
            job.result()

    def _look(self) -> None:
        self._hand_out()
        if self._asked and len(self._asked) == self._left_at_last_look and self._jobs < MOST_JOBS:
            self._start_job()  # a file hangs: those behind it go on without it
        self._left_at_last_look = len(self._asked)
        self._next_look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look) if self._jobs else None

    def _hand_out(self) -> None:
        finished: list[_Errand] = []
        unfinished: list[_Errand] = []
        for errand in self._unfinished:  # asked once each: a thread may finish one meanwhile
            (finished if errand.finished else unfinished).append(errand)
        self._unfinished = unfinished
        for errand in finished:
            errand.tell(errand.error)
