"""How long do 64 commands take to start, with both streams of each tee'd?

The rivals: a bare loop of `asyncio.create_subprocess_exec` that makes the same folders and files and hands them to the
children, and torch. Each time is from the call to the last rank started.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from aelastic import DefaultLogsSpecs, Std, StopPolicy, start_processes

from ._measure import OURS, Question, Sizes, alone, at_most, has_torch, take_turns, torch_name
from ._writers import log_directory

BARE = "bare create_subprocess_exec"
STARTS = 3
"""Starts in one process: a service starts more than one run."""
COMMAND = ("sleep", "120")
KILL = StopPolicy(steps=((signal.SIGKILL, 5.0),))


def questions(sizes: Sizes) -> Iterator[Question]:
    contenders = {OURS: "startup:ours", BARE: "startup:bare"}
    if has_torch():
        contenders[torch_name()] = "startup:torch"
    # Gone when all have had their turns: ext4 makes a file the slower the more were removed in the last minutes.
    with log_directory(sizes.directory) as directory:
        samples = take_turns(
            sizes.rounds,
            {
                who: functools.partial(alone, target, ranks=sizes.ranks, directory=directory)
                for who, target in contenders.items()
            },
        )
    verdicts = at_most(samples, BARE, 1.5) + (at_most(samples, torch_name(), 1.0) if has_torch() else [])
    yield Question(f"start {sizes.ranks} commands, both streams tee'd", "ms", samples, verdicts)


async def ours(ranks: int, directory: str) -> list[float]:
    times: list[float] = []
    for _ in range(STARTS):
        log_dir = tempfile.mkdtemp(dir=directory)
        began = time.perf_counter()
        ctx = await start_processes(
            "bench",
            COMMAND[0],
            args=dict.fromkeys(range(ranks), COMMAND[1:]),
            logs_specs=DefaultLogsSpecs(log_dir, tee=Std.ALL),
            stop=KILL,
        )
        times.append((time.perf_counter() - began) * 1e3)
        await ctx.close()
    return times


async def bare(ranks: int, directory: str) -> list[float]:
    times: list[float] = []
    for _ in range(STARTS):
        log_dir = tempfile.mkdtemp(dir=directory)
        began = time.perf_counter()
        processes = [await bare_rank(os.path.join(log_dir, "run", "attempt_0", str(rank))) for rank in range(ranks)]
        times.append((time.perf_counter() - began) * 1e3)
        await end(processes)
    return times


async def bare_rank(folder: str) -> asyncio.subprocess.Process:
    """Start one rank as an experienced user would by hand: its folder, its two files, its process."""
    os.makedirs(folder)
    fds = [os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT) for name in ("stdout.log", "stderr.log")]
    try:
        return await asyncio.create_subprocess_exec(
            *COMMAND, stdin=asyncio.subprocess.DEVNULL, stdout=fds[0], stderr=fds[1]
        )
    finally:
        for fd in fds:
            os.close(fd)


async def end(processes: list[asyncio.subprocess.Process]) -> None:
    """Kill what a bare loop started."""
    for process in processes:
        if process.returncode is None:
            process.kill()
    for process in processes:
        await process.wait()


def torch(ranks: int, directory: str) -> list[float]:
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing")
    times: list[float] = []
    for _ in range(STARTS):
        log_dir = tempfile.mkdtemp(dir=directory)
        began = time.perf_counter()
        ctx = elastic.start_processes(
            "bench",
            COMMAND[0],
            args=dict.fromkeys(range(ranks), COMMAND[1:]),
            envs={rank: {} for rank in range(ranks)},
            logs_specs=elastic.DefaultLogsSpecs(log_dir, tee=elastic.Std.ALL),
        )
        times.append((time.perf_counter() - began) * 1e3)
        ctx.close(death_sig=signal.SIGKILL, timeout=5)
    return times
