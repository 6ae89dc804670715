"""The files of one stream of a run, read as lines in order: rotated pieces, compressed ones, times.

Reading changes nothing, and may go on while the run writes.
"""

from __future__ import annotations

import glob
import gzip
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO, cast, final

from .. import Std

_PIECE = re.compile(r"\.(\d+)(\.gz)?")
_INDEX = ".times"
READ_BYTES = 1 << 20
UNTIMED = datetime.min.replace(tzinfo=UTC)
"""The time of a line that no index tells."""


@final
@dataclass(frozen=True, slots=True)
class FileLine:
    """A line as it lies in a file."""

    at: datetime
    """When the supervisor read it, UTC; `UNTIMED` without an index."""
    attempt: int
    rank: int
    std: Std
    data: bytes
    """Without its newline."""


def pieces(path: str) -> list[str]:
    """The pieces of a log file that are there, oldest first, the current one last."""
    numbered: list[tuple[int, str]] = []
    for piece in glob.glob(f"{glob.escape(path)}.*"):
        match = _PIECE.fullmatch(piece, len(path))
        if match is not None:
            numbered.append((int(match[1]), piece))
    return [*(piece for _, piece in sorted(numbered, reverse=True)), *([path] if os.path.exists(path) else [])]


@final
class Times:
    """The time index of one piece: rows of `offset TAB time`, each for the bytes before its offset."""

    def __init__(self, piece: str) -> None:
        index = piece.removesuffix(".gz") + _INDEX
        self._file = open(index, encoding="ascii") if os.path.exists(index) else None  # noqa: SIM115  # in close
        self._offset = 0
        self._at = UNTIMED

    def at(self, end: int) -> datetime:
        """When the byte before `end` was read; ends must not go back."""
        while self._offset < end and self._file is not None:
            row = self._file.readline()
            if not row.endswith("\n"):  # not written yet: the time before it is the best there is
                self._file.seek(self._file.tell() - len(row))
                break
            offset, _, at = row.rstrip().partition("\t")
            self._offset, self._at = int(offset), datetime.fromisoformat(at)
        return self._at

    def close(self) -> None:
        """Close the index; idempotent."""
        if self._file is not None:
            self._file.close()


@final
class Stream:
    """One stream of one rank, read from its oldest piece on."""

    def __init__(self, path: str, *, attempt: int, rank: int, std: Std) -> None:
        self._path = path
        self._attempt, self._rank, self._std = attempt, rank, std
        self._file: BinaryIO | None = None
        self._times: Times | None = None
        self._identity = (0, 0)
        self._read_bytes = 0
        self._begun = b""

    def lines(self, *, whole: bool) -> Iterator[FileLine]:
        """What there is to read now; call again for what came later.

        Args:
            whole: leave an unfinished last line for the next time.
        """
        while True:
            yield from self._rest()
            newer = self._newer()
            if not newer:
                break
            yield from self._rest()  # written between the two looks
            self._turn_to(newer[0])
        if self._begun and not whole:
            yield self._line(self._begun)
            self._begun = b""

    def close(self) -> None:
        """Close its files; idempotent."""
        if self._file is not None:
            self._file.close()
        if self._times is not None:
            self._times.close()

    def _newer(self) -> list[str]:
        """The pieces after the open one; all of them before the first."""
        found = [(piece, _identity(piece)) for piece in pieces(self._path)]
        if self._file is None:
            return [piece for piece, _ in found]
        for position, (_, identity) in enumerate(found):
            if identity == self._identity:
                return [piece for piece, _ in found[position + 1 :]]
        return [piece for piece, _ in found[-1:]]  # the open one was removed or compressed meanwhile

    def _turn_to(self, piece: str) -> None:
        if self._file is not None and os.fstat(self._file.fileno()).st_size < self._read_bytes:
            self._begun = b""  # its unfinished line was moved to the next piece by the writer
        self.close()
        self._file = _open(piece)
        self._times = Times(piece)
        self._identity = _identity(piece)
        self._read_bytes = 0

    def _rest(self) -> Iterator[FileLine]:
        while self._file is not None and (data := self._file.read(READ_BYTES)):
            end = self._read_bytes - len(self._begun)
            self._read_bytes += len(data)
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                end += len(line) + 1
                yield self._line(line, end)

    def _line(self, data: bytes, end: int | None = None) -> FileLine:
        at = UNTIMED if self._times is None else self._times.at(self._read_bytes if end is None else end)
        return FileLine(at, self._attempt, self._rank, self._std, data)


def _open(piece: str) -> BinaryIO:
    return cast("BinaryIO", gzip.open(piece)) if piece.endswith(".gz") else open(piece, "rb")


def _identity(piece: str) -> tuple[int, int]:
    try:
        status = os.stat(piece)
    except FileNotFoundError:
        return (0, 0)
    return (status.st_dev, status.st_ino)
