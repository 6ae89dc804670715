"""Does the host's loop go on? A 1 ms ticker beside start, tee at full speed and close.

The rival is the same ticker beside a bare loop of `create_subprocess_exec`: it starts the same processes, lets
coreutils `tee` write the same bytes, and kills them. Each sample is the longest gap of a turn.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from aelastic import DefaultLogsSpecs, Std, start_processes

from ._measure import OURS, Question, Sizes, Verdict, alone, take_turns
from ._ticker import ticking
from ._writers import log_directory, supervised, writer
from .startup import COMMAND, KILL, bare_rank, end

BARE = "bare create_subprocess_exec"
WRITERS = 4
PHASES = ("start", "tee at full speed", "close")


def questions(sizes: Sizes) -> Iterator[Question]:
    size = sizes.megabytes * 1_000_000 // WRITERS // 100 * 100
    turns: dict[str, list[list[float]]] = {OURS: [], BARE: []}

    def measure(who: str, target: str) -> list[float]:
        turns[who].append(alone(target, ranks=sizes.ranks, size=size, directory=sizes.directory))
        return []

    take_turns(sizes.rounds, {OURS: lambda: measure(OURS, "ticker:ours"), BARE: lambda: measure(BARE, "ticker:bare")})
    for index, phase in enumerate(PHASES):
        samples = {who: [turn[index] for turn in of_who] for who, of_who in turns.items()}
        limit = max(20.0, *samples[BARE])
        longest = max(samples[OURS])
        verdict = Verdict(
            f"longest of ours {longest:.1f} ms; at most 20 ms, or bare's longest, was to be shown", longest <= limit
        )
        yield Question(f"longest gap of a 1 ms ticker: {phase}", "ms", samples, [verdict])


async def ours(ranks: int, size: int, directory: str) -> list[float]:
    with log_directory(directory) as log_dir:
        logs = DefaultLogsSpecs(log_dir, tee=Std.ALL)
        async with ticking() as start:
            ctx = await start_processes(
                "bench", COMMAND[0], args=dict.fromkeys(range(ranks), COMMAND[1:]), logs_specs=logs, stop=KILL
            )
        async with ticking() as tee:
            await supervised(WRITERS, 100, size, DefaultLogsSpecs(log_dir, tee=Std.OUT))
        async with ticking() as close:
            await ctx.close()
        return [max(start), max(tee), max(close)]


async def bare(ranks: int, size: int, directory: str) -> list[float]:
    with log_directory(directory) as log_dir:
        async with ticking() as start:
            processes = [await bare_rank(os.path.join(log_dir, str(rank))) for rank in range(ranks)]
        async with ticking() as tee:
            pipelines = [
                await asyncio.create_subprocess_exec(
                    "sh", "-c", '"$@" | tee "$0"', os.path.join(log_dir, f"{rank}.log"), *writer(100, size)
                )
                for rank in range(WRITERS)
            ]
            for pipeline in pipelines:
                await pipeline.wait()
        async with ticking() as close:
            await end(processes)
        return [max(start), max(tee), max(close)]
