"""Whose turn it is to read: all streams of a loop, first come, first served, within a budget per turn of the loop.

Stalls add up over all that is ready in one iteration of a loop, so a bound for each stream alone is not enough.

Waking up for every line costs more than reading it. So while more than a thousand small reads a second are made of
several streams, those that write all the time are not waited for one by one but looked at together, ten times a second.
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
TICK = 0.1
"""Seconds between two looks at streams that write all the time."""
WINDOW = 0.1
CROWDED = 100
"""Small reads in a window from which on it pays to look at streams together."""
SEVERAL = 8
"""Streams for which it pays."""


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

    def __init__(self) -> None:
        self._queue: deque[Reader] = deque()
        self._queued: set[Reader] = set()
        self._looked_at: set[Reader] = set()
        self._ticking = False
        self._window_ends = 0.0
        self._small_reads = 0
        self._small_readers: set[Reader] = set()
        self.crowded = False
        """Whether of late it would have paid to look at streams together."""

    @classmethod
    def of_running_loop(cls) -> Turns:
        """The one queue of the running loop, which all runs in it share."""
        loop = asyncio.get_running_loop()
        turns = cls._of_loop.get(loop)
        if turns is None:
            turns = cls._of_loop[loop] = cls()
        return turns

    def ready(self, reader: Reader) -> None:
        """Queue a stream that has something to read."""
        if reader in self._queued:
            return
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._give_turns)
        self._queued.add(reader)
        self._queue.append(reader)

    def forget(self, reader: Reader) -> None:
        """Take a stream out of the queue."""
        if reader in self._queued:
            self._queued.discard(reader)
            self._queue.remove(reader)

    @property
    def pays(self) -> bool:
        """Whether enough streams are looked at to go on with it."""
        return len(self._looked_at) >= SEVERAL

    def count_small_read(self, reader: Reader, now: float) -> None:
        """Take note of a wake-up that was hardly worth it, at `now` on the loop's clock."""
        self._small_reads += 1
        self._small_readers.add(reader)
        if now >= self._window_ends:
            many = self._small_reads > CROWDED and len(self._small_readers) >= SEVERAL
            self.crowded = many and now < self._window_ends + WINDOW
            self._small_reads = 0
            self._small_readers.clear()
            self._window_ends = now + WINDOW

    def look_at(self, reader: Reader) -> None:
        """Give a stream a turn with every tick, until it is left alone."""
        self._looked_at.add(reader)
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK, self._tick)

    def leave_alone(self, reader: Reader) -> None:
        """Give a stream no more turns of itself."""
        self._looked_at.discard(reader)

    def _tick(self) -> None:
        self._ticking = bool(self._looked_at)
        if self._ticking:
            asyncio.get_running_loop().call_later(TICK, self._tick)
        for reader in self._looked_at:
            self.ready(reader)

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
            asyncio.get_running_loop().call_soon(self._give_turns)
