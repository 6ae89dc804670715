"""The file sink: what one stream's file is given, in order, without ever making its giver wait.

Writes go through aiofiles on the run's own executor, one at a time for each file; short ones wait up to a quarter of a
second for company and go together (`desk`). A disk that fails is tried again,
with growing pauses, for a second; what is lost after that is counted, and announced once until the disk works again.
`Journal` is the same sink for a run's events.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, final

from aiofiles.threadpool.binary import AsyncFileIO

from aelastic._policies import Rotate
from aelastic._tasks import ServiceTask, service

from .desk import Desk
from .logfile import Batch, LogFile

BATCH_CHUNKS = 256
GRACE = 1.0
"""Seconds for which a failing file is tried again before anything is given up."""
SMALL_BYTES = 1 << 16
SMALL_EVERY = 0.25
"""Seconds between two writes of less than 64 KiB to one file; the first after a quiet time is made at once."""
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
GIVEN_UP_AFTER = 5.0
"""Seconds that closing waits for a disk that doesn't answer."""
COMPRESSED_WITHIN = 60.0
JOURNAL_BYTES = 8 << 20
"""How many bytes of events wait for a disk that fails; a working one may take its time."""

Lost = Callable[[int, str], None]
"""Is told how many bytes were lost so far, and why."""


