"""Delivery of events: one bus a run, any number of subscribers, each at its own pace.

The bus owns the sequence numbers and the newest events. It never waits for a reader.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import final

from ._events import Event

KEPT = 10_000
"""Events a run keeps for readers that come late or fall behind."""


@final
class Bus:
    """The events of one run, numbered in order."""

    def __init__(self, name: str, run_id: str) -> None:
        self.attempt = 0
        """The highest that any event told."""
        self.closed = False
        self.journal: Callable[[Event], None] | None = None
        """Is given every event as it is numbered."""
        self._name = name
        self._run_id = run_id
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._next_seq = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def next_seq(self) -> int:
        """The number of the next event."""
        return self._next_seq

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

    def deliver(self, event: Event) -> None:
        """Show a numbered event to the readers."""
        self._kept.append(event)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Say that no event follows; readers end after the last one."""
        self.closed = True
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def subscribe(self, *, replay: bool) -> Events:
        """Begin to read: at the oldest kept event, or at the next one."""
        return Events(self, 0 if replay else self._next_seq)

    def at_or_after(self, seq: int) -> Event | None:
        """The oldest kept event whose number is at least `seq`; None when it has not come yet."""
        if not self._kept or seq > self._kept[-1].seq:
            return None
        return self._kept[max(0, seq - self._kept[0].seq)]

    async def next(self, seq: int) -> Event | None:
        """Wait for the first event at `seq` or later; None when there will be none."""
        while (event := self.at_or_after(seq)) is None and not self.closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return event


@final
class Events:
    """One subscription: an async iterator over a run's events, ended by `RunFinished`.

    Reading slowly, or not at all, holds up nothing; `Event.seq` then shows a gap.

    Cancellation: only the waiting is stopped; the next read goes on where this one was.
    """

    def __init__(self, bus: Bus, seq: int) -> None:
        self._bus = bus
        self._seq = seq
        self._closed = False

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        event = None if self._closed else await self._bus.next(self._seq)
        if event is None or self._closed:
            raise StopAsyncIteration
        self._seq = event.seq + 1
        return event

    async def aclose(self) -> None:
        """End the subscription; further reads end at once."""
        self._closed = True

    async def __aenter__(self) -> Events:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
