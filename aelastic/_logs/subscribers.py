"""Subscriptions to lines: `Lines`, which reads streams at its own pace, through cursors into their tails."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, final

from aelastic._results import LogLine
from aelastic._std import Std

from .tail import Cursor, RawLine

if TYPE_CHECKING:
    from .hub import HubStream, LineHub

QUIET = 0.2
"""Seconds without a byte after which an unfinished line is shown."""
KEPT_ATTEMPTS = 8
"""So many attempts of a stream wait for a reader that sleeps; the lines of older ones count as skipped."""
BURST = 50
"""Lines a reader gets before the loop's other tasks have a turn."""


@final
class Lines:
    """One subscription: an async iterator over lines, and a context manager that ends it.

    It ends after the last line of the run. Dropping it without `aclose` ends it too.

    Cancellation: only the waiting is stopped; the next read goes on where this one was.
    """

    def __init__(self, hub: LineHub, chosen: Callable[[int, Std], bool], *, lossless: bool, partials: bool) -> None:
        self.lossless = lossless
        self.chosen = chosen
        self._hub = hub
        self._partials = partials
        self._streams: list[HubStream] = []
        self._ready: list[tuple[int, int, HubStream, Cursor]] = []
        self._queued: set[Cursor] = set()
        self._unfinished: dict[Cursor, HubStream] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._order = 0
        self._served = 0
        self._closed = False

    def follow(self, stream: HubStream, *, live: bool) -> None:
        """Read a stream too; see `HubStream.add`."""
        earlier = [each for each in self._streams if (each.rank, each.std) == (stream.rank, stream.std)]
        missed = self._leave(earlier[0]) if len(earlier) >= KEPT_ATTEMPTS else 0
        self._streams.append(stream)
        stream.add(self, live=live)
        if missed:
            earlier[1].miss(self, missed)

    def _leave(self, stream: HubStream) -> int:
        """Give up an attempt that was over long ago; return how many lines of it were not read."""
        self._streams.remove(stream)
        left = [entry for entry in self._ready if entry[2] is stream]
        self._ready = [entry for entry in self._ready if entry[2] is not stream]
        heapq.heapify(self._ready)
        for *_, cursor in left:
            self._queued.discard(cursor)
            self._unfinished.pop(cursor, None)
        return stream.remove(self)

    def has_more(self, stream: HubStream, cursor: Cursor) -> None:
        """Take note that a cursor may find something."""
        if cursor not in self._queued:
            self._queued.add(cursor)
            self._order += 1
            heapq.heappush(self._ready, (cursor.next_at_ns, self._order, stream, cursor))
            self.wake()

    def wake(self) -> None:
        """Let those that wait look again."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def next_nowait(self) -> LogLine | None:
        """The next line if it is there: the oldest over all streams, as far as the time of reading tells."""
        while self._ready:
            _, _, stream, cursor = self._ready[0]
            raw = cursor.next()
            if raw is None or cursor.at_edge:
                self._leave_chunk(stream, cursor, more=raw is not None)
            if raw is not None:
                self._unfinished.pop(cursor, None)
                return _log_line(stream, raw)
        return self._next_partial()

    def _leave_chunk(self, stream: HubStream, cursor: Cursor, *, more: bool) -> None:
        """Let the stream whose next chunk is the oldest be the next; the lines of one chunk have one time."""
        heapq.heappop(self._ready)
        self._queued.discard(cursor)
        if self.lossless:
            stream.on_room()
        if more:
            self.has_more(stream, cursor)
        elif stream.tail.ended:  # of an attempt that is over, perhaps one of thousands
            self._streams.remove(stream)
            stream.remove(self)
        elif self._partials and cursor.unfinished() is not None:
            self._unfinished[cursor] = stream

    def _next_partial(self) -> LogLine | None:
        if not self._unfinished:
            return None
        now = asyncio.get_running_loop().time()
        for cursor, stream in list(self._unfinished.items()):
            if now >= stream.last_at + QUIET:
                del self._unfinished[cursor]
                raw = cursor.unfinished()
                if raw is not None:
                    return _log_line(stream, raw)
        return None

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> LogLine:
        self._served += 1
        if self._served % BURST == 0:
            await asyncio.sleep(0)
        while not self._closed:
            line = self.next_nowait()
            if line is not None:
                return line
            if self._hub.finished:
                await self.aclose()
                break
            await self._more()
        raise StopAsyncIteration

    async def _more(self) -> None:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.add(waiter)
        quiet_at = min((stream.last_at for stream in self._unfinished.values()), default=None)
        timer = None if quiet_at is None else loop.call_at(quiet_at + QUIET, self.wake)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    async def aclose(self) -> None:
        """End the subscription; whoever waits for a line, and further reads, end at once. Idempotent."""
        self.close_nowait()

    def close_nowait(self) -> None:
        """As `aclose`."""
        self._closed = True
        self._ready.clear()
        self._queued.clear()
        self._unfinished.clear()
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.remove(self)
        self.wake()

    async def __aenter__(self) -> Lines:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


def _log_line(stream: HubStream, raw: RawLine) -> LogLine:
    return LogLine(
        rank=stream.rank,
        attempt=stream.attempt,
        std=stream.std,
        number=raw.number,
        text=raw.data.decode("utf-8", "replace"),
        at=datetime.fromtimestamp(raw.at_ns / 1e9, UTC),
        partial=raw.partial,
        truncated=raw.truncated,
        skipped=raw.skipped,
    )