@final
class FileSink:
    """One file, opened by its writer. Everything is the loop's.

    Args:
        path: made if missing, appended to.
        executor: where every call that touches the disk runs.
        buffer_bytes: how much may wait before `full`.
        on_lost: called once at the transition from working to losing.
        on_room: called when `full` ends.
        on_broken: called with an error of our own.
    """

    def __init__(
        self,
        path: str,
        *,
        executor: Executor,
        buffer_bytes: int,
        on_lost: Lost,
        on_room: Callable[[], None],
        on_broken: Callable[[BaseException], None],
        rotate: Rotate | None = None,
        timestamps: bool = False,
    ) -> None:
        self.lost_bytes = 0
        self._file = LogFile(path, rotate=rotate, timestamps=timestamps, executor=executor)
        self._executor = executor
        self._buffer_bytes = buffer_bytes
        self._on_lost = on_lost
        self._on_room = on_room
        self._on_broken = on_broken
        self._pending: list[tuple[bytes, int]] = []
        self._pending_bytes = 0
        self._writing_bytes = 0
        self._failing_since: float | None = None
        self._reason = ""
        self._announced = False
        self._finishing = False
        self._next_small = 0.0
        """When the next write of less than 64 KiB may begin, on the loop's clock."""
        self._waker: asyncio.Future[None] | None = None
        self._task: ServiceTask[None] | None = None
        self.opened: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        """Resolved when the file is open, or with what is in the way; a failure is tried again at the next write."""

    @property
    def path(self) -> str:
        """The file, or with rotation its current piece."""
        return self._file.path

    @property
    def full(self) -> bool:
        """Whether the stream should not be read on for now. Never while the file fails: no worker waits for that."""
        return self._failing_since is None and self._pending_bytes + self._writing_bytes >= self._buffer_bytes

    @property
    def dropped_bytes(self) -> int:
        """What `Rotate.keep` removed."""
        return self._file.dropped_bytes

    def pieces(self) -> tuple[str, ...]:
        """Paths of what is there, oldest first, the current piece last."""
        return self._file.all_pieces()

    def start(self) -> None:
        """Open the file and begin to write, in the running loop; see `opened`."""
        self._task = service(self._run(), name=f"writer of {self.path}")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not self.opened.done():
            self.opened.set_result(OSError(errno.EIO, f"{self.path} was given up before it was open"))
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_broken(error)

    def put(self, data: bytes, at_ns: int) -> None:
        """Take a chunk that was read at `at_ns`, nanoseconds since the epoch; never blocks."""
        if self._failing_since is not None and self._pending_bytes >= self._buffer_bytes:
            self._lose(len(data))
            return
        self._pending.append((data, at_ns))
        self._pending_bytes += len(data)
        if self._failing_since is None and (len(self._pending) == 1 or self._pending_bytes >= SMALL_BYTES):
            self._wake()

    async def finish(self) -> None:
        """Write what waits and close the file; bounded, idempotent.

        A disk that doesn't answer for 5 s is given up: what it holds is counted as lost.
        """
        self._finishing = True
        self._wake()
        if self._task is None:
            return
        if not await self._written():
            self._file.give_up()
            # Not our own cancel(), which asks the owner: we are the owner, and the thread that hangs stays behind.
            asyncio.Task.cancel(self._task)
            await asyncio.wait({self._task})
            self._give_up(f"{self.path} took nothing for {GIVEN_UP_AFTER:g} s")
        else:
            await self._compressed()

    async def _written(self) -> bool:
        """Wait for the writer's end as long as bytes move."""
        before = -1
        while self._task is not None and not self._task.done():
            if self._file.taken_bytes == before:
                return False
            before = self._file.taken_bytes
            await asyncio.wait({self._task}, timeout=GIVEN_UP_AFTER)
        return True

    async def _compressed(self) -> None:
        if self._file.compresses:
            wait = functools.partial(self._file.finish_pieces, COMPRESSED_WITHIN)
            await asyncio.get_running_loop().run_in_executor(self._executor, wait)

    async def _run(self) -> None:
        file: Any = self._file  # its types know FileIO only
        disk: Any = AsyncFileIO(file, asyncio.get_running_loop(), self._executor)
        try:
            self.opened.set_result(await self._open())
            while self._pending or not self._finishing:
                if not self._pending:
                    await self._pause(None)
                elif (rest := self._too_soon()) > 0:
                    await self._pause(rest)
                else:
                    await self._write(disk, self._taken())
        except Exception:  # a bug of ours; a cancellation is none, it leaves the file to the thread that hangs
            await disk.close()
            raise
        await disk.close()
        self._count_deleted()

    async def _open(self) -> OSError | None:
        try:
            await Desk.of(self._executor).run(self._executor, self._file.open)
        except OSError as error:
            return error
        return None

    def _too_soon(self) -> float:
        """Seconds to wait for more, so that a stream of short lines isn't one job for each line."""
        if self._finishing or self._pending_bytes >= SMALL_BYTES:
            return 0.0
        return self._next_small - asyncio.get_running_loop().time()

    def _taken(self) -> Batch:
        batch, self._pending = self._pending[:BATCH_CHUNKS], self._pending[BATCH_CHUNKS:]
        self._writing_bytes = sum(len(data) for data, _ in batch)
        self._pending_bytes -= self._writing_bytes
        return batch

    async def _write(self, disk: Any, batch: Batch) -> None:
        pause = FIRST_PAUSE
        while batch:
            before = self._file.taken_bytes
            try:
                if self._writing_bytes < SMALL_BYTES:
                    await Desk.of(self._executor).run(self._executor, functools.partial(self._file.writelines, batch))
                else:
                    await disk.writelines(batch)
            except OSError as error:
                moved = self._file.taken_bytes - before
                batch = _rest_of(batch, moved)
                self._failed(error, moved=bool(moved))
                if self._out_of_patience(error):
                    self._lose(_size(batch))
                    break
                await self._pause(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                self._failing_since, self._announced = None, False
                break
            finally:
                self._count_deleted()
        self._written_batch()
        if self._announced and not self._finishing:
            await self._pause(LONGEST_PAUSE)

    def _written_batch(self) -> None:
        # At full quarters of a second, so that all files are written at the same time and by one job.
        self._next_small = (asyncio.get_running_loop().time() // SMALL_EVERY + 1) * SMALL_EVERY
        was_full = self.full
        self._writing_bytes = 0
        if was_full:
            self._on_room()

    def _failed(self, error: OSError, *, moved: bool) -> None:
        self._reason = f"{self.path}: {error.strerror or error}"
        if self._failing_since is None or moved:
            self._failing_since = time.monotonic()
            self._on_room()  # a worker that was held back goes on

    def _out_of_patience(self, error: OSError) -> bool:
        # A FIFO that is full for the moment is no failure yet, even at the end.
        hopeless = self._announced or (self._finishing and not isinstance(error, BlockingIOError))
        since = self._failing_since
        return hopeless or (since is not None and time.monotonic() - since >= GRACE)

    def _lose(self, count: int) -> None:
        if count:
            self.lost_bytes += count
            if not self._announced:
                self._announced = True
                self._on_lost(count, self._reason)

    def _count_deleted(self) -> None:
        """Count what was in a file that somebody deleted."""
        deleted, self._file.deleted_bytes = self._file.deleted_bytes, 0
        if deleted:
            self.lost_bytes += deleted
            self._on_lost(deleted, f"{self.path} was deleted while it was written")

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        count = self._pending_bytes + self._writing_bytes
        self._pending, self._pending_bytes, self._writing_bytes = [], 0, 0
        self._lose(count)

    async def _pause(self, seconds: float | None) -> None:
        """Wait for something to do, or for a while; the end of the stream cuts it short."""
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, self._wake)
        await self._waker
        if timer is not None:
            timer.cancel()

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)


def _size(batch: Batch) -> int:
    return sum(len(data) for data, _ in batch)


def _rest_of(batch: Batch, written: int) -> Batch:
    for index, (data, at_ns) in enumerate(batch):
        if written < len(data):
            return [(data[written:], at_ns), *batch[index + 1 :]]
        written -= len(data)
    return []


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
