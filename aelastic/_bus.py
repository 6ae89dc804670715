"""Delivery of events: one bus a run, any number of subscribers, each at its own pace.

A stream owns the newest events, a bus their sequence numbers as well. Neither ever waits for a reader.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, final

from ._events import Event
from ._tasks import first_of

KEPT = 10_000
"""Events a run keeps for readers that come late or fall behind."""


class Stream:
    """Events in the order in which they came, and their readers."""

    def __init__(self) -> None:
        self.closed = False
        self.onward: Stream | None = None
        """Gets every event too: of the supervisor above."""
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._count = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def deliver(self, event: Event) -> None:
        """Keep an event and wake the readers; never blocks."""
        self._kept.append(event)
        self._count += 1
        self._wake()
        if self.onward is not None:
            self.onward.deliver(event)

    def close(self) -> None:
        """Say that no event follows; readers end after the last one."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def subscribe(self, *, replay: bool) -> Events:
        """Begin to read: at the oldest kept event, or at the next one."""
        return Events(self, 0 if replay else self._count)

    def at_or_after(self, place: int) -> tuple[int, Event] | None:
        """The oldest kept event at `place` or later, and its own place; None when it has not come yet."""
        first = self._count - len(self._kept)
        place = max(place, first)
        return (place, self._kept[place - first]) if place < self._count else None

    async def next(self, place: int) -> tuple[int, Event] | None:
        """Wait for the first event at `place` or later; None when there will be none."""
        while (found := self.at_or_after(place)) is None and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return found

    async def news(self, *ends: asyncio.Future[Any]) -> None:
        """Wait for the next event, the end of all events, or one of these."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            if not self.closed:
                await first_of(waiter, *ends)
        finally:
            self._waiting.discard(waiter)


@final
class Bus(Stream):
    """The events of one run, numbered in order."""

    def __init__(self, name: str, run_id: str) -> None:
        super().__init__()
        self.attempt = 0
        """The highest that any event told."""
        self.journal: Callable[[Event], None] | None = None
        """Is given every event as it is numbered."""
        self._name = name
        self._run_id = run_id
        self._next_seq = 0

    def publish(self, fact: Event, *, attempt: int | None = None) -> None:
        """Number a fact, keep it and wake the readers; never blocks.

        Args:
            fact: with its own fields; place and time are filled in here.
            attempt: to which it belongs; None means the highest.
        """
        self.deliver(self.number(fact, attempt=attempt))

    def number(self, fact: Event, *, attempt: int | None = None) -> Event:
        """Give a fact its place and time, and write it to the journal; no reader sees it yet."""
        self.attempt = max(self.attempt, attempt or 0)
        event = dataclasses.replace(
            fact,
            seq=self._next_seq,
            at=datetime.now(UTC),
            monotonic_ns=time.monotonic_ns(),
            name=self._name,
            run_id=self._run_id,
            attempt=self.attempt if attempt is None else attempt,
        )
        self._next_seq += 1
        if self.journal is not None:
            self.journal(event)
        return event


@final
class Events:
    """One subscription: an async iterator over a run's events, ended by `RunFinished`, or over a supervisor's.

    Reading slowly, or not at all, holds up nothing; `Event.seq` then shows a gap.

    Cancellation: only the waiting is stopped; the next read goes on where this one was.
    """

    def __init__(self, stream: Stream, place: int) -> None:
        self._stream = stream
        self._place = place
        self._closed = False

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        found = None if self._closed else await self._stream.next(self._place)
        if found is None or self._closed:
            raise StopAsyncIteration
        self._place = found[0] + 1
        return found[1]

    async def aclose(self) -> None:
        """End the subscription; further reads end at once."""
        self._closed = True

    async def __aenter__(self) -> Events:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
