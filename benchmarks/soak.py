"""Does every byte arrive while everything goes wrong at once?

Ranks write at full speed in chunks of random sizes, and are killed at random and started again; their files are cut
and cut again; a subscriber reads one line and no more; the console stalls for a second again and again. In the end the
files must match the checksums that the workers kept, and what the console showed must be whole lines, each shown or
counted as left out. Memory and a 1 ms ticker are watched all the while.

The writers, and whoever judges the console, leave the first processor alone, where there are several, and whoever is
measured keeps to it, with all its threads: else the ticker would show how long the supervisor stands in line for one
behind the writers. The rival is the same ticker in a bare loop that reads the same writers through asyncio's own pipes
and keeps nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import mmap
import os
import random
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, final

from aelastic import (
    Backoff,
    DefaultLogsSpecs,
    PContext,
    RestartPolicy,
    Rotate,
    Std,
    StopPolicy,
    start_processes,
)

from ._measure import OURS, Question, Sizes, Verdict, alone, below, p99
from ._ticker import ticking
from ._writers import log_directory

BARE = "bare create_subprocess_exec"
RANKS = 8
MEGA = 1_000_000
PIECE_BYTES = 8 << 20
MOST_GROWTH = 64 << 20
LARGEST_CHUNK = 200_000
RECORD = struct.Struct("<QQII")
"""What a worker keeps of itself: its number of writes, its bytes, their CRC-32, and the CRC-32 of all that."""
SOAKER = """
import mmap, os, random, struct, sys, zlib
directory, left, largest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, map(int, sys.argv[4].split(",")))
rank, attempt = os.environ["AELASTIC_RANK"], os.environ["AELASTIC_ATTEMPT"]
record = struct.Struct("<QQII")
def kept(path):
    with open(path, "rb") as file:
        slots = [record.unpack(file.read(record.size)) for _ in range(2)]
    return max(slot for slot in slots if slot[3] == zlib.crc32(record.pack(*slot[:3], 0)))[1]
for earlier in range(int(attempt)):
    path = f"{directory}/{rank}.{earlier}"
    left -= kept(path) if os.path.exists(path) else 0
path = f"{directory}/{rank}.{attempt}"
with open(path + ".new", "wb") as file:
    file.write(record.pack(0, 0, 0, zlib.crc32(record.pack(0, 0, 0, 0))) * 2)
os.rename(path + ".new", path)
memory = mmap.mmap(os.open(path, os.O_RDWR), 2 * record.size)
text = bytes(random.choices(b"abcdefghijklmnopqrstuvwxyz \\r\\t\\xff\\0", k=4096)) * 2
writes = total = check = number = 0
ready = b""
while total < left:
    lines = [ready]
    while len(ready) < largest:
        number += 1
        start = random.randrange(4096)
        words = text[start : start + random.choice((1, 50, 100, 2000))]
        lines.append(b"%s:%s:%d:%08x:%s\\n" % (rank.encode(), attempt.encode(), number, zlib.crc32(words), words))
        if len(lines) % 64 == 0:
            ready = b"".join(lines)
            lines = [ready]
    ready = b"".join(lines)
    chunk = ready[: random.choice((1, 100, 4096, 65536, random.randrange(1, largest)))]
    written = os.write(1, chunk)
    ready = ready[written:]
    writes, total, check = writes + 1, total + written, zlib.crc32(chunk[:written], check)
    slot = record.pack(writes, total, check, zlib.crc32(record.pack(writes, total, check, 0)))
    memory[writes % 2 * record.size :][: record.size]
    memory[writes % 2 * record.size : (writes % 2 + 1) * record.size] = slot
"""
LINE = re.compile(rb"(\d+):(\d+):(\d+):([0-9a-f]{8}):([^\n]*)", re.DOTALL)
LEFT_OUT = re.compile(rb"\((\d+) lines? (?:was|were) left out here")


@final
@dataclass
class Ear:
    """The other end of the console: reads it, stalls again and again, and judges every line."""

    stream: IO[bytes]
    stall: float
    """Seconds of each stall, as many as it reads between two."""
    shown: Counter[int] = field(default_factory=Counter)
    """Whole lines, by rank."""
    left_out: Counter[int] = field(default_factory=Counter)
    stalls: int = 0
    begun: dict[tuple[bytes, ...], bytes] = field(default_factory=dict)
    """Beginnings of lines that were shown while they were unfinished, and of those that stayed so."""
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Read to the end, on the processors of the writers: judging lines is no work of the supervisor's."""
        os.sched_setaffinity(threading.get_native_id(), shared_processors())
        rest, stalls_at = b"", time.monotonic() + self.stall
        while chunk := self.stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._judge(line)
            if time.monotonic() >= stalls_at:
                time.sleep(self.stall)
                self.stalls += 1
                stalls_at = time.monotonic() + self.stall
        if rest:
            self.complaints.append(f"the console ended in {rest[:80]!r}")

    def _judge(self, shown: bytes) -> None:
        prefix, _, line = shown.partition(b"]:")
        rank = int(prefix.removeprefix(b"[soak"))
        found = LINE.fullmatch(line)
        if (marker := LEFT_OUT.match(line)) is not None:
            self.left_out[rank] += int(marker[1])
        elif found is not None and int(found[4], 16) == zlib.crc32(found[5]):
            self.shown[rank] += 1
            begun = self.begun.pop(found.groups()[:3], b"")
            if not line.startswith(begun):
                self.complaints.append(f"{begun[:80]!r} went on as {line[:80]!r}")
        else:
            self.begun[tuple(line.split(b":")[:3])] = line


