"""Deadlines of a rank under one timer, none of which rings for what the host's loop slept through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import final

LATE = 0.05
"""Seconds by which a timer may be late before the loop counts as stalled."""
SECOND_LOOK = 0.25
"""Seconds between the moment a stalled loop wakes up and the moment it may ring: what was kept waiting, such as a
worker's datagram that found the socket's queue full, arrives in between."""


@final
class Alarms:
    """Named deadlines. Belongs to the running loop.

    Args:
        look: called before anything rings; hears what has arrived, and may move deadlines.
        ring: called with the name of a deadline that has passed, which is forgotten before.
    """

    def __init__(self, look: Callable[[], None], ring: Callable[[Hashable], None]) -> None:
        self._look = look
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._dues: dict[Hashable, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0.0
        self._looks_again = False

    def set(self, name: Hashable, due: float) -> None:
        """Let a deadline ring at `due`, on the host's monotonic clock, whenever it was to ring before."""
        self._dues[name] = due
        # A timer that comes too early costs one look; a timer anew for every heartbeat would cost more.
        if self._timer is None or due < self._armed_for:
            self._arm(due)

    def due(self, name: Hashable) -> float | None:
        """When a deadline rings; None when it is not set."""
        return self._dues.get(name)

    def drop(self, name: Hashable) -> None:
        """Forget a deadline, if it is set."""
        self._dues.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        self._dues.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = when
        # Not call_at: uvloop's own clock stands still while one turn of it takes long.
        self._timer = self._loop.call_later(max(when - time.monotonic(), 0), self._awake)

    def _awake(self) -> None:
        expected = self._armed_for
        self._look()
        now = time.monotonic()
        passed = [name for name, due in self._dues.items() if due <= now]
        if passed and now > expected + LATE and not self._looks_again:
            self._looks_again = True
            self._arm(now + SECOND_LOOK)
            return
        self._looks_again = False
        for name in passed:
            if self._dues.pop(name, None) is not None:  # what rang before may have cleared it
                self._ring(name)
        self._arm(min(self._dues.values())) if self._dues else self.clear()
