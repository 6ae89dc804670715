"""Thousands of short lives: no exit is lost, no stranger is signalled, and nothing adds up.

The default run does a small number of each; AELASTIC_TEST_LONG=1 does 10,000 races and 1,000 launches.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from aelastic import DefaultLogsSpecs, PContext, RunProcsResult, Starting, Std, WorkerExited, start_processes
from tests import leaks
from tests.real.children import LAST_PID, next_pid
from tests.real.runs import QUICK
from tests.ways_to_die import DEAF_TO_TERM

LONG = bool(os.environ.get("AELASTIC_TEST_LONG"))
RANKS = 20
PARTS, RACES = (10, 1_000) if LONG else (1, 200)
LAUNCHES = 1_000 if LONG else 100
CODE = 7
CAN_CHOOSE = LAST_PID.exists() and os.getuid() == 0
"""Whether a pid can be given to a process of one's choice."""
POLICY = replace(QUICK, on_failure="continue")


async def raced(pause: float, strangers: list[subprocess.Popen[bytes]]) -> RunProcsResult:
    """Start ranks that end at once, and one that must be killed; give some of the freed numbers to strangers; stop."""
    # The last rank holds the stop up, so that it is under way when the numbers have been given away.
    args = dict.fromkeys(range(RANKS), ("sh", "-c", f"exit {CODE}")) | {RANKS - 1: DEAF_TO_TERM.argv}
    logs = DefaultLogsSpecs(capture=Std.OUT)
    ctx: PContext = await start_processes("race", "env", args, stop=POLICY, logs_specs=logs)
    await ctx.wait_for_line("ready", rank=RANKS - 1)
    exits = 0
    async for event in ctx.events():
        if not isinstance(event, WorkerExited):
            continue
        if event.rank % 5 == 0 and CAN_CHOOSE and (stranger := given(event.pid)) is not None:
            strangers.append(stranger)
        exits += 1
        if exits == RANKS - 1:
            break
    await asyncio.sleep(pause)
    await ctx.close(timeout=0.02)
    return await ctx.wait()


def given(pid: int) -> subprocess.Popen[bytes] | None:
    """A stranger of this number, leader of a session and group; None where it can't be had."""
    for _ in range(20):
        with next_pid(pid):
            stranger = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
        if stranger.pid == pid:
            return stranger
        ended(stranger)
    return None


def ended(stranger: subprocess.Popen[bytes]) -> int:
    """End a stranger; how it ended."""
    stranger.kill()
    return stranger.wait()


@contextmanager
def visitors() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Strangers that must be alive at the end of the block."""
    strangers: list[subprocess.Popen[bytes]] = []
    try:
        yield strangers
        assert [stranger.poll() for stranger in strangers] == [None] * len(strangers)
    finally:
        for stranger in strangers:
            ended(stranger)


@pytest.mark.parametrize("part", range(PARTS))
async def test_starts_and_stops_race_with_exits_and_reused_numbers(part: int) -> None:
    """Every rank's exit is told as it was, and whoever got a number of ours is left alone."""
    chance = random.Random(5 + part)
    met = 0
    async with beside():
        for _ in range(RACES // RANKS):
            with visitors() as strangers:
                result = await raced(chance.uniform(0, 0.005), strangers)
                met += len(strangers)
            assert set(result.exits) == set(range(RANKS))
            assert [result.exits[rank].code for rank in range(RANKS - 1)] == [CODE] * (RANKS - 1)
            assert result.exits[RANKS - 1].signal == signal.SIGKILL
            assert result.survivors == ()
    assert met >= RACES // RANKS or not CAN_CHOOSE


@pytest.mark.parametrize("part", range(PARTS))
async def test_a_stop_at_any_moment_of_a_start_races_with_exits(part: int) -> None:
    """What was started has one status, its own or that of our signal."""
    chance = random.Random(7 + part)
    async with beside():
        for _ in range(RACES // RANKS):
            ctx: PContext = await start_processes(
                "race", "sh", dict.fromkeys(range(RANKS), ("-c", f"exit {CODE}")), stop=POLICY
            )
            await asyncio.sleep(chance.uniform(0, 0.003))
            await ctx.close(chance.choice([signal.SIGTERM, signal.SIGKILL]))
            result = await ctx.wait()
            assert set(result.exits) == set(range(RANKS))
            statuses = {(status.code, status.signal) for status in result.exits.values()}
            assert statuses <= {(CODE, None), (None, signal.SIGTERM), (None, signal.SIGKILL)}


def beside() -> Starting:
    """A run beside, so that each doesn't start a guard of its own."""
    return start_processes("beside", "sleep", {0: ("600",)})


async def launch(directory: Path) -> None:
    """A short run with everything: both streams to files and subscribers, a journal, an error file."""
    logs = DefaultLogsSpecs(str(directory), redirects=Std.ERR, capture=Std.OUT)
    async with start_processes("short", "echo", {0: ("hello",)}, logs_specs=logs) as ctx:
        lines = [line.text async for line in ctx.lines(std=Std.OUT)]
        result = await ctx.wait()
    assert (lines, result.outcome) == (["hello"], "succeeded")


async def test_launches_leave_nothing_that_adds_up(tmp_path: Path) -> None:
    """Descriptors, threads, children and memory are as before."""
    for _ in range(20):
        await launch(tmp_path)
    before, objects, resident = leaks.Snapshot.take(), count_objects(), resident_bytes()
    for _ in range(LAUNCHES):
        await launch(tmp_path)
    assert leaks.left_since(before) == []
    assert count_objects() <= objects
    assert resident_bytes() - resident < 4 << 20


def count_objects() -> int:
    """How many objects of our own the interpreter keeps; cancelled timers of the loop's come and go in thousands."""
    gc.collect()
    return sum(str(type(each).__module__).startswith("aelastic.") for each in gc.get_objects())


def resident_bytes() -> int:
    """Resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
