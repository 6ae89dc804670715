"""How a result travels through a pipe: one byte for its kind, then chunks, each after its length.

A pickle is written as it is made and read as it is built, so that a large value is never held twice; its end is a
mark in the stream, not the end of the pipe. Both sides are here, neither decides anything.

    kind     b"v" a value, b"r" an exception (its traceback is the first chunk)
    length   8 bytes, signed, little endian: bytes that follow; or one of the marks
    marks    END      the pickle is complete
             RESTART  forget what came since the kind (or traceback): it is pickled again another way
             ABORT    it can't be pickled; the traceback of that is the next and last chunk
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable
    from typing import Any
else:
    import _pickle as pickle  # the same without what only its Python twin needs: re, 6 ms

VALUE = b"v"
RAISED = b"r"
LENGTH = struct.Struct("<q")
END, RESTART, ABORT = 0, -1, -2
LARGE_BYTES = 1 << 20
"""From this size of a chunk on, the writer asks for a larger pipe."""
F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, Linux only; a pipe of the default 64 KiB costs a third of the speed


class ChunkWriter:
    """The file that a pickler writes to: each write becomes a chunk.

    It belongs to the process that made it, and to the pipe that its descriptor was then.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._pipe = os.fstat(fd).st_ino
        self._enlarged = False

    def is_anothers(self) -> bool:
        """Whether this process was forked from the one that made it: then there is nothing to say for it."""
        return os.getpid() != self._pid

    def kind(self, kind: bytes) -> None:
        """Say what follows.

        Raises:
            OSError: if the descriptor was closed meanwhile, or is another file's now.
        """
        if os.fstat(self._fd).st_ino != self._pipe:
            raise OSError(errno.EBADF, "its descriptor was closed, and is another file's now")
        self._send(memoryview(kind))

    def mark(self, mark: int) -> None:
        """Write a mark in place of a length."""
        self._send(memoryview(LENGTH.pack(mark)))

    def write(self, data: Any) -> int:
        """Write one chunk; `data` is anything with a contiguous buffer."""
        view = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data).cast("B")
        if len(view) >= LARGE_BYTES and not self._enlarged:
            self._enlarge()
        if len(view):
            self._send(memoryview(LENGTH.pack(len(view))))
            self._send(view)
        return len(view)

    def _send(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._fd, view) :]

    def _enlarge(self) -> None:
        import fcntl

        self._enlarged = True
        try:
            fcntl.fcntl(self._fd, F_SETPIPE_SZ, LARGE_BYTES)
        except OSError:
            return  # over this user's budget for pipes (pipe(7)), or not on Linux: slower, not wrong


class Restarted(Exception):
    """The writer begins its pickle again."""


class Aborted(Exception):
    """The writer could not pickle it; the argument is its traceback."""


class ChunkReader:
    """The file that an unpickler reads from.

    Args:
        read_into: fills a whole view from the pipe, or raises.
    """

    def __init__(self, read_into: Callable[[memoryview], None]) -> None:
        self._read_into = read_into
        self._left = 0

    def chunk(self) -> bytes:
        """One chunk as a whole."""
        return self.read(self._next())

    def finish(self) -> None:
        """Read the mark that ends the pickle.

        Raises:
            ValueError: if there is anything else.
        """
        if self._left or (length := self._length()) != END:
            raise ValueError(f"{self._left or length} bytes follow the end of a pickle")

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from as many chunks as it takes."""
        view = memoryview(buffer).cast("B")
        whole = len(view)
        while view:
            size = min(len(view), self._left or self._next())
            self._read_into(view[:size])
            self._left -= size
            view = view[size:]
        return whole

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes."""
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readline(self) -> bytes:
        """Up to and with the next newline; protocols before 4 ask for it."""
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self.read(1)
        return bytes(line)

    def _next(self) -> int:
        length = self._length()
        if length == RESTART:
            raise Restarted
        if length == ABORT:
            raise Aborted(self.chunk().decode("utf-8", "replace"))
        if length <= 0:
            raise EOFError("the pickle ends before it is complete")
        self._left = length
        return length

    def _length(self) -> int:
        header = bytearray(LENGTH.size)
        self._read_into(memoryview(header))
        (length,) = LENGTH.unpack(header)
        return int(length)
