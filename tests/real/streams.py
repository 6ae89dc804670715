"""What the tests of output share: the streams of an attempt whose workers are the test itself."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from aelastic._logs import Console, DefaultLogsSpecs, LineHub, LogsDest, Outputs, plan
from aelastic._std import STREAMS, Std
from aelastic._threads import Threads

DEADLINE = 30.0


async def until(fact: Callable[[], object], what: str = "") -> None:
    """Wait for a fact that nobody announces."""
    deadline = asyncio.get_running_loop().time() + DEADLINE
    while not fact():
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError(what or "the fact did not come true")
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def console_is(out: object, err: object = None) -> Iterator[None]:
    """Let the host's streams be these for what is made inside."""
    with mock.patch.object(sys, "stdout", out), mock.patch.object(sys, "stderr", err or out):
        yield


class PipeConsole:
    """A console that is a pipe; its reader is the test."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        self.text = io.TextIOWrapper(io.FileIO(write_fd, "w"), write_through=True)
        self.shown = bytearray()
        self._reader: threading.Thread | None = None

    def read_on(self) -> None:
        """Read everything from now on."""
        if self._reader is not None:
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while chunk := os.read(self.read_fd, 1 << 16):
            self.shown += chunk

    def close(self) -> bytes:
        """Close it; return all that was shown."""
        self.text.close()
        if self._reader is None:
            self._read()
        else:
            self._reader.join()
        os.close(self.read_fd)
        return bytes(self.shown)


@dataclass
class Attempt:
    """Open outputs, and the workers' ends of them."""

    outputs: Outputs
    hub: LineHub
    console: Console
    dest: LogsDest
    lost: list[tuple[int, Std, int, str]]
    broken: list[BaseException]
    ends: dict[tuple[int, Std], int] = field(default_factory=dict)

    async def start(self, rank: int) -> None:
        """Take the place of a rank's worker."""
        for std, fd in zip(STREAMS, await self.outputs.child_fds(rank), strict=True):
            self.ends[rank, std] = os.dup(fd)
        self.outputs.started(rank)

    async def write(self, data: bytes, rank: int = 0, std: Std = Std.OUT) -> None:
        """Write as the worker would, waiting where it would."""
        await asyncio.to_thread(_write_all, self.ends[rank, std], data)

    def hang_up(self, rank: int = 0) -> None:
        """Close a rank's ends."""
        for std in STREAMS:
            if (fd := self.ends.pop((rank, std), None)) is not None:
                os.close(fd)

    async def end(self, rank: int = 0, within: float = DEADLINE) -> bool:
        """End a rank's output."""
        self.hang_up(rank)
        return await self.outputs.finish(rank, within)

    def file(self, rank: int = 0) -> bytes:
        """What is in the file of a rank's stdout."""
        return Path(self.dest.stdouts[rank]).read_bytes()


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


@contextlib.asynccontextmanager
async def attempt(
    where: DefaultLogsSpecs | LogsDest,
    nprocs: int = 1,
    *,
    console: PipeConsole | None = None,
    filters: Mapping[Std, Sequence[str]] | None = None,
    prefixes: Mapping[int, str] | None = None,
    threads: int = 2,
    settle: float = DEADLINE,
) -> AsyncIterator[Attempt]:
    """Open the streams of an attempt and start all ranks; close everything at the end."""
    envs = {rank: {"AELASTIC_RUN_ID": "run"} for rank in range(nprocs)}
    dest = where if isinstance(where, LogsDest) else where.reify(envs)
    executor = Threads("test disk", threads)
    with console_is(console.text) if console else contextlib.nullcontext():
        leased = Console()
    lost: list[tuple[int, Std, int, str]] = []
    broken: list[BaseException] = []
    hub = LineHub("job")
    outputs = await Outputs.open(
        plan(dest, nprocs, filters or {}),
        name="job",
        attempt=0,
        prefixes=prefixes or {},
        prefix=dest.prefix,
        filters=filters or {},
        executor=executor,
        console=leased,
        hub=hub,
        on_lost=lambda *what: lost.append(what),
        on_broken=broken.append,
        buffer_bytes=dest.buffer_bytes,
    )
    opened = Attempt(outputs, hub, leased, dest, lost, broken)
    try:
        for rank in range(nprocs):
            await opened.start(rank)
        await outputs.opened()
        yield opened
    finally:
        for rank in range(nprocs):
            opened.hang_up(rank)
        await outputs.close()
        await leased.settled(settle)
        leased.close()
        hub.finish()
        executor.close()
