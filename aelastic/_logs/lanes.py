"""How many files of one loop are written at the same time: so many that the loop has a processor, too.

What a disk takes at once is copied from memory to memory, which needs a processor as the loop does. Were as many files
written as there are threads, the loop would stand in line behind all of them. A write that goes on for longer than the
copying of its bytes takes waits for the disk and not for a processor: it holds up nobody.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, final

COPIED_IN_A_SECOND = 256 << 20
"""Bytes that a slow processor copies; also beside others who want it."""


@final
@dataclass(slots=True, eq=False)
class Lane:
    """One write on its way."""

    until: float
    """When its bytes are certainly copied, on the loop's clock."""


@final
class Lanes:
    """One loop's, which all files of all its runs share; first come, first served."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Lanes]] = weakref.WeakKeyDictionary()

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: set[Lane] = set()
        self._line: deque[tuple[asyncio.Future[Lane], int]] = deque()
        """Who waits, each with its bytes."""
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of_running_loop(cls) -> Lanes:
        """The lanes of the running loop: half as many as it may use processors, but one at least."""
        loop = asyncio.get_running_loop()
        lanes = cls._of_loop.get(loop)
        if lanes is None:
            lanes = cls._of_loop[loop] = cls(max(1, _processors() // 2))
        return lanes

    @asynccontextmanager
    async def one(self, size: int) -> AsyncIterator[None]:
        """Have a lane for one write of so many bytes.

        Cancellation: gives it, or the place in the line, to those behind.
        """
        lane = await self._wait(size) if self._line or not self._is_free() else self._take(size)
        try:
            yield
        finally:
            self._leave(lane)

    def _is_free(self) -> bool:
        now = asyncio.get_running_loop().time()
        return sum(lane.until > now for lane in self._taken) < self._count

    def _take(self, size: int) -> Lane:
        lane = Lane(asyncio.get_running_loop().time() + size / COPIED_IN_A_SECOND)
        self._taken.add(lane)
        return lane

    async def _wait(self, size: int) -> Lane:
        place: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._line.append((place, size))
        self._let_in()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave(place.result())
            raise

    def _leave(self, lane: Lane) -> None:
        self._taken.remove(lane)
        self._let_in()

    def _let_in(self) -> None:
        while self._line and (self._line[0][0].done() or self._is_free()):
            place, size = self._line.popleft()
            if not place.done():  # else its owner was cancelled
                place.set_result(self._take(size))
        if self._line and self._timer is None:
            loop = asyncio.get_running_loop()
            due = min((lane.until for lane in self._taken if lane.until > loop.time()), default=loop.time())
            self._timer = loop.call_at(due, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._let_in()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
