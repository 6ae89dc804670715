"""How long until a gang runs again, after one of its 8 ranks was killed?

From the SIGKILL of one rank to the last `WorkerStarted` of the next attempt, without backoff: the exit is seen, the
others are stopped, everything is drained and closed, and 8 are started again. The rival is a fresh start of 8, from the
call to the last rank started, in a process that has started such a run before.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator

from aelastic import (
    Backoff,
    DefaultLogsSpecs,
    PContext,
    RestartPolicy,
    Std,
    StopPolicy,
    WorkerStarted,
    start_processes,
)

from ._measure import OURS, Question, Sizes, alone, at_most, take_turns
from ._writers import log_directory

RANKS = 8
RESTARTS = 5
"""In one process."""
FRESH = "a fresh start of 8"
RESTART = RestartPolicy(max_restarts=RESTARTS, backoff=Backoff(initial=0.0))
STOP = StopPolicy(steps=((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)))


def questions(sizes: Sizes) -> Iterator[Question]:
    samples = take_turns(
        sizes.rounds,
        {
            OURS: functools.partial(alone, "restart:ours", directory=sizes.directory),
            FRESH: functools.partial(alone, "restart:fresh", directory=sizes.directory),
        },
    )
    yield Question(
        f"SIGKILL of one of {RANKS} ranks to the next attempt's last start, both streams tee'd", "ms", samples,
        at_most(samples, FRESH, 2.0),
    )  # fmt: skip


async def start(log_dir: str) -> PContext:
    return await start_processes(
        "bench",
        "sleep",
        args=dict.fromkeys(range(RANKS), ("120",)),
        logs_specs=DefaultLogsSpecs(log_dir, tee=Std.ALL),
        stop=STOP,
        restart=RESTART,
    )


async def ours(directory: str) -> list[float]:
    times: list[float] = []
    with log_directory(directory) as log_dir:
        async with await start(log_dir) as ctx:
            events = ctx.events(replay=False)
            for restart in range(RESTARTS):
                began = time.perf_counter()
                os.kill(ctx.pids()[restart % RANKS], signal.SIGKILL)
                for _ in range(RANKS):
                    while not isinstance(await anext(events), WorkerStarted):
                        pass
                times.append((time.perf_counter() - began) * 1e3)
    return times


async def fresh(directory: str) -> list[float]:
    times: list[float] = []
    for _ in range(RESTARTS + 1):
        with log_directory(directory) as log_dir:
            began = time.perf_counter()
            ctx = await start(log_dir)
            times.append((time.perf_counter() - began) * 1e3)
            await ctx.close()
    return times[1:]
