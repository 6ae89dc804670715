"""Whose turn it is to read: all streams of a loop, first come, first served, within a budget per turn of the loop.

Stalls add up over all that is ready in one iteration of a loop, so a bound for each stream alone is not enough.

Waking up for every line costs more than reading it. So a stream that wakes the loop for a little again and again, with
less than 0.15 s between, is no longer waited for but looked at every 0.15 s, together with the others of its kind: from
when they wake the loop a thousand times a second on, as long as there are several of them.
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
TICK = 0.15
"""Seconds between two looks at streams that write all the time."""
WINDOW = 0.1
CROWDED = 100
"""Wake-ups in a window, each soon after the stream's last one, from which on streams are looked at together."""
SEVERAL = 8
"""So many streams must be looked at together, or none is."""


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
        self._wakes = 0
        self._woken: set[Reader] = set()

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

    def woken_again(self, reader: Reader, now: float) -> bool:
        """Take note of a wake-up for little, soon after the stream's last one, at `now` on the loop's clock.

        Returns:
            Whether the stream should rather be looked at.
        """
        if self.pays:
            return True
        if now >= self._window_ends:
            self._wakes = 0
            self._woken.clear()
            self._window_ends = now + WINDOW
        self._wakes += 1
        self._woken.add(reader)
        return self._wakes > CROWDED and len(self._woken) >= SEVERAL

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
        if not self._ticking:
            return
        asyncio.get_running_loop().call_later(TICK, self._tick)
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._give_turns)
        due = self._looked_at - self._queued
        self._queue.extend(due)
        self._queued |= due

    def _give_turns(self) -> None:
        now = time.perf_counter()
        end = now + ITERATION
        # One turn each: a disk that has written its batch gets the next one from the loop, and must not wait for it.
        for _ in range(len(self._queue)):
            if now >= end:
                break
            reader = self._queue.popleft()
            self._queued.discard(reader)
            if reader.read(min(now + TURN, end)):
                self._queued.add(reader)
                self._queue.append(reader)
            now = time.perf_counter()
        if self._queue:
            asyncio.get_running_loop().call_soon(self._give_turns)
