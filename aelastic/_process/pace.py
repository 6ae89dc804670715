"""How many starts, exits and signals one turn of a loop takes in: they add up, while the host's own work waits."""

from __future__ import annotations

import asyncio
import weakref
from typing import ClassVar, final

EXITS = 8
"""In one turn; each sets off about a quarter of a millisecond of work in the turns after it."""
STARTS = 4
"""In one turn, whatever the number of runs; each holds the loop for a millisecond, while the kernel makes the child."""
SLOW_STARTS = 1
"""The same on uvloop, whose fork takes five milliseconds, and more in a large host."""
SIGNALS = 16
"""In one turn: those to the trees of so many workers. What they end takes the processors from us at once."""


@final
class Pace:
    """One loop's, which all runs in it share."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pace]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._seen = self._started = self._signalled = 0
        self._queue = asyncio.Lock()

    @classmethod
    def of_running_loop(cls) -> Pace:
        """The pace of the running loop."""
        loop = asyncio.get_running_loop()
        pace = cls._of_loop.get(loop)
        if pace is None:
            pace = cls._of_loop[loop] = cls()
        return pace

    def admits(self) -> bool:
        """Count an exit; False when this turn has had its share, and the exit is to be looked at in the next one."""
        if not self._seen:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._seen += 1
        return self._seen <= EXITS

    async def start_admitted(self) -> None:
        """Wait until this turn has room for another start; who came first starts first."""
        loop = asyncio.get_running_loop()
        most = STARTS if isinstance(loop, asyncio.BaseEventLoop) else SLOW_STARTS
        async with self._queue:
            while self._started >= most:
                await asyncio.sleep(0)
            if not self._started:
                loop.call_soon(self._next_turn_of_starts)
            self._started += 1

    async def signal_admitted(self) -> None:
        """Wait until this turn has room for the signals to another worker's tree; who came first is first."""
        while self._signalled >= SIGNALS:
            await asyncio.sleep(0)
        if not self._signalled:
            asyncio.get_running_loop().call_soon(self._next_turn_of_signals)
        self._signalled += 1

    def _next_turn(self) -> None:
        self._seen = 0

    def _next_turn_of_starts(self) -> None:
        self._started = 0

    def _next_turn_of_signals(self) -> None:
        self._signalled = 0
