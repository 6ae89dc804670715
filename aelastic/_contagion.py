"""How one failure spreads to the others: at once, after a grace, or not at all.

Among the ranks of a gang, or among ranks that restart by themselves. Who the others are, and how they are stopped, is
their owner's affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal, final


@final
class Contagion:
    """Waits for a failure, and stops all for it, once.

    Nothing spreads before all have been started, and nothing once a stop has begun.

    Args:
        on_failure: as `StopPolicy.on_failure`.
        stop: stops all; is told why.
    """

    def __init__(self, on_failure: Literal["stop", "continue"] | float, stop: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._stop = stop
        self._all_started = False
        self._early: str | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._over = on_failure == "continue"

    def failed(self, why: str) -> None:
        """Take note of a failure."""
        if not self._all_started:
            self._early = self._early or why
        elif self._over or self._grace is not None:
            return
        elif isinstance(self._on_failure, float):
            self._grace = self._loop.call_later(self._on_failure, self._stop, why)
        else:
            self._stop(why)

    @property
    def breaks_out(self) -> bool:
        """Whether a failure spreads as soon as all have been started."""
        return self._early is not None and not self._over

    def all_started(self) -> None:
        """Let failures spread from now on, and the first that there was already."""
        self._all_started = True
        if self._early is not None:
            self.failed(self._early)

    def end(self) -> None:
        """Let nothing spread any more. Idempotent."""
        self._over = True
        if self._grace is not None:
            self._grace.cancel()