@final
@dataclass
class Shelf:
    """What the workers wrote, as it lies in their files."""

    size: int = 0
    lines: Counter[int] = field(default_factory=Counter)
    """By rank, an unfinished last one included."""
    unfinished: set[bytes] = field(default_factory=set)
    pieces: int = 0
    complaints: list[str] = field(default_factory=list)

    def read(self, run_dir: str, records: str) -> None:
        """Compare all files of a run with what its workers kept."""
        for name in sorted(os.listdir(records)):
            if name.endswith(".new"):  # who began it was killed before it wrote anything
                continue
            rank, attempt = map(int, name.split("."))
            path = os.path.join(run_dir, f"attempt_{attempt}", str(rank), "stdout.log")
            self._compare(rank, path, kept(os.path.join(records, name)))

    def _compare(self, rank: int, path: str, record: tuple[int, int]) -> None:
        total, check = record
        size, crc, last = 0, 0, b""
        for chunk in chunks(path):
            crc = zlib.crc32(chunk[: max(0, total - size)], crc)
            size += len(chunk)
            self.lines[rank] += chunk.count(b"\n")
            last = chunk.rpartition(b"\n")[2] if b"\n" in chunk else last + chunk
        self.size += size
        self.pieces += len(paths_of(path))
        if last:
            self.lines[rank] += 1
            self.unfinished.add(last)
        if not total <= size <= total + LARGEST_CHUNK:
            self.complaints.append(f"{path}: {size} bytes of {total}")
        elif crc != check:
            self.complaints.append(f"{path}: its checksum is not that of what was written")


def shared_processors() -> list[int]:
    """Those of the writers."""
    processors = sorted(os.sched_getaffinity(0))
    return processors[1:] or processors


def keep_to_one_processor() -> list[int]:
    """Leave the others to the writers; return those. Threads and processes that are begun later inherit it."""
    others = shared_processors()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    return others


def paths_of(path: str) -> list[str]:
    """The pieces of a file, oldest first."""
    folder, name = os.path.split(path)
    numbers = [int(each[len(name) + 1 :]) for each in os.listdir(folder) if each.startswith(f"{name}.")]
    return [*(f"{path}.{number}" for number in sorted(numbers, reverse=True)), path]


