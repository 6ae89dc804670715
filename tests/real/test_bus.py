"""Events reach every reader, in order, at its own pace."""

from __future__ import annotations

import asyncio

from aelastic._bus import KEPT, Bus
from aelastic._events import AttemptStarted, Event


async def test_a_late_reader_gets_every_event_from_the_beginning() -> None:
    bus = Bus("job", "id")
    for _ in range(3):
        bus.publish(AttemptStarted())
    bus.close()
    assert [event.seq async for event in bus.subscribe(replay=True)] == [0, 1, 2]
    assert [event.seq async for event in bus.subscribe(replay=False)] == []


async def test_a_reader_that_falls_behind_sees_the_gap_in_the_numbers() -> None:
    bus = Bus("job", "id")
    slow = bus.subscribe(replay=True)
    for _ in range(KEPT + 5):
        bus.publish(AttemptStarted())
    bus.close()
    assert [event.seq async for event in slow] == list(range(5, KEPT + 5))


async def test_a_cancelled_read_loses_nothing() -> None:
    bus = Bus("job", "id")
    events = bus.subscribe(replay=True)
    read = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    read.cancel()
    await asyncio.wait({read})
    bus.publish(AttemptStarted())
    assert (await anext(events)).seq == 0


async def test_the_journal_has_an_event_before_any_reader() -> None:
    bus = Bus("job", "id")
    journalled: list[Event] = []
    bus.journal = journalled.append
    last = bus.number(AttemptStarted())
    assert journalled == [last]
    assert bus.at_or_after(0) is None
    bus.deliver(last)
    assert bus.at_or_after(0) == (0, last)
