"""Short calls on the disk go together, and one that hangs holds up no other."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aelastic._logs.desk import Desk
from aelastic._threads import Threads
from tests.real.streams import until


async def test_what_is_asked_for_at_one_time_is_one_job() -> None:
    """All calls of a turn of the loop run in one thread after the other, and each is told what came of it."""
    executor = Threads("test disk", 4)
    desk, told = Desk.of(executor), []
    threads: set[int] = set()
    for number in range(50):
        desk.ask(lambda: threads.add(threading.get_ident()), lambda error, number=number: told.append((number, error)))  # type: ignore[misc]
    desk.ask(lambda: 1 / 0, lambda error: told.append((50, type(error))))  # type: ignore[arg-type]
    await until(lambda: len(told) == 51)
    assert told == [*((number, None) for number in range(50)), (50, ZeroDivisionError)]
    assert len(threads) == 1
    with pytest.raises(ZeroDivisionError):
        await desk.run(lambda: 1 / 0)  # type: ignore[arg-type]
    executor.close()


async def test_a_call_that_hangs_holds_up_no_other() -> None:
    """Those behind it in the queue go on in another thread, and are told while it still hangs."""
    executor = Threads("test disk", 2)
    desk, told, answers = Desk.of(executor), [], threading.Event()
    desk.ask(lambda: (answers.wait(), None)[1], lambda error: told.append(0))
    for number in range(1, 10):
        desk.ask(lambda: None, lambda error, number=number: told.append(number))  # type: ignore[misc]
    await until(lambda: told == list(range(1, 10)))
    answers.set()
    await until(lambda: told == [*range(1, 10), 0])
    executor.close()


async def test_calls_for_one_time_have_one_timer() -> None:
    """They come when it is due, in order."""
    executor = Threads("test disk", 1)
    desk, called = Desk.of(executor), []
    loop = asyncio.get_running_loop()
    when = loop.time() + 0.01
    for number in range(3):
        desk.at(when, lambda number=number: called.append((number, loop.time() >= when - 0.005)))  # type: ignore[misc]
    await until(lambda: len(called) == 3)
    assert called == [(0, True), (1, True), (2, True)]
    executor.close()
