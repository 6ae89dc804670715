"""How soon is the death of one of 64 workers known, and what does watching them cost while nothing happens?

The rivals: a bare `await process.wait()` for each of 64 processes, and torch's `wait` for the idle part. The streams of
our workers are tee'd, the rivals' are discarded. Latency is from `os.kill` to the code that waits.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aelastic import DefaultLogsSpecs, PContext, Std, StopPolicy, WorkerExited, start_processes

from ._measure import OURS, Alone, Question, Sizes, alone, below, has_torch, median, p99, take_turns, torch_name
from ._writers import log_directory
from .startup import COMMAND, KILL, end

BARE = "bare await process.wait()"
KILLS = 24
"""In one turn."""
PAUSE = 0.05
"""Seconds between two kills: one death is looked at, not what is left to do after another."""
SETTLE = 1.0
"""Seconds after the start before anything counts: the guard's boot is not watching."""


def questions(sizes: Sizes) -> Iterator[Question]:
    yield latency(sizes)
    yield idleness(sizes)


def latency(sizes: Sizes) -> Question:
    samples = take_turns(
        sizes.rounds,
        {
            OURS: functools.partial(alone, "exit_latency:ours", ranks=sizes.ranks, directory=sizes.directory),
            BARE: functools.partial(alone, "exit_latency:bare", ranks=sizes.ranks),
        },
    )
    bound = max(2 * median(samples[BARE]), median(samples[BARE]) + 1)  # twice, or one millisecond more
    verdicts = [
        below("median of ours, by bare's", median(samples[OURS]), bound, "ms"),
        below("p99 of ours", p99(samples[OURS]), 20.0, "ms"),
    ]
    return Question(f"SIGKILL of one of {sizes.ranks} to who waits for it", "ms", samples, verdicts)


async def ours(ranks: int, directory: str) -> list[float]:
    async with started(ranks, directory, StopPolicy(steps=KILL.steps, on_failure="continue")) as ctx:
        await asyncio.sleep(SETTLE)
        return await kill_some(ctx)


@asynccontextmanager
async def started(ranks: int, directory: str, stop: StopPolicy) -> AsyncIterator[PContext]:
    """A run of sleeping ranks, both streams tee'd."""
    with log_directory(directory) as log_dir:
        async with start_processes(
            "bench",
            COMMAND[0],
            args=dict.fromkeys(range(ranks), COMMAND[1:]),
            logs_specs=DefaultLogsSpecs(log_dir, tee=Std.ALL),
            stop=stop,
        ) as ctx:
            yield ctx


async def kill_some(ctx: PContext) -> list[float]:
    """Kill rank after rank; how long each event took, in milliseconds."""
    times: list[float] = []
    events = ctx.events(replay=False)
    for rank, pid in list(ctx.pids().items())[:KILLS]:
        await asyncio.sleep(PAUSE)
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        async for event in events:
            if isinstance(event, WorkerExited) and event.rank == rank:
                break
        times.append((time.perf_counter() - killed) * 1e3)
    return times


async def bare(ranks: int) -> list[float]:
    processes = await sleepers(ranks)
    waits = [asyncio.create_task(process.wait()) for process in processes]
    await asyncio.sleep(SETTLE)
    times: list[float] = []
    for process, wait in list(zip(processes, waits, strict=True))[:KILLS]:
        await asyncio.sleep(PAUSE)
        killed = time.perf_counter()
        os.kill(process.pid, signal.SIGKILL)
        await wait
        times.append((time.perf_counter() - killed) * 1e3)
    await end(processes)
    return times


async def sleepers(ranks: int) -> list[asyncio.subprocess.Process]:
    """What a bare loop has in place of a run."""
    nowhere = asyncio.subprocess.DEVNULL
    return [
        await asyncio.create_subprocess_exec(*COMMAND, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        for _ in range(ranks)
    ]


def idleness(sizes: Sizes) -> Question:
    """All contenders idle at the same time: nobody disturbs anybody."""
    contenders = {OURS: "exit_latency:ours_idle", BARE: "exit_latency:bare_idle"}
    if has_torch():
        contenders[torch_name()] = "exit_latency:torch_idle"
    running = {
        who: Alone(target, ranks=sizes.ranks, directory=sizes.directory, seconds=sizes.seconds)
        for who, target in contenders.items()
    }
    samples = {who: [contender.result()] for who, contender in running.items()}
    verdicts = [below("CPU of ours", samples[OURS][0], 2.0 * sizes.seconds, "ms")]
    return Question(f"CPU of watching {sizes.ranks} idle workers for {sizes.seconds:g} s", "ms", samples, verdicts)


async def ours_idle(ranks: int, directory: str, seconds: float) -> float:
    async with started(ranks, directory, KILL) as ctx:
        wait = asyncio.create_task(ctx.wait())
        await asyncio.sleep(SETTLE)
        cpu = await idle_cpu(seconds)
        await ctx.close()
        await wait
        return cpu


async def bare_idle(ranks: int, directory: str, seconds: float) -> float:
    del directory
    processes = await sleepers(ranks)
    waits = [asyncio.create_task(process.wait()) for process in processes]
    await asyncio.sleep(SETTLE)
    cpu = await idle_cpu(seconds)
    await end(processes)
    await asyncio.wait(waits)
    return cpu


async def idle_cpu(seconds: float) -> float:
    """Milliseconds of CPU that this process takes while it sleeps."""
    before = time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - before) * 1e3


def torch_idle(ranks: int, directory: str, seconds: float) -> float:
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing")
    with log_directory(directory) as log_dir:
        ctx = elastic.start_processes(
            "bench",
            COMMAND[0],
            args=dict.fromkeys(range(ranks), COMMAND[1:]),
            envs={rank: {} for rank in range(ranks)},
            logs_specs=elastic.DefaultLogsSpecs(log_dir, tee=elastic.Std.ALL),
        )
        ctx.wait(SETTLE)
        before = time.process_time()
        ctx.wait(seconds)
        cpu = (time.process_time() - before) * 1e3
        ctx.close(death_sig=signal.SIGKILL, timeout=5)
        return cpu
