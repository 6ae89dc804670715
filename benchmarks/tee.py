"""What does it cost to keep every byte and show every line?

Throughput with one worker and with eight, to a console that takes everything (/dev/null) and to one that is read
(`cat`), against coreutils `tee`, which adds no prefixes, and torch; one line's way to the console, and the CPU of many
chatty workers, against torch; short lines against long ones, by a ticker; and a redirect that nothing has to pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from aelastic import DefaultLogsSpecs, Std, start_processes

from ._measure import (
    OURS,
    Question,
    Sizes,
    Verdict,
    alone,
    at_least,
    at_most,
    below,
    cat,
    has_torch,
    median,
    p99,
    take_turns,
    torch_name,
)
from ._ticker import ticking
from ._writers import log_directory, supervised

TEE = "coreutils tee"
LONG, SHORT = "100-byte lines", "2-byte lines"
MEGA = 1_000_000
CHATTER = """
import sys, time
rank, pause, end = int(sys.argv[1]), float(sys.argv[2]), time.monotonic() + float(sys.argv[3])
time.sleep(pause * (rank % 16) / 16)
while time.monotonic() < end:
    time.sleep(pause)
    sys.stdout.write(f"said at {time.monotonic_ns()} by me\\n")
    sys.stdout.flush()
"""
SAID = re.compile(rb"said at (\d+) by me")
BOOT = 3.0
"""Seconds that all chatty workers have to boot; what is said before is not counted."""
CHAT = 5.0
"""Seconds of chatting that are."""


def questions(sizes: Sizes) -> Iterator[Question]:
    yield throughput(sizes, workers=1, console="/dev/null")
    yield throughput(sizes, workers=1, console="cat")
    yield throughput(sizes, workers=8, console="cat")
    yield short_lines(sizes)
    yield latency(sizes)
    yield chatter(sizes)
    yield redirect(sizes)


def throughput(sizes: Sizes, workers: int, console: str) -> Question:
    size = sizes.megabytes * MEGA // workers // 100 * 100
    contenders = {OURS: "_writers:ours", TEE: "_writers:coreutils"}
    if has_torch():
        contenders[torch_name()] = "_writers:torch"

    def rate(target: str) -> list[float]:
        with cat() if console == "cat" else contextlib.nullcontext(subprocess.DEVNULL) as stream:
            seconds = alone(target, stream, workers=workers, width=100, size=size, directory=sizes.directory)
        return [workers * size / seconds / MEGA]

    samples = take_turns(sizes.rounds, {who: functools.partial(rate, target) for who, target in contenders.items()})
    verdicts = at_least(samples, TEE, 0.9) if workers == 1 else []
    verdicts += at_least(samples, torch_name(), 1.6 if workers == 1 else 3.0) if has_torch() else []
    return Question(f"tee {sizes.megabytes} MB, {workers} worker(s), console {console}", "MB/s", samples, verdicts)


def short_lines(sizes: Sizes) -> Question:
    """The longest gap of each turn: a chunk of 2-byte lines costs 50 times what one of 100-byte lines does."""

    def gap(width: int, size: int) -> list[float]:
        gaps = alone("tee:gaps_of", width=width, size=size, directory=sizes.directory)
        return [max(gaps)]

    size = sizes.megabytes * MEGA
    samples = take_turns(sizes.rounds, {SHORT: lambda: gap(2, size // 20), LONG: lambda: gap(100, size)})
    limit = max(20.0, median(samples[LONG]))
    verdicts = [below("median of the longest gaps of 2-byte lines", median(samples[SHORT]), limit, "ms")]
    return Question("longest ticker gap while 1 worker is tee'd", "ms", samples, verdicts)


async def gaps_of(width: int, size: int, directory: str) -> list[float]:
    with log_directory(directory) as log_dir:
        async with ticking() as gaps:
            await supervised(1, width, size, DefaultLogsSpecs(log_dir, tee=Std.OUT))
        return gaps


def latency(sizes: Sizes) -> Question:
    """Every worker says a line each half second; how long each takes to the other end of the console's pipe."""
    samples = chatted(sizes, pause=0.5, what=0)
    verdicts = [
        below("p50 of ours", median(samples[OURS]), 2.0, "ms"),
        below("p99 of ours", p99(samples[OURS]), 10.0, "ms"),
    ]
    return Question(f"one line to the console, {sizes.ranks} workers", "ms", samples, verdicts)


