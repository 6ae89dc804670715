"""What does the guard cost: memory, CPU once, CPU while idle, and time of the first start?

The rivals: a bare `python -I -S` that sleeps, and a bare `create_subprocess_exec` for the start.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from aelastic import start_processes

from ._measure import OURS, Question, Sizes, alone, below, median, take_turns
from .startup import COMMAND, KILL

PYTHON = "bare python -I -S"
BARE = "bare create_subprocess_exec"
BOOT = 1.0
IDLE = 3.0
RANKS = 4


def questions(sizes: Sizes) -> Iterator[Question]:
    turns: dict[str, list[list[float]]] = {OURS: [], PYTHON: []}

    def measure(who: str, target: str) -> list[float]:
        turns[who].append(alone(target))
        return []

    take_turns(
        min(sizes.rounds, 3), {OURS: lambda: measure(OURS, "guard:ours"), PYTHON: lambda: measure(PYTHON, "guard:bare")}
    )
    for index, (title, unit, limit) in enumerate(
        [
            ("guard: resident memory", "MiB", 12.0),
            (f"guard: CPU of its boot and {RANKS} workers", "ms", 60.0),
            (f"guard: CPU while idle for {IDLE:g} s", "ms", 0.1),
        ]
    ):
        samples = {who: [turn[index] for turn in of_who] for who, of_who in turns.items()}
        yield Question(title, unit, samples, [below("ours", median(samples[OURS]), limit, unit)])
    yield start_time(sizes)


async def ours() -> list[float]:
    """Resident MiB, milliseconds of CPU after the boot, and of idle time."""
    async with start_processes("bench", COMMAND[0], args=dict.fromkeys(range(RANKS), COMMAND[1:]), stop=KILL):
        return await costs_of(guard_pid())


def guard_pid() -> int:
    """The guard is a child of this process that runs `guard.py`."""
    children = Path("/proc/self/task").glob("*/children")
    for pid in (int(word) for file in children for word in file.read_text().split()):
        if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise RuntimeError("no guard is running")


async def bare() -> list[float]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)")
    try:
        return await costs_of(process.pid)
    finally:
        process.kill()
        await process.wait()


async def costs_of(pid: int) -> list[float]:
    await asyncio.sleep(BOOT)
    booted = cpu_of(pid)
    await asyncio.sleep(IDLE)
    return [resident_of(pid), booted, cpu_of(pid) - booted]


def cpu_of(pid: int) -> float:
    """Milliseconds on a processor, to the nanosecond: utime and stime count in steps of 10 ms."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def resident_of(pid: int) -> float:
    """Resident memory in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory: it has ended")


def start_time(sizes: Sizes) -> Question:
    """The first start of a process includes the guard's; it boots in 30 ms or so, which nobody is to wait for."""
    samples = take_turns(
        2 * sizes.rounds, {OURS: lambda: alone("guard:start_ours"), BARE: lambda: alone("guard:start_bare")}
    )
    extra = median(samples[OURS]) - median(samples[BARE])
    return Question(
        "start of 1 rank, the guard's start included", "ms", samples, [below("more than bare", extra, 15.0, "ms")]
    )


async def start_ours() -> list[float]:
    began = time.perf_counter()
    ctx = await start_processes("bench", COMMAND[0], args={0: COMMAND[1:]}, stop=KILL)
    seconds = time.perf_counter() - began
    await ctx.close()
    return [seconds * 1e3]


async def start_bare() -> list[float]:
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*COMMAND)
    seconds = time.perf_counter() - began
    process.kill()
    await process.wait()
    return [seconds * 1e3]
