"""A run's events on disk: a file sink of its own, given a line for each event."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from typing import final

from .files import FileSink, Lost

JOURNAL_BYTES = 8 << 20
"""How many bytes of events wait for a disk that fails; a working one may take its time."""


@final
class Journal:
    """A run's events on disk, a line each: appended in order, never waited for, flushed when it is closed."""

    def __init__(self, path: str, *, executor: Executor, on_lost: Lost | None = None) -> None:
        self._error: BaseException | None = None
        self._sink = FileSink(
            path,
            executor=executor,
            buffer_bytes=JOURNAL_BYTES,
            on_lost=on_lost or (lambda _count, _reason: None),
            on_room=lambda: None,
            on_broken=self._broken,
        )

    @classmethod
    async def open(cls, path: str, *, executor: Executor, on_lost: Lost | None = None) -> Journal:
        """Open a journal, made if missing.

        Args:
            on_lost: told once when events begin to be lost; the total is in `lost_bytes`.

        Raises:
            OSError: naming the path.
        """
        journal = cls(path, executor=executor, on_lost=on_lost)
        journal._sink.start()
        if (error := await journal._sink.opened) is not None:
            await journal.close()
            raise error
        return journal

    @property
    def lost_bytes(self) -> int:
        """What could not be written."""
        return self._sink.lost_bytes

    def append(self, line: bytes) -> None:
        """Add a line with its newline; never blocks."""
        self._sink.put(line, time.time_ns())

    async def close(self) -> None:
        """Write what waits and close the file; bounded, idempotent.

        Raises:
            BaseException: an error of our own that ended the writing.
        """
        await self._sink.finish()
        if self._error is not None:
            raise self._error

    def _broken(self, error: BaseException) -> None:
        self._error = error
