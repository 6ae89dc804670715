"""The files of one stream of a run, read as lines in order: rotated pieces, compressed ones, times.

Reading changes nothing, and may go on while the run writes.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO, cast, final

from .. import Std

_PIECE = re.compile(r"\.(\d+)(\.gz)?")
_INDEX = ".times"
READ_BYTES = 1 << 20
Identity = tuple[int, int]
"""Device and inode: a piece keeps them when it is renamed."""
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
    """The pieces of a log file that are there, oldest first, the current one last.

    One that is there both plain and compressed, since it is just being compressed, is named as the plain one.
    """
    numbered: dict[int, str] = {}
    for piece in sorted(glob.glob(f"{glob.escape(path)}.*"), reverse=True):
        match = _PIECE.fullmatch(piece, len(path))
        if match is not None:
            numbered[int(match[1])] = piece
    return [*(numbered[number] for number in sorted(numbered, reverse=True)), *([path] if os.path.exists(path) else [])]


@final
class Times:
    """The time index of one piece: rows of `offset TAB time`, each for the bytes before its offset."""

    def __init__(self, piece: str) -> None:
        index = piece.removesuffix(".gz") + _INDEX
        self._file = open(index, "rb") if os.path.exists(index) else None  # noqa: SIM115  # in close
        self._offset = 0
        self._at = UNTIMED

    def at(self, end: int) -> datetime:
        """When the byte before `end` was read; ends must not go back."""
        while self._offset < end and self._file is not None:
            row = self._file.readline()
            if not row.endswith(b"\n"):  # not written yet: the time before it is the best there is
                self._file.seek(-len(row), os.SEEK_CUR)
                break
            offset, _, at = row.rstrip().partition(b"\t")
            with contextlib.suppress(ValueError):  # a row torn by a full disk
                self._offset, self._at = int(offset), datetime.fromisoformat(at.decode())
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
        self._identity: Identity = (0, 0)
        self._packed = False
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
            self._turn_to(newer[0][0])
        if self._begun and not whole:
            yield self._line(self._begun)
            self._begun = b""

    def close(self) -> None:
        """Close its files; idempotent."""
        if self._file is not None:
            self._file.close()
        if self._times is not None:
            self._times.close()

    def _newer(self) -> list[tuple[str, Identity]]:
        """The pieces after the open one; all of them before the first."""
        while True:
            found = _found(self._path)
            position = self._position_in(found)
            # Pieces are removed oldest first, so those that are left are newer; but none of them may have moved.
            if position is not None or found == _found(self._path):
                return found[position or 0 :]

    def _position_in(self, found: list[tuple[str, Identity]]) -> int | None:
        """Where the pieces after the open one begin; None when it is not among these."""
        for position, (piece, identity) in enumerate(found, 1):
            if self._file is not None and (identity == self._identity or self._is_packed_as(piece, identity)):
                return position
        return None

    def _is_packed_as(self, piece: str, identity: Identity) -> bool:
        """Whether a compressed piece is what the open one became."""
        if self._file is None or self._packed or not piece.endswith(".gz"):
            return False
        whole = os.fstat(self._file.fileno())
        check, size = _trailer(piece, identity)
        return size == whole.st_size & 0xFFFFFFFF and check == _crc(self._file.fileno(), whole.st_size)

    def _turn_to(self, piece: str) -> None:
        """Open a piece, unless it turns out not to be the next any more."""
        try:
            file = _open(piece)
        except FileNotFoundError:
            return
        times, identity = Times(piece), _identity_of(file.fileno())
        # Asked again while both are open: the number of a file that is gone is given to the next one.
        if self._newer()[:1] != [(piece, identity)]:
            file.close()
            times.close()
            return
        if self._file is not None and not self._packed and os.fstat(self._file.fileno()).st_size < self._read_bytes:
            self._begun = b""  # its unfinished line was moved to the next piece by the writer
        self.close()
        self._file, self._times, self._identity = file, times, identity
        self._packed = piece.endswith(".gz")
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


def _found(path: str) -> list[tuple[str, Identity]]:
    """The pieces that are there with what they are, as they were at one instant."""
    before: list[tuple[str, Identity]] = []
    while (found := _look(path)) != before:  # a rotation goes on
        before = found
    return found


def _look(path: str) -> list[tuple[str, Identity]]:
    return [(piece, identity) for piece in pieces(path) if (identity := _identity(piece)) is not None]


def _identity(piece: str) -> Identity | None:
    try:
        status = os.stat(piece)
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino)


def _identity_of(fd: int) -> Identity:
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino)


def _trailer(piece: str, identity: Identity) -> tuple[int, int]:
    """CRC-32 and size, modulo 2**32, of what a gzip file holds (RFC 1952); (0, -1) if the piece has moved."""
    try:
        with open(piece, "rb") as packed:
            packed.seek(-8, os.SEEK_END)
            check, size = struct.unpack("<II", packed.read(8))
            return (check, size) if _identity_of(packed.fileno()) == identity else (0, -1)
    except OSError:
        return 0, -1


def _crc(fd: int, size: int) -> int:
    check = 0
    for start in range(0, size, READ_BYTES):
        check = zlib.crc32(os.pread(fd, READ_BYTES, start), check)
    return check
