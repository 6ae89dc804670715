"""How many exits one turn of a loop takes in: what each of them sets off adds up, and others wait meanwhile."""

from __future__ import annotations

import asyncio
import weakref
from typing import ClassVar, final

EXITS = 8
"""In one turn; each sets off about a quarter of a millisecond of work in the turns after it."""


@final
class Pace:
    """One loop's, which all runs in it share."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pace]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._seen = 0

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

    def _next_turn(self) -> None:
        self._seen = 0
