"""How many files of one loop are written at the same time: so many that the loop has a processor, too.

What a disk takes at once is copied from memory to memory, which needs a processor as the loop does. Were as many files
written as there are threads, the loop would stand in line behind all of them. A write that lasts waits for the disk and
not for a processor: it holds up nobody.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, final

LASTS = 0.05
"""Seconds after which a write is known to wait for its disk."""


@final
class Lanes:
    """One loop's, which all files of all its runs share; first come, first served."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Lanes]] = weakref.WeakKeyDictionary()

    def __init__(self, count: int) -> None:
        self._count = count
        self._entered: list[float] = []
        """When each write began that is under way, on the loop's clock."""
        self._waiting: deque[asyncio.Future[float]] = deque()

    @classmethod
    def of_running_loop(cls) -> Lanes:
        """The lanes of the running loop: half as many as it may use processors, but one at least."""
        loop = asyncio.get_running_loop()
        lanes = cls._of_loop.get(loop)
        if lanes is None:
            lanes = cls._of_loop[loop] = cls(max(1, _processors() // 2))
        return lanes

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Have a lane for one write.

        Cancellation: gives it, or the place in the line, to those behind.
        """
        entered = self._enter() if self._is_free() and not self._waiting else await self._wait()
        try:
            yield
        finally:
            self._leave(entered)

    def _is_free(self) -> bool:
        now = asyncio.get_running_loop().time()
        return sum(now - entered < LASTS for entered in self._entered) < self._count

    def _enter(self) -> float:
        entered = asyncio.get_running_loop().time()
        self._entered.append(entered)
        return entered

    async def _wait(self) -> float:
        place: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            while not place.done():
                await asyncio.wait({place}, timeout=LASTS)
                self._let_in()
        except asyncio.CancelledError:
            if place.done():
                self._leave(place.result())
            else:
                self._waiting.remove(place)
            raise
        return place.result()

    def _leave(self, entered: float) -> None:
        self._entered.remove(entered)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._is_free():
            self._waiting.popleft().set_result(self._enter())


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
