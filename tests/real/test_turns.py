"""Whose turn it is to read: one turn each in one iteration of the loop, first come, first served."""

from __future__ import annotations

import asyncio
import time

import pytest

from aelastic._logs import turns
from aelastic._logs.turns import Turns

pytestmark = pytest.mark.one_loop


class Endless:
    """A stream that always has more; notes in which iteration it had its turns."""

    def __init__(self, name: str, log: list[tuple[str, int]], busy: float = 0.0) -> None:
        self.name = name
        self.log = log
        self.busy = busy
        self.iteration = 0

    def read(self, until: float) -> bool:
        self.log.append((self.name, self.iteration))
        end = time.perf_counter() + self.busy
        while time.perf_counter() < end:
            pass
        return self.iteration < 5


async def iterations(readers: list[Endless]) -> None:
    for number in range(6):
        for reader in readers:
            reader.iteration = number
        await asyncio.sleep(0)


async def test_a_stream_that_never_ends_has_one_turn_in_an_iteration() -> None:
    """What others wait for, a disk that has written its batch among them, happens between two turns."""
    log: list[tuple[str, int]] = []
    readers = [Endless("a", log), Endless("b", log)]
    for reader in readers:
        Turns.of_running_loop().ready(reader)
    await iterations(readers)
    assert len(log) == len(set(log))  # nobody twice in one
    assert [name for name, _ in log] == ["a", "b"] * (len(log) // 2)


async def test_who_found_no_time_in_an_iteration_is_first_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stalls add up over all that is ready, so there is a bound for all of them."""
    monkeypatch.setattr(turns, "ITERATION", 0.002)
    log: list[tuple[str, int]] = []
    readers = [Endless(name, log, busy=0.0015) for name in "abc"]
    for reader in readers:
        Turns.of_running_loop().ready(reader)
    await iterations(readers)
    assert [name for name, _ in log[:6]] == list("abcabc")
    assert len({iteration for _, iteration in log[:3]}) > 1
