"""A log file as its writer sees it: appended to, cut into pieces, its times noted; every call blocks.

Called through aiofiles, on the run's own executor. Errors are for the sink to judge; `taken_bytes` tells it how far a
failed write came.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import final

from aelastic._policies import Rotate

from .lines import NEWLINE, Piece, rest_of
from .pieces import INDEX_SUFFIX, Pieces

MOST_PIECES = 512
"""Below IOV_MAX, which is 1024."""

Batch = Sequence[tuple[bytes, int]]
"""Chunks in order, each with the time it was read at, in nanoseconds since the epoch."""


def open_for_append(path: str, access: int, *, nonblocking: bool) -> int:
    """Open a file to be appended to, made if missing, never truncated. Special files work.

    Args:
        access: O_WRONLY or O_RDWR.
        nonblocking: for a descriptor of our own: a FIFO that nobody reads then gives an error instead of blocking.

    Raises:
        OSError: naming the path.
    """
    flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
    try:
        return os.open(path, flags | access, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    return os.open(path, flags | os.O_RDWR)  # a FIFO without a reader yet (fifo(7))


@final
class LogFile:
    """One stream's file and, with rotation, its older pieces.

    The time index is a text file beside the raw one. Each row is `offset TAB time`: bytes before that offset, and not
    before the offset of the row above, were read at that time (UTC). So a line has the time of the first row whose
    offset is not less than the line's end.
    """

    def __init__(
        self, path: str, *, rotate: Rotate | None = None, timestamps: bool = False, executor: Executor | None = None
    ) -> None:
        self.path = path
        self.taken_bytes = 0
        """Bytes written since the file was made, whatever became of them."""
        self.dropped_bytes = 0
        """Bytes in pieces that `Rotate.keep` removed."""
        self.deleted_bytes = 0
        """Bytes in a file that somebody deleted while it was written; whoever counts them sets it back."""
        self._rotate = rotate
        self._timestamps = timestamps
        self._executor = executor
        self._fd = -1
        self._index_fd = -1
        self._size = 0
        self._own_bytes = 0
        """What of the current piece was written by us."""
        self._line_start = 0
        """Where in the current piece its last line begins."""
        self._pieces = None if rotate is None else Pieces(path)
        self.given_up = False
        """Whether nobody waits any more for a call that hangs."""

    def open(self) -> None:
        """Open the current piece.

        Raises:
            OSError: if it, or its index, can't be opened.
        """
        self._fd = open_for_append(self.path, os.O_WRONLY if self._rotate is None else os.O_RDWR, nonblocking=True)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self._rotate = None  # a device or a FIFO has no pieces
        self._size = self._line_start = status.st_size
        self._own_bytes = 0
        if self._timestamps:
            self._index_fd = open_for_append(self.path + INDEX_SUFFIX, os.O_WRONLY, nonblocking=True)
        if self.given_up:
            self._close()

    def writelines(self, batch: Batch) -> None:
        """Append a batch. The name is aiofiles' for it; the chunks need not be lines.

        A file that was deleted is made anew first; see `deleted_bytes`.

        Raises:
            OSError: if not all of it could be written; see `taken_bytes`.
        """
        try:
            self._reopen_deleted()
            if self._rotate is None:
                start = self._size
                self._append([data for data, _ in batch])
                self._note(start, batch)
            else:
                for data, at_ns in batch:
                    self._append_in_pieces(data, at_ns, self._rotate.max_bytes)
        finally:
            if self.given_up:
                self.close()

    def _reopen_deleted(self) -> None:
        self._count_deleted()
        if self._fd < 0:
            self.open()

    def _count_deleted(self) -> None:
        if self._fd >= 0 and not os.fstat(self._fd).st_nlink:
            self.deleted_bytes += self._own_bytes
            self._close()

    def close(self) -> None:
        """Close the file; idempotent. If it was deleted meanwhile, `deleted_bytes` says how much is gone."""
        self._count_deleted()
        self._close()

    def _close(self) -> None:
        fds, self._fd, self._index_fd = (self._fd, self._index_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                with contextlib.suppress(OSError):  # what was written before is the page cache's by now
                    os.close(fd)

    def give_up(self) -> None:
        """Say that nobody waits for a call that hangs: it closes the file itself when it comes back."""
        self.given_up = True

    def all_pieces(self) -> tuple[str, ...]:
        """Paths of the pieces that are there, oldest first, the current one last."""
        return (*(self._pieces.paths() if self._pieces else ()), self.path)

    def finish_pieces(self, within: float) -> None:
        """Wait until what is being compressed is done, or so many seconds."""
        if self._pieces is not None:
            self._pieces.wait(within)

    @property
    def compresses(self) -> bool:
        """Whether full pieces are compressed."""
        return self._rotate is not None and self._rotate.compress is not None

    def _append(self, pieces: Sequence[Piece]) -> None:
        todo = list(pieces)
        while todo:
            written = os.writev(self._fd, todo[:MOST_PIECES])
            self.taken_bytes += written
            self._own_bytes += written
            self._size += written
            todo = rest_of(todo, written)

    def _append_in_pieces(self, data: bytes, at_ns: int, most: int) -> None:
        while data:
            room = most - self._size
            cut = len(data) if len(data) <= room else data.rfind(NEWLINE, 0, max(room, 0)) + 1
            if not cut and self._line_start and self._next_piece():
                continue
            # A line that is longer than a piece makes a longer piece, and so does a directory that allows no new one.
            part = data[: cut or data.find(NEWLINE) + 1 or len(data)]
            start = self._size
            self._append([part])
            if NEWLINE in part:
                self._line_start = start + part.rfind(NEWLINE) + 1
            self._note(start, [(part, at_ns)])
            data = data[len(part) :]

    def _next_piece(self) -> bool:
        """Close the current piece before its last line, and begin a new one with that line's beginning.

        Returns:
            False when the directory allows none: better a long piece than lost bytes.
        """
        if self._rotate is None or self._pieces is None:
            return False
        old_fd, line_start, own_bytes = self._fd, self._line_start, self._own_bytes
        begun = os.pread(old_fd, self._size - line_start, line_start) if self._size > line_start else b""
        try:
            self.dropped_bytes += self._pieces.shift(self._rotate.keep, own_bytes - len(begun))
        except OSError:
            return False
        self._fd = -1
        self._close()
        try:
            self.open()
            self._line_start = 0
            if begun:
                self._move_here(begun)
                os.ftruncate(old_fd, line_start)
        finally:
            os.close(old_fd)
        if self.compresses and self._executor is not None:
            self._pieces.compress(self._executor)
        return True

    def _move_here(self, begun: bytes) -> None:
        taken = self.taken_bytes
        try:
            self._append([begun])
        except OSError:
            os.ftruncate(self._fd, 0)  # it stays in the old piece: better a line in two pieces than bytes twice
            self._size = self._own_bytes = 0
            raise
        finally:
            self.taken_bytes = taken

    def _note(self, start: int, batch: Batch) -> None:
        """Write the index rows of what was appended at `start`."""
        if self._index_fd < 0:
            return
        rows: list[str] = []
        for index, (data, at_ns) in enumerate(batch):
            start += len(data)
            if index + 1 == len(batch) or batch[index + 1][1] != at_ns:
                at = datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat(timespec="microseconds")
                rows.append(f"{start}\t{at}\n")
        os.write(self._index_fd, "".join(rows).encode())
