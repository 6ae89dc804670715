"""How soon is it known that a rank is ready, or that it is stuck, and what does being watched cost a start?

The rivals: a script's usual way to wait (a file that is looked for every 0.1 s), a bare loop that kills after a second
and shows nothing, and our own start without a `HealthPolicy`.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aelastic import DefaultLogsSpecs, HealthPolicy, LinePattern, Notify, Std, StopPolicy, WorkerExited, start_processes

from ._measure import OURS, ROOT, Question, Sizes, alone, at_most, below, median, take_turns

TURNS = 5
"""Workers that get ready, one after the other, in one process."""
KILL = StopPolicy(steps=((signal.SIGKILL, 5.0),))
CAPTURED = DefaultLogsSpecs(capture=Std.ALL)
WATCHDOG = 1.0
PRELUDE = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); from aelastic import worker\n"
GETS_READY = PRELUDE + (
    "time.sleep(0.2); import socket\n"
    "open(sys.argv[1] + '.new', 'w').write(str(time.monotonic_ns()))\n"
    "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "worker.ready(); print('ready', flush=True); signal.pause()"
)
"""Writes down when it is ready, says so, prints it."""
GETS_STUCK = PRELUDE + (
    "import ctypes\n"
    "@worker.record\n"
    "def main():\n"
    "    read, write = os.pipe(); worker.ready()\n"
    "    open(sys.argv[1], 'w').write(str(time.monotonic_ns()))\n"
    "    ctypes.PyDLL(None).read(read, ctypes.create_string_buffer(1), 1)\n"
    "main()"
)
"""Says that it is ready, and then sits in C with the interpreter locked."""


def questions(sizes: Sizes) -> Iterator[Question]:
    polling = "a file looked for every 0.1 s"
    samples = turns(sizes, {OURS: "ready_said", "aelastic, LinePattern": "ready_printed", polling: "ready_polled"})
    yield Question("from being ready to being known to be", "ms", samples, at_most(samples, polling, 0.2))
    bare = "sleep a second, and kill"
    samples = turns(sizes, {OURS: "stuck_ours", bare: "stuck_bare"})
    late = below("beyond the watchdog's second", median(samples[OURS]) - 1e3 * WATCHDOG, 150, "ms")
    yield Question("from the last heartbeat to the exit, stacks written", "ms", samples, [late])
    samples = turns(sizes, {OURS: "start_watched", "aelastic, no policy": "start_unwatched"}, ranks=sizes.ranks)
    yield Question(
        f"start {sizes.ranks} commands, watched", "ms", samples, at_most(samples, "aelastic, no policy", 1.25)
    )


def turns(sizes: Sizes, contenders: dict[str, str], **arguments: int) -> dict[str, list[float]]:
    return take_turns(
        sizes.rounds,
        {who: functools.partial(alone, f"health:{name}", **arguments) for who, name in contenders.items()},
    )


async def ready_said() -> list[float]:
    return await ready_by(HealthPolicy(ready=Notify()))


async def ready_printed() -> list[float]:
    return await ready_by(HealthPolicy(ready=LinePattern("^ready$")))


async def ready_by(health: HealthPolicy) -> list[float]:
    times: list[float] = []
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ready")
            run = start_processes(
                "bench", sys.executable, {0: ("-c", GETS_READY, path)}, logs_specs=CAPTURED, stop=KILL, health=health
            )
            async with run as ctx:
                await ctx.wait_ready()
                times.append((time.monotonic_ns() - instant(path)) / 1e6)
    return times


async def ready_polled() -> list[float]:
    times: list[float] = []
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ready")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", GETS_READY, path, stdout=asyncio.subprocess.DEVNULL
            )
            while not instant(path):
                await asyncio.sleep(0.1)
            times.append((time.monotonic_ns() - instant(path)) / 1e6)
            process.kill()
            await process.wait()
    return times


def text(path: Path) -> str:
    """What a file holds; empty while there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def instant(path: Path) -> int:
    """When a worker wrote it, on the host's monotonic clock; 0 before."""
    return int(text(path) or 0)


async def stuck_ours() -> list[float]:
    health = HealthPolicy(ready=Notify(), watchdog=WATCHDOG)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stuck")
        logs = DefaultLogsSpecs(folder, redirects=Std.ALL)
        run = start_processes(
            "bench", sys.executable, {0: ("-c", GETS_STUCK, path)}, logs_specs=logs, stop=KILL, health=health
        )
        async with run as ctx:
            result = await ctx.wait()
            exits = [event.monotonic_ns async for event in ctx.events() if isinstance(event, WorkerExited)]
        if "in main" not in text(Path(result.stderrs[0])):
            raise RuntimeError("there are no stacks in its log")
        return [(exits[0] - instant(path)) / 1e6]


async def stuck_bare() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stuck")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", GETS_STUCK, path)
        while not instant(path):
            await asyncio.sleep(0.001)
        await asyncio.sleep(WATCHDOG)
        process.kill()
        await process.wait()
        return [(time.monotonic_ns() - instant(path)) / 1e6]


async def start_watched(ranks: int) -> list[float]:
    return await start(ranks, HealthPolicy(ready=Notify() | LinePattern("never"), watchdog=60.0))


async def start_unwatched(ranks: int) -> list[float]:
    return await start(ranks, None)


async def start(ranks: int, health: HealthPolicy | None) -> list[float]:
    times: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        run = start_processes(
            "bench", "sleep", dict.fromkeys(range(ranks), ("120",)), logs_specs=CAPTURED, stop=KILL, health=health
        )
        async with run:
            times.append((time.perf_counter() - began) * 1e3)
    return times
