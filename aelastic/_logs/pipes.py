"""Pipes for workers' output, as large as this user's share allows.

A user has a budget of pipe memory (`pipe-user-pages-soft`); beyond it every new pipe of that user, of any program, has
two pages. So the pipes of this process keep below a quarter of it, together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from dataclasses import dataclass
from typing import final

from aelastic._descriptors import close_fd, open_pipe

LARGE_BYTES = 1 << 20
PLAIN_BYTES = 1 << 16
"""What a pipe has unless told otherwise (pipe(7))."""
SOFT_PAGES = "/proc/sys/fs/pipe-user-pages-soft"
UNLIMITED_BYTES = 64 << 20
SET_SIZE: int | None = getattr(fcntl, "F_SETPIPE_SZ", None)


@final
@dataclass(slots=True, eq=False)
class OutputPipe:
    """One stream's pipe. Its owner closes both ends."""

    read_fd: int
    write_fd: int
    inode: int
    size_bytes: int

    def close_write(self) -> None:
        """Close our copy of the worker's end; idempotent."""
        if self.write_fd >= 0:
            close_fd(self.write_fd)
            self.write_fd = -1

    def close_read(self) -> None:
        """Close our end and give its share back; idempotent."""
        if self.read_fd >= 0:
            close_fd(self.read_fd)
            self.read_fd = -1
            _share.give_back(self.size_bytes)

    def close(self) -> None:
        """Close what is still open."""
        self.close_write()
        self.close_read()


@final
class _Share:
    """What the pipes of this process may have together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used_bytes = 0

    def take(self, count: int) -> int:
        """Reserve for so many pipes; return what each may have, a power of two."""
        with self._lock:
            each = max((_limit_bytes() - self._used_bytes) // max(count, 1), PLAIN_BYTES)
            size = min(1 << (each.bit_length() - 1), LARGE_BYTES)
            self._used_bytes += size * count
            return size

    def give_back(self, size: int) -> None:
        with self._lock:
            self._used_bytes -= size

    def forked(self) -> None:
        """Begin anew in a forked child: the lock may be held by a thread that is not there."""
        self._lock = threading.Lock()
        self._used_bytes = 0


_share = _Share()
os.register_at_fork(after_in_child=_share.forked)


def _limit_bytes() -> int:
    with contextlib.suppress(OSError, ValueError), open(SOFT_PAGES) as pages:
        return int(pages.read()) * os.sysconf("SC_PAGE_SIZE") // 4 or UNLIMITED_BYTES
    return UNLIMITED_BYTES


def open_pipes(count: int) -> list[OutputPipe]:
    """Make pipes whose read ends don't block.

    Raises:
        OSError: if descriptors run out; then none is left open.
    """
    size = _share.take(count)
    pipes: list[OutputPipe] = []
    try:
        while len(pipes) < count:
            pipes.append(_open_pipe(size))
    except OSError:
        for pipe in pipes:
            pipe.close()
        _share.give_back(size * (count - len(pipes)))
        raise
    return pipes


def _open_pipe(size: int) -> OutputPipe:
    read_fd, write_fd = open_pipe()
    os.set_blocking(read_fd, False)
    if SET_SIZE is not None and size > PLAIN_BYTES:
        with contextlib.suppress(OSError):  # another program of this user took the budget: a smaller pipe works too
            fcntl.fcntl(write_fd, SET_SIZE, size)
    return OutputPipe(read_fd, write_fd, os.fstat(read_fd).st_ino, size)
