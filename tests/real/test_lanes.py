"""A few files of a loop are written at the same time; one that waits for its disk is no obstacle to the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aelastic._logs.files import FileSink
from aelastic._logs.lanes import COPIED_IN_A_SECOND, Lanes
from aelastic._threads import Threads
from tests.real.streams import until

LONG, SHORT = 60 * COPIED_IN_A_SECOND, 0
"""Bytes of a write that needs a processor for a minute, and of one that never does."""


class Write:
    """One that goes on until it is told to end."""

    def __init__(self, lanes: Lanes, size: int = LONG) -> None:
        self.begun = False
        self.end = asyncio.Event()
        self.task = asyncio.ensure_future(self._go(lanes, size))

    async def _go(self, lanes: Lanes, size: int) -> None:
        async with lanes.one(size):
            self.begun = True
            await self.end.wait()


async def turns() -> None:
    """A few turns of the loop, in which whatever may begin begins."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_as_many_write_as_there_are_lanes_first_come_first_served() -> None:
    lanes = Lanes(2)
    writes = [Write(lanes) for _ in range(5)]
    await turns()
    assert [write.begun for write in writes] == [True, True, False, False, False]
    writes[1].end.set()
    await turns()
    late = Write(lanes)
    await turns()
    assert [write.begun for write in writes] == [True, True, True, False, False]
    for write in (*writes, late):
        write.end.set()
    await asyncio.gather(*(write.task for write in (*writes, late)))


async def test_a_write_that_lasts_for_longer_than_its_bytes_gives_its_lane_away() -> None:
    """It waits for its disk: many disks that are slow, or hang, are waited for at the same time."""
    lanes = Lanes(1)
    slow = [Write(lanes, COPIED_IN_A_SECOND // 1000) for _ in range(50)]
    began = asyncio.get_running_loop().time()
    await until(lambda: all(write.begun for write in slow))
    assert asyncio.get_running_loop().time() - began >= 0.04  # one after the other, a millisecond each
    prompt = Write(lanes, SHORT)
    await until(lambda: prompt.begun)
    for write in (*slow, prompt):
        write.end.set()
    await asyncio.gather(*(write.task for write in (*slow, prompt)))


@pytest.mark.parametrize("step", range(4))
async def test_who_is_cancelled_leaves_the_line_and_the_lane_to_others(step: int) -> None:
    """Cancelled in the line, in the very turn in which it is let in, and within."""
    lanes = Lanes(1)
    first, second, third = (Write(lanes) for _ in range(3))
    await turns()
    if step:
        first.end.set()
    for _ in range(step - 1):
        await asyncio.sleep(0)
    second.task.cancel()
    first.end.set()
    await turns()
    assert second.task.cancelled()
    assert third.begun
    third.end.set()
    await asyncio.gather(first.task, third.task)


async def test_a_file_that_waits_in_line_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long those before it take: it is no disk that doesn't answer."""
    monkeypatch.setattr("aelastic._logs.files.GIVEN_UP_AFTER", 0.5)
    lost = list[tuple[int, str]]()
    lanes = Lanes.of_running_loop()
    others = [Write(lanes) for _ in range(64)]
    await turns()
    assert not all(write.begun for write in others)
    executor = Threads("test disk", 1)
    sink = FileSink(
        str(tmp_path / "log"), executor=executor, buffer_bytes=1 << 20, on_lost=lambda *what: lost.append(what),
        on_room=lambda: None, on_broken=lambda error: None,
    )  # fmt: skip
    sink.start()
    sink.put(b"x" * 100_000, 0)
    finishing = asyncio.ensure_future(sink.finish())
    await asyncio.wait({finishing}, timeout=1.2)  # twice as long as a disk that hangs is waited for
    assert not finishing.done()
    for write in others:
        write.end.set()
    await finishing
    assert (tmp_path / "log").stat().st_size == 100_000
    assert lost == []
    await asyncio.gather(*(write.task for write in others))
    executor.close()
