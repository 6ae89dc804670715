"""Whose turn it is to read: all streams of a loop, first come, first served, within a budget per turn of the loop.

Stalls add up over all that is ready in one iteration of a loop, so a bound for each stream alone is not enough.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from typing import ClassVar, Protocol, final

ITERATION = 0.004
"""Seconds of one iteration of the loop that reading may take, give or take a chunk."""
TURN = 0.002
"""Seconds of one stream's turn."""


class Reader(Protocol):
    """Reads one stream."""

    def read(self, until: float) -> bool:
        """Read for a while.

        Args:
            until: when to stop, on `time.perf_counter`'s clock.

        Returns:
            Whether there may be more.
        """


@final
class Turns:
    """The queue of one loop's streams that have something to read."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Turns]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = loop.call_soon
        self._queue: deque[Reader] = deque()
        self._queued: set[Reader] = set()

    @classmethod
    def of_running_loop(cls) -> Turns:
        """The one queue of the running loop, which all runs in it share."""
        loop = asyncio.get_running_loop()
        turns = cls._of_loop.get(loop)
        if turns is None:
            turns = cls._of_loop[loop] = cls(loop)
        return turns

    def ready(self, reader: Reader) -> None:
        """Queue a stream that has something to read."""
        if reader in self._queued:
            return
        if not self._queue:
            self._call_soon(self._give_turns)
        self._queued.add(reader)
        self._queue.append(reader)

    def forget(self, reader: Reader) -> None:
        """Take a stream out of the queue."""
        if reader in self._queued:
            self._queued.discard(reader)
            self._queue.remove(reader)

    def _give_turns(self) -> None:
        now = time.perf_counter()
        end = now + ITERATION
        while self._queue and now < end:
            reader = self._queue.popleft()
            self._queued.discard(reader)
            if reader.read(min(now + TURN, end)):
                self._queued.add(reader)
                self._queue.append(reader)
            now = time.perf_counter()
        if self._queue:
            self._call_soon(self._give_turns)
