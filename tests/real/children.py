"""Real children for the tests of `_process`: commands, their first lines, and strangers with a chosen pid."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aelastic._options import WorkerOptions
from aelastic._process import Command, Process, Tree, launch

RUN_ID = secrets.token_hex(8)
NET = 20.0
"""Seconds after which a test that waits for a fact gives up; nothing takes that long."""
FREEZER = Path("/sys/fs/cgroup/freezer")
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def command(
    *argv: str | bytes, rank: int = 0, stdin: int, stdout: int, env: Mapping[str, str] | None = None, **options: Any
) -> Command:
    """A command of the run, with its lineage."""
    cwd = options.pop("cwd", None)
    lineage = f"{os.environ.get('AELASTIC_LINEAGE') or ':'}{RUN_ID}:"
    ids = {"AELASTIC_RUN_ID": RUN_ID, "AELASTIC_RANK": str(rank), "AELASTIC_LINEAGE": lineage}
    return Command(
        argv=argv,
        env=(dict(os.environ) if env is None else dict(env)) | ids,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=2,
        pass_fds=(),
        options=WorkerOptions(**options),
        on_born=lambda *_: None,
        rank=rank,
        who=f"demo rank {rank}",
    )


class Child:
    """A process and what it prints."""

    def __init__(self, process: Process, out: int) -> None:
        self.process = process
        self._reader = os.fdopen(out, "rb")
        self._seen = b""
        self._lines: list[str] = []
        self._more = asyncio.Event()
        self._eof = False
        asyncio.get_running_loop().add_reader(out, self._readable)

    def _readable(self) -> None:
        chunk = os.read(self._reader.fileno(), 65536)
        *lines, self._seen = (self._seen + chunk).split(b"\n")
        self._lines += [line.decode() for line in lines]
        if not chunk:
            self._eof = True
            asyncio.get_running_loop().remove_reader(self._reader.fileno())
        self._more.set()

    @property
    def pipe_inode(self) -> int:
        """Of its stdout."""
        return os.fstat(self._reader.fileno()).st_ino

    async def line(self) -> str:
        """The next line it prints."""
        while not self._lines:
            if self._eof:
                raise EOFError("it printed nothing more")
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), NET)
        return self._lines.pop(0)

    async def rest(self) -> list[str]:
        """Everything else it prints."""
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while True:
                lines.append(await self.line())
        return lines

    async def close(self) -> None:
        """Kill what is left of its group, and wait until it is collected."""
        self.process.signal_group(9)
        await asyncio.wait({self.process.exited}, timeout=NET)
        await self.process.reaped(NET)
        self.process.close()
        if not self._eof:
            asyncio.get_running_loop().remove_reader(self._reader.fileno())
        self._reader.close()


@contextlib.contextmanager
def open_ends() -> Iterator[tuple[int, int]]:
    """Descriptors to hand over as stdin and stdout."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        yield null, null
    finally:
        os.close(null)


@contextlib.asynccontextmanager
async def child(*argv: str | bytes, **settings: Any) -> AsyncIterator[Child]:
    """A started child; killed and collected at the end."""
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        process = await launch(command(*argv, stdin=null, stdout=write, **settings))
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
        os.close(null)
    started = Child(process, read)
    try:
        yield started
    finally:
        await started.close()


def python(code: str) -> tuple[str, ...]:
    """A short Python program, as a command."""
    return (sys.executable, "-I", "-S", "-c", f"import os, sys, time, signal\n{code}")


@contextlib.asynccontextmanager
async def tree() -> AsyncIterator[Tree]:
    """A tree with threads of its own."""
    with ThreadPoolExecutor(2) as threads:
        found = Tree(RUN_ID, threads)
        try:
            yield found
        finally:
            found.close()


@contextlib.contextmanager
def next_pid(pid: int) -> Iterator[None]:
    """Let the next process have this number; those after the block go on where they were.

    Else tests beside this one would get numbers that have just been freed.
    """
    before = LAST_PID.read_text()
    LAST_PID.write_text(str(pid - 1))
    try:
        yield
    finally:
        LAST_PID.write_text(before)


@contextlib.contextmanager
def process_of_pid(pid: int) -> Iterator[int]:
    """A stranger, leader of a session of its own, that got this pid; killed at the end."""
    if os.getuid() != 0 or not LAST_PID.exists():
        pytest.skip("choosing a pid takes root and /proc/sys/kernel/ns_last_pid")
    for _ in range(100):
        read, write = os.pipe()
        with next_pid(pid):
            got = os.fork()
            if got == 0:
                os.setsid()
                os.execv("/bin/sh", ["sh", "-c", "exec sleep 60"]) if _say(write) else None
        os.close(write)
        os.read(read, 1)
        os.close(read)
        if got == pid:
            break
        os.kill(got, 9)
        os.waitpid(got, 0)
    else:
        pytest.skip(f"pid {pid} was not to be had")
    try:
        yield got
    finally:
        os.kill(got, 9)
        os.waitpid(got, 0)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that no signal reaches."""
    folder = FREEZER / f"aelastic-test-{pid}"
    try:
        folder.mkdir()
        (folder / "cgroup.procs").write_text(str(pid))
        (folder / "freezer.state").write_text("FROZEN")
    except OSError as error:
        pytest.skip(f"no freezer to make a process unkillable with: {error}")
    try:
        yield
    finally:
        thaw(pid)
        while (folder / "cgroup.procs").read_text():
            time.sleep(0.005)
        folder.rmdir()


def thaw(pid: int) -> None:
    """Let a frozen process obey what it was sent."""
    (FREEZER / f"aelastic-test-{pid}" / "freezer.state").write_text("THAWED")


def _say(fd: int) -> bool:
    os.environ.clear()
    return os.write(fd, b".") == 1
