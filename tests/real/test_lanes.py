"""A few files of a loop are written at the same time; one that waits for its disk is no obstacle to the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aelastic._logs.files import FileSink
from aelastic._logs.lanes import LASTS, Lanes
from aelastic._threads import Threads
from tests.real.streams import until


class Write:
    """One that goes on until it is told to end."""

    def __init__(self, lanes: Lanes) -> None:
        self.begun = False
        self.end = asyncio.Event()
        self.task = asyncio.ensure_future(self._go(lanes))

    async def _go(self, lanes: Lanes) -> None:
        async with lanes.one():
            self.begun = True
            await self.end.wait()


async def turns() -> None:
    """A few turns of the loop, in which whatever may begin begins."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_as_many_write_as_there_are_lanes_first_come_first_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aelastic._logs.lanes.LASTS", 60.0)
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


async def test_a_write_that_lasts_gives_its_lane_away() -> None:
    lanes = Lanes(1)
    hanging = [Write(lanes) for _ in range(3)]
    await until(lambda: all(write.begun for write in hanging))
    await asyncio.sleep(LASTS)
    prompt = Write(lanes)
    await turns()
    assert prompt.begun
    for write in (*hanging, prompt):
        write.end.set()
    await asyncio.gather(*(write.task for write in (*hanging, prompt)))


@pytest.mark.parametrize("step", range(4))
async def test_who_is_cancelled_leaves_the_line_and_the_lane_to_others(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled in the line, in the very turn in which it is let in, and within."""
    monkeypatch.setattr("aelastic._logs.lanes.LASTS", 60.0)
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
    monkeypatch.setattr("aelastic._logs.lanes.LASTS", 60.0)
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
