"""A 1 ms ticker in the loop that is measured: how long the loop kept somebody else waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PERIOD = 0.001


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """Tick while the block runs; yields the gaps between ticks so far, in milliseconds."""
    gaps: list[float] = [0.0]
    task = asyncio.create_task(_tick(gaps))
    await asyncio.sleep(0)
    try:
        yield gaps
        await asyncio.sleep(2 * PERIOD)  # a gap that the block's last step made is seen too
    finally:
        task.cancel()


async def _tick(gaps: list[float]) -> None:
    last = time.perf_counter()
    while True:
        await asyncio.sleep(PERIOD)
        now = time.perf_counter()
        gaps.append((now - last) * 1e3)
        last = now