def chunks(path: str) -> Iterator[bytes]:
    for piece in paths_of(path):
        with open(piece, "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk


def kept(path: str) -> tuple[int, int]:
    """Bytes and checksum that a worker kept last; it may have been killed while it wrote one of the two slots."""
    with open(path, "rb") as file:
        slots = [RECORD.unpack(file.read(RECORD.size)) for _ in range(2)]
    whole = [slot for slot in slots if slot[3] == zlib.crc32(RECORD.pack(*slot[:3], 0))]
    _, total, check, _ = max(whole)
    return total, check


async def soak(
    directory: str,
    records: str,
    *,
    ranks: int,
    size: int,
    piece_bytes: int,
    kill_every: float,
    processors: list[int],
) -> dict[str, Any]:
    """Let all ranks write `size` bytes together, on these processors; what was seen from inside."""
    args = dict.fromkeys(range(ranks), soaker(records, size // ranks, processors))
    logs = DefaultLogsSpecs(directory, tee=Std.OUT, rotate=Rotate(max_bytes=piece_bytes, keep=1_000_000))
    restart = RestartPolicy(
        max_restarts=1_000_000, scope="rank", backoff=Backoff(initial=0.01, factor=1.0, maximum=0.01)
    )
    stop = StopPolicy(drain=60.0)
    async with start_processes("soak", sys.executable, args, logs_specs=logs, restart=restart, stop=stop) as ctx:
        reader = ctx.lines()
        await anext(reader)
        before, growth = resident_bytes(), 0
        killing = asyncio.create_task(kill_at_random(ctx, kill_every))
        async with ticking() as gaps:
            while (result := await ctx.wait(0.05)) is None:
                growth = max(growth, resident_bytes() - before)
        killing.cancel()
        await reader.aclose()
    return {
        "gaps": gaps,
        "growth": growth,
        "outcome": result.outcome,
        "lost": result.lost_bytes,
        "attempts": result.attempts,
        "run_dir": ctx.log_dir,
    }


def soaker(records: str, size: int, processors: list[int]) -> tuple[str, ...]:
    """The words of a writer's command, after the program."""
    return ("-ISc", SOAKER, records, str(size), str(LARGEST_CHUNK), ",".join(map(str, processors)))


async def kill_at_random(ctx: PContext, every: float) -> None:
    chance = random.Random(8)
    while True:
        await asyncio.sleep(chance.uniform(0.5, 1.5) * every)
        if pids := ctx.pids():
            ctx.send_signal(signal.SIGKILL, ranks=[chance.choice(sorted(pids))])


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def judged(ear: Ear, shelf: Shelf, seen: dict[str, Any], size: int) -> list[str]:
    """All that is wrong."""
    complaints = [*ear.complaints, *shelf.complaints]
    if (seen["outcome"], seen["lost"]) != ("succeeded", 0):
        complaints.append(f"the run {seen['outcome']} and lost {seen['lost']} bytes")
    if shelf.size < size:
        complaints.append(f"only {shelf.size} of {size} bytes were written")
    torn = [line for line in ear.begun.values() if line not in shelf.unfinished]
    complaints += [f"the console showed a part only: {line[:80]!r}" for line in torn]
    ends = Counter(int(line.split(b":")[0]) for line in ear.begun.values() if line in shelf.unfinished)
    for rank, lines in shelf.lines.items():
        told = ear.shown[rank] + ear.left_out[rank] + ends[rank]
        if told != lines:
            complaints.append(f"rank {rank}: of {lines} lines the console showed or counted {told}")
    return complaints


@contextlib.contextmanager
def console(stall: float) -> Iterator[tuple[io.FileIO, Ear]]:
    """A pipe with an ear at its other end, which has heard all after the block."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0) as stream:
        ear = Ear(stream, stall)
        thread = threading.Thread(target=ear.listen)
        thread.start()
        with io.FileIO(write_fd, "w") as end:
            yield end, ear
        thread.join()


async def ours(**settings: Any) -> dict[str, Any]:
    return await soak(**settings, processors=keep_to_one_processor())


async def bare(records: str, ranks: int, size: int) -> list[float]:
    """Read the same writers, and drop what they write."""
    command = (sys.executable, *soaker(records, size // ranks, keep_to_one_processor()))
    envs = [os.environ | {"AELASTIC_RANK": str(rank), "AELASTIC_ATTEMPT": "0"} for rank in range(ranks)]
    pipe = asyncio.subprocess.PIPE
    processes = [await asyncio.create_subprocess_exec(*command, stdout=pipe, env=env) for env in envs]
    async with ticking() as gaps:
        await asyncio.gather(*map(drained, processes))
    return gaps


async def drained(process: asyncio.subprocess.Process) -> None:
    while process.stdout is not None and await process.stdout.read(1 << 16):
        pass
    await process.wait()


def questions(sizes: Sizes) -> Iterator[Question]:
    size = 5 * sizes.megabytes * MEGA
    with tempfile.TemporaryDirectory() as records:
        rival = alone("soak:bare", records=records, ranks=RANKS, size=size)
    with log_directory(sizes.directory) as directory, tempfile.TemporaryDirectory() as records:
        began = time.monotonic()
        with console(1.0) as (end, ear):
            seen = alone(
                "soak:ours", end, directory=directory, records=records, ranks=RANKS, size=size,
                piece_bytes=PIECE_BYTES, kill_every=1.0,
            )  # fmt: skip
        seconds = time.monotonic() - began
        shelf = Shelf()
        shelf.read(seen["run_dir"], records)
    gaps = {OURS: seen["gaps"], BARE: rival}
    yield Question("1 ms ticker through the soak", "ms", gaps, list(verdicts(ear, shelf, seen, gaps, size, seconds)))


def verdicts(
    ear: Ear, shelf: Shelf, seen: dict[str, Any], gaps: dict[str, list[float]], size: int, seconds: float
) -> Iterator[Verdict]:
    complaints = judged(ear, shelf, seen, size)
    yield Verdict(
        f"{shelf.size / MEGA:.0f} MB in {shelf.pieces} pieces of {len(shelf.lines)} ranks, at most {seen['attempts']}"
        f" attempts, {sum(ear.shown.values())} lines shown and {sum(ear.left_out.values())} left out in {ear.stalls}"
        f" stalls, {seconds:.0f} s: {'; '.join(complaints[:5]) or 'all whole'}",
        not complaints,
    )
    rate = (shelf.pieces - len(shelf.lines)) / seconds
    yield Verdict(f"{rate:.1f} rotations a second; 3 at least were to be survived", rate >= 3)
    growth = seen["growth"]
    yield Verdict(f"memory grew by {growth / (1 << 20):.0f} MiB; at most 64 MiB was to be shown", growth <= MOST_GROWTH)
    longest, bare_longest = max(gaps[OURS]), max(gaps[BARE])
    yield below(f"longest gap (bare's: {bare_longest:.1f} ms, our p99: {p99(gaps[OURS]):.1f} ms)", longest, 20.0, "ms")