def chatter(sizes: Sizes) -> Question:
    samples = chatted(sizes, pause=0.02, what=1)
    verdicts = at_most(samples, torch_name(), 1 / 3) if has_torch() else []
    return Question(f"CPU for {sizes.ranks} workers, 50 lines/s each, {CHAT:g} s", "ms", samples, verdicts)


def chatted(sizes: Sizes, pause: float, what: int) -> dict[str, list[float]]:
    """Samples of one kind: 0 for latencies, 1 for CPU."""
    contenders = {OURS: "tee:chatty_ours"} | ({torch_name(): "tee:chatty_torch"} if has_torch() else {})
    rounds = min(sizes.rounds, 2)

    def chat(target: str) -> Sequence[float]:
        heard, cpu = listen(target, ranks=sizes.ranks, pause=pause, directory=sizes.directory)
        return (heard, [cpu])[what]

    return take_turns(rounds, {who: functools.partial(chat, target) for who, target in contenders.items()})


def listen(target: str, ranks: int, pause: float, directory: str) -> tuple[list[float], float]:
    """Let workers chat; milliseconds that each line took, without those said while others boot, and the CPU."""
    read_fd, write_fd = os.pipe()
    heard: list[tuple[int, float]] = []
    with open(read_fd, "rb", buffering=0) as console:
        ear = threading.Thread(target=hear, args=(console, heard))
        ear.start()
        with open(write_fd, "wb", buffering=0) as stream:
            cpu = alone(target, stream, ranks=ranks, pause=pause, directory=directory)
        ear.join()
    began = heard[0][0] + BOOT * 1e9
    return [taken for said, taken in heard if said >= began], cpu


def hear(console: IO[bytes], heard: list[tuple[int, float]]) -> None:
    while chunk := console.read(1 << 16):
        now = time.monotonic_ns()
        heard += [(int(said[1]), (now - int(said[1])) / 1e6) for said in SAID.finditer(chunk)]


def chat_words(ranks: int, pause: float) -> dict[int, tuple[str, ...]]:
    """Arguments by rank."""
    return {rank: ("-ISc", CHATTER, str(rank), str(pause), str(BOOT + CHAT)) for rank in range(ranks)}


async def chatty_ours(ranks: int, pause: float, directory: str) -> float:
    with log_directory(directory) as log_dir:
        logs = DefaultLogsSpecs(log_dir, tee=Std.ALL)
        async with start_processes("bench", sys.executable, args=chat_words(ranks, pause), logs_specs=logs) as ctx:
            await asyncio.sleep(BOOT)
            before = time.process_time()
            await asyncio.sleep(CHAT - 1)
            cpu = time.process_time() - before
            await ctx.wait()
        return cpu * CHAT / (CHAT - 1) * 1e3


def chatty_torch(ranks: int, pause: float, directory: str) -> float:
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(write_through=True)  # its tailers don't flush: into a pipe nothing would be prompt
    with log_directory(directory) as log_dir:
        ctx = elastic.start_processes(
            "bench",
            sys.executable,
            args=chat_words(ranks, pause),
            envs={rank: {} for rank in range(ranks)},
            logs_specs=elastic.DefaultLogsSpecs(log_dir, tee=elastic.Std.ALL),
        )
        ctx.wait(BOOT)
        before = time.process_time()
        ctx.wait(CHAT - 1)
        cpu = time.process_time() - before
        ctx.wait()
        ctx.close()
        return cpu * CHAT / (CHAT - 1) * 1e3


def redirect(sizes: Sizes) -> Question:
    """The rival is the same run with nothing to write: the difference is what the bytes cost."""
    size = sizes.megabytes * MEGA

    def cpu(size: int) -> list[float]:
        return [alone("tee:redirected", size=size, directory=sizes.directory)]

    nothing = "the same, 0 MB"
    samples = take_turns(sizes.rounds, {OURS: lambda: cpu(size), nothing: lambda: cpu(0)})
    extra = median(samples[OURS]) - median(samples[nothing])
    # CPU of two equal runs differs by a few milliseconds; 100 MB through Python would be 100 at the least.
    verdicts = [Verdict(f"{extra:.1f} ms of CPU for {sizes.megabytes} MB; none was to be shown", extra < 10)]
    return Question(f"CPU of a redirect of {sizes.megabytes} MB without tee", "ms", samples, verdicts)


async def redirected(size: int, directory: str) -> float:
    with log_directory(directory) as log_dir:
        before = time.process_time()
        await supervised(1, 100, size, DefaultLogsSpecs(log_dir, redirects=Std.OUT))
        return (time.process_time() - before) * 1e3
