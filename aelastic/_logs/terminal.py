"""Where a console's bytes end up: a descriptor, or a stream object such as a notebook's.

A writer here may block, so it is called from the console's own thread only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

from .lines import Piece

MOST_PIECES = 512
"""Below IOV_MAX, which is 1024."""
SMALL_BYTES = 4096
"""PIPE_BUF: what poll(2) promises room for."""
BLOCKED_POLL_MS = 50
NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Terminal(Protocol):
    """The end of the way. Everything may raise OSError or ValueError when it is closed."""

    def write(self, pieces: Sequence[Piece], go_on: Callable[[], bool]) -> int:
        """Write a beginning of the pieces, at least one byte; return how many.

        Args:
            go_on: asked while it accepts nothing; when False, 0 is returned.
        """

    def close(self) -> None:
        """Let go of it; idempotent."""


def key_of(stream: Any) -> object:
    """What two streams have in common when they end in one place (`2>&1`, one terminal)."""
    fd = _descriptor(stream)
    if fd is None:
        return id(stream)
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino, status.st_rdev)
    return id(stream)


def is_terminal(stream: Any) -> bool:
    """Whether a person's terminal shows it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or some object with a `write`
        return bool(stream.isatty())
    return False


def terminal_of(stream: Any) -> Terminal:
    """The way to a stream's end.

    A descriptor is used only where the stream really is a text layer over one: pytest's capture and notebooks
    have a `fileno` that leads elsewhere, or none.

    Raises:
        OSError: if its descriptor is closed.
    """
    fd = _descriptor(stream)
    return Stream(stream) if fd is None else Descriptor(stream, fd)


def _descriptor(stream: Any) -> int | None:
    if not isinstance(stream, io.TextIOWrapper):
        return None
    with contextlib.suppress(ValueError, OSError):
        raw = getattr(stream.buffer, "raw", stream.buffer)
        return raw.fileno() if isinstance(raw, io.FileIO) else None
    return None


@final
class Descriptor:
    """A descriptor that this process shares with others: never made non-blocking, and never closed but as a copy."""

    def __init__(self, stream: io.TextIOWrapper, fd: int) -> None:
        self._stream: io.TextIOWrapper | None = stream
        self._fd = os.dup(fd)
        mode = os.fstat(self._fd).st_mode
        self._may_block = not stat.S_ISREG(mode) and not _is_null(self._fd)
        self._nowait = NOWAIT if stat.S_ISFIFO(mode) else None
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def write(self, pieces: Sequence[Piece], go_on: Callable[[], bool]) -> int:
        """Write what there is room for; see `Terminal`."""
        if self._stream is not None:
            self._stream.flush()  # what the host printed before comes first
            self._stream = None
        while True:
            with contextlib.suppress(BlockingIOError):
                return self._write_some(pieces[:MOST_PIECES])
            while not self._poll.poll(BLOCKED_POLL_MS):
                if not go_on():
                    return 0

    def _write_some(self, pieces: Sequence[Piece]) -> int:
        if self._nowait is not None:
            try:
                return os.pwritev(self._fd, pieces, -1, self._nowait)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL):
                    raise
                self._nowait = None  # this kernel can't: pipes can since Linux 6.4
        if not self._may_block:
            return os.writev(self._fd, pieces)
        if not self._poll.poll(0):
            raise BlockingIOError
        return os.write(self._fd, memoryview(pieces[0])[:SMALL_BYTES])

    def close(self) -> None:
        """Close the copy; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_null(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    return False


@final
class Stream:
    """A stream object without a descriptor of its own; its `write` is all we know."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, pieces: Sequence[Piece], go_on: Callable[[], bool]) -> int:
        """Write all of it; see `Terminal`."""
        del go_on  # nobody can tell beforehand whether such a stream blocks
        data = b"".join(pieces)
        binary = getattr(self._stream, "buffer", None)
        if binary is None:
            self._stream.write(data.decode("utf-8", "replace"))
        else:
            self._stream.flush()
            binary.write(data)
        self._stream.flush()
        return len(data)

    def close(self) -> None:
        """Let go of the stream, which is its owner's to close."""
        self._stream = None
