"""The full pieces of a rotated file: their names, their order, their compression; every call blocks.

`path.1` is the newest, `path.<n>.gz` a compressed one, and a time index follows its piece as `path.<n>.times`.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import threading
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import final

INDEX_SUFFIX = ".times"
COPY_BYTES = 1 << 20


@final
@dataclass(slots=True, eq=False)
class Piece:
    """One full piece. Its number is its place in the list."""

    size_bytes: int
    suffix: str = ""
    removed: bool = False


@final
class Pieces:
    """All full pieces of one file that its sink made, newest first. Pieces of others are never touched."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._compressing = 0

    def paths(self) -> tuple[str, ...]:
        """Where they are, oldest first."""
        with self._changed:
            return tuple(self._name(number, piece) for number, piece in reversed([*enumerate(self._pieces, 1)]))

    def _name(self, number: int, piece: Piece) -> str:
        return f"{self._path}.{number}{piece.suffix}"

    def shift(self, keep: int, size_bytes: int) -> int:
        """Number the current file 1 and the older ones one higher; then remove those beyond `keep`.

        Args:
            keep: how many full pieces may stay.
            size_bytes: how much of the current file was written by us.

        Returns:
            How many bytes were removed with them.

        Raises:
            OSError: if the directory allows no renaming; everything is as it was.
        """
        with self._changed:
            for number, piece in reversed([*enumerate(self._pieces, 1)]):
                self._move(self._name(number, piece), self._name(number + 1, piece))
                self._move(f"{self._path}.{number}{INDEX_SUFFIX}", f"{self._path}.{number + 1}{INDEX_SUFFIX}")
            newest = Piece(size_bytes)
            self._move(self._path, self._name(1, newest))
            self._move(self._path + INDEX_SUFFIX, f"{self._path}.1{INDEX_SUFFIX}")
            self._pieces.insert(0, newest)
            dropped = sum(self._remove(keep + index, piece) for index, piece in enumerate(self._pieces[keep:], 1))
            del self._pieces[keep:]
            return dropped

    def _remove(self, number: int, piece: Piece) -> int:
        piece.removed = True
        for path in (self._name(number, piece), f"{self._path}.{number}{INDEX_SUFFIX}"):
            with contextlib.suppress(OSError):  # somebody else removed it already
                os.unlink(path)
        return piece.size_bytes

    def _move(self, old: str, new: str) -> None:
        if os.path.lexists(new):
            # Somebody else's: no name of ours is taken here, since the higher numbers moved first.
            number = len(self._pieces) + 2
            while os.path.lexists(f"{self._path}.{number}"):
                number += 1
            os.rename(new, f"{self._path}.{number}")
        with contextlib.suppress(FileNotFoundError):  # no index was asked for, or somebody removed the piece
            os.rename(old, new)

    def compress(self, executor: Executor) -> None:
        """Compress the newest piece, in a job of its own."""
        with self._changed:
            newest = self._pieces[0]
            self._compressing += 1
        try:
            executor.submit(self._compress, newest)
        except RuntimeError:  # the executor is closed: the piece stays as it is
            self._compressed()

    def _compress(self, piece: Piece) -> None:
        part = f"{self._path}.{id(piece):x}.part"
        try:
            with self._changed:
                if piece.removed:
                    return
                whole = open(self._name(self._pieces.index(piece) + 1, piece), "rb")  # noqa: SIM115  # closed below
            with whole, gzip.open(part, "wb", compresslevel=6) as packed:
                shutil.copyfileobj(whole, packed, COPY_BYTES)
            with self._changed:
                self._settle(piece, part)
        except OSError:
            # The disk is full, or the piece was deleted: the piece as it is loses nothing.
            with contextlib.suppress(OSError):
                os.unlink(part)
        finally:
            self._compressed()

    def _settle(self, piece: Piece, part: str) -> None:
        if piece.removed:
            os.unlink(part)
            return
        number = self._pieces.index(piece) + 1
        plain = self._name(number, piece)
        os.rename(part, plain + ".gz")
        piece.suffix = ".gz"
        os.unlink(plain)

    def _compressed(self) -> None:
        with self._changed:
            self._compressing -= 1
            self._changed.notify_all()

    def wait(self, within: float) -> None:
        """Wait until nothing is being compressed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._compressing, within)
