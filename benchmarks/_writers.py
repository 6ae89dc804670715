"""The programs whose output is tee'd, and three ways to tee it: ours, coreutils `tee`, torch."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aelastic import DefaultLogsSpecs, LogsSpecs, Std, start_processes

WRITER = """
import os, sys
width, left = int(sys.argv[1]), int(sys.argv[2])
block = (b"x" * (width - 1) + b"\\n") * (65536 // width)
while left:
    left -= os.write(1, block[:left])
"""


def writer(width: int, size: int) -> tuple[str, ...]:
    """The words of a command that writes `size` bytes in lines of `width`, as fast as it can."""
    return (sys.executable, "-ISc", WRITER, str(width), str(size))


@contextmanager
def log_directory(directory: str) -> Iterator[str]:
    """A directory that is gone with all logs in it afterwards."""
    log_dir = tempfile.mkdtemp(dir=directory)
    try:
        yield log_dir
    finally:
        shutil.rmtree(log_dir)


async def ours(workers: int, width: int, size: int, directory: str) -> float:
    """Tee `size` bytes from each worker; seconds from the call to the end."""
    with log_directory(directory) as log_dir:
        began = time.perf_counter()
        paths = await supervised(workers, width, size, DefaultLogsSpecs(log_dir, tee=Std.OUT))
        seconds = time.perf_counter() - began
        check_sizes(paths, size)
        return seconds


async def supervised(workers: int, width: int, size: int, logs: LogsSpecs) -> list[str]:
    """Run the writers to their end; the paths of their files."""
    program, *words = writer(width, size)
    async with start_processes(
        "bench", program, args=dict.fromkeys(range(workers), tuple(words)), logs_specs=logs
    ) as ctx:
        result = await ctx.wait()
    result.raise_for_failures()
    return list(result.stdouts.values())


def check_sizes(paths: list[str], size: int) -> None:
    """Refuse a time that was won by leaving bytes out.

    Raises:
        RuntimeError: if a file has not all bytes.
    """
    for path in paths:
        if os.path.getsize(path) != size:
            raise RuntimeError(f"{path} has {os.path.getsize(path)} of {size} bytes")


def coreutils(workers: int, width: int, size: int, directory: str) -> float:
    """Pipe each writer into `tee FILE`; seconds until the last has ended."""
    with log_directory(directory) as log_dir:
        paths = [os.path.join(log_dir, f"{rank}.log") for rank in range(workers)]
        began = time.perf_counter()
        pipelines = [pipeline(writer(width, size), path) for path in paths]
        for process in (process for both in pipelines for process in both):
            process.wait()
        seconds = time.perf_counter() - began
        check_sizes(paths, size)
        return seconds


def pipeline(command: tuple[str, ...], path: str) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start `command | tee path`."""
    source = subprocess.Popen(command, stdout=subprocess.PIPE)
    sink = subprocess.Popen(["tee", path], stdin=source.stdout)
    if source.stdout is not None:
        source.stdout.close()
    return source, sink


def torch(workers: int, width: int, size: int, directory: str) -> float:
    """Let torch tee; seconds from the call until its tailers have read to the end."""
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing")
    program, *words = writer(width, size)
    with log_directory(directory) as log_dir:
        began = time.perf_counter()
        ctx = elastic.start_processes(
            "bench",
            program,
            args=dict.fromkeys(range(workers), tuple(words)),
            envs={rank: {} for rank in range(workers)},
            logs_specs=elastic.DefaultLogsSpecs(log_dir, tee=elastic.Std.OUT),
        )
        result = ctx.wait()
        ctx.close()
        sys.stdout.flush()
        seconds = time.perf_counter() - began
        check_sizes(list(result.stdouts.values()), size)
        return seconds
