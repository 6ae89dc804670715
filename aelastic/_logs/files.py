"""The file sink: what one stream's file is given, in order, without ever making its giver wait.

Every write runs on the run's own executor, one at a time for each file, by one of two ways:

- aiofiles: batches of 64 KiB and more, and all that a disk refused. The writer's task awaits each as a job of its own,
  in one of the loop's few lanes (`lanes`). The task is begun when there is such work for the first time, or at the end:
  most streams never say that much.
- The desk (`desk`): opening, closing, and batches of less than 64 KiB, which wait up to half a second for
  company. Those of all files go in one job: with many chatty workers a job, a future and the waking of a task for each
  cost ten times the write. Nothing is awaited on this way; what fails there is handed to the writer's task.

A disk that fails is tried again, with growing pauses, for a second; what is lost after that is counted, and announced
once until the disk works again.
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
from .lanes import Lanes
from .logfile import Batch, LogFile

BATCH_CHUNKS = 256
GRACE = 1.0
"""Seconds for which a failing file is tried again before anything is given up."""
SMALL_BYTES = 1 << 16
SMALL_EVERY = 0.5
"""Seconds between two writes of less than 64 KiB to one file; the first after a quiet time is made at once."""
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
GIVEN_UP_AFTER = 5.0
"""Seconds that closing waits for a disk that doesn't answer."""
COMPRESSED_WITHIN = 60.0

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
        self._writing: Batch = ()
        """What is on its way to the disk, or was refused there."""
        self._writing_bytes = 0
        self._at_desk = False
        """Whether the desk has an errand for this file, be it to open it."""
        self._taken_before = 0
        """What the file had taken when that was begun."""
        self._refused: BaseException | None = None
        """What came of the last errand."""
        self._failing_since: float | None = None
        self._reason = ""
        self._announced = False
        self._finishing = False
        self._next_small = 0.0
        """When the next write of less than 64 KiB may begin, on the loop's clock."""
        self._desk = Desk.of(executor)
        self._lanes = Lanes.of_running_loop()
        self._reached_disk: float | None = 0.0
        """When the newest batch had its turn, on the loop's clock; None while others have theirs."""
        self._waker: asyncio.Future[None] | None = None
        """What the task waits for while it has nothing to do, or makes a pause."""
        self._idle = False
        """Whether the task waits for work."""
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
        self._at_desk = True
        self._desk.ask(self._file.open, self._was_opened)

    def _was_opened(self, error: BaseException | None) -> None:
        self._at_desk = False
        if self._file.given_up:
            return
        if error is not None and not isinstance(error, OSError):
            self._on_broken(error)
            error = OSError(errno.EIO, f"{self.path} could not be opened: {error!r}")
        self.opened.set_result(error)
        self._look_for_more()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_broken(error)

    def put(self, data: bytes, at_ns: int) -> None:
        """Take a chunk that was read at `at_ns`, nanoseconds since the epoch; never blocks."""
        if self._failing_since is not None and self._pending_bytes >= self._buffer_bytes:
            self._lose(len(data))
            return
        self._pending.append((data, at_ns))
        self._pending_bytes += len(data)
        if self._has_work and (self._idle or self._task is None):
            self._wake()
        elif len(self._pending) == 1 and not self._writing_bytes and self._failing_since is None:
            self._ask_desk()

    def _ask_desk(self) -> None:
        """Let a small batch be written as soon as it may."""
        if self._finishing or asyncio.get_running_loop().time() >= self._next_small:
            self._write_small()
        else:
            self._desk.at(self._next_small, self._write_small)

    def _write_small(self) -> None:
        if self._at_desk or self._writing_bytes or not self._pending or self._has_work:
            return  # the task does it, or did it already
        self._take()
        self._at_desk = True
        self._desk.ask(functools.partial(self._file.writelines, self._writing), self._small_written)

    def _small_written(self, error: BaseException | None) -> None:
        self._at_desk = False
        if self._file.given_up:
            return
        if error is None:
            self._batch_written()
        else:
            self._refused = error
            self._wake()

    async def finish(self) -> None:
        """Write what waits and close the file; bounded, idempotent.

        A disk that doesn't answer for 5 s is given up: what it holds is counted as lost.
        """
        self._finishing = True
        self._desk.not_at(self._next_small, self._write_small)
        if not (self._at_desk or self.opened.done()):
            return  # it was never started
        self._look_for_more()
        self._wake()  # it is the task that closes the file
        if not await self._written():
            await self._give_up(f"{self.path} took nothing for {GIVEN_UP_AFTER:g} s")
        else:
            await self._compressed()

    async def _written(self) -> bool:
        """Wait for the writer's end as long as bytes move."""
        loop = asyncio.get_running_loop()
        before, moved = self._file.taken_bytes, loop.time()
        while self._task is not None and not self._task.done():
            now = loop.time()
            if self._file.taken_bytes != before or self._reached_disk is None:
                before, moved = self._file.taken_bytes, now
            left = max(moved, self._reached_disk or 0.0) + GIVEN_UP_AFTER - now
            if left <= 0:
                return False
            await asyncio.wait({self._task}, timeout=left)
        return True

    async def _compressed(self) -> None:
        if self._file.compresses:
            wait = functools.partial(self._file.finish_pieces, COMPRESSED_WITHIN)
            await asyncio.get_running_loop().run_in_executor(self._executor, wait)

    async def _run(self) -> None:
        file: Any = self._file  # its types know FileIO only
        disk: Any = AsyncFileIO(file, asyncio.get_running_loop(), self._executor)
        try:
            while self._pending or self._at_desk or self._refused is not None or not self._finishing:
                if self._refused is not None:
                    refused, self._refused = self._refused, None
                    await self._insist(disk, refused)
                elif self._has_work and not self._at_desk:
                    await self._write(disk)
                else:
                    await self._rest()
        except Exception:  # a bug of ours; a cancellation is none, it leaves the file to the thread that hangs
            await self._desk.run(self._file.close)
            raise
        await self._desk.run(self._file.close)
        self._count_deleted()

    @property
    def _has_work(self) -> bool:
        """Whether the task is to write what waits, rather than the desk."""
        return self._pending_bytes >= SMALL_BYTES or (bool(self._pending) and self._failing_since is not None)

    def _take(self) -> None:
        self._writing, self._pending = self._pending[:BATCH_CHUNKS], self._pending[BATCH_CHUNKS:]
        self._writing_bytes = _size(self._writing)
        self._pending_bytes -= self._writing_bytes
        self._taken_before = self._file.taken_bytes

    async def _write(self, disk: Any) -> None:
        self._take()
        try:
            await self._give_to(disk)
        except OSError as error:
            await self._insist(disk, error)
        else:
            self._batch_written()

    async def _give_to(self, disk: Any) -> None:
        self._reached_disk = None
        async with self._lanes.one(self._writing_bytes):
            self._reached_disk = asyncio.get_running_loop().time()
            await disk.writelines(self._writing)

    async def _insist(self, disk: Any, refused: BaseException) -> None:
        """Try what is left of a batch again, until it is written or patience is at its end.

        Raises:
            BaseException: what was refused, if it is no error of the disk's.
        """
        pause = FIRST_PAUSE
        while self._is_to_be_tried_again(refused):
            await self._pause(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            try:
                await self._give_to(disk)
            except OSError as error:
                refused = error
            else:
                self._batch_written()
                return
        self._lose(self._writing_bytes)
        self._batch_over()
        if not self._finishing:
            await self._pause(LONGEST_PAUSE)

    def _is_to_be_tried_again(self, refused: BaseException) -> bool:
        if not isinstance(refused, OSError):
            raise refused
        self._count_deleted()
        moved = self._file.taken_bytes - self._taken_before
        self._taken_before += moved
        self._writing = _rest_of(self._writing, moved)
        self._writing_bytes = _size(self._writing)
        self._failed(refused, moved=bool(moved))
        return not self._out_of_patience(refused)

    def _batch_written(self) -> None:
        self._failing_since, self._announced = None, False
        self._count_deleted()
        self._batch_over()

    def _batch_over(self) -> None:
        # At full halves of a second, so that all files are written at the same time and by one job.
        self._next_small = (asyncio.get_running_loop().time() // SMALL_EVERY + 1) * SMALL_EVERY
        was_full = self.full
        self._writing, self._writing_bytes = (), 0
        if was_full:
            self._on_room()
        self._look_for_more()

    def _look_for_more(self) -> None:
        if self._pending and not self._has_work:
            self._ask_desk()
        elif self._pending or self._finishing:
            self._wake()

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

    async def _give_up(self, reason: str) -> None:
        self._reason = reason
        self._file.give_up()
        if not self.opened.done():
            self.opened.set_result(OSError(errno.EIO, f"{self.path} was given up before it was open"))
        if self._task is not None:
            # Not our own cancel(), which asks the owner: we are the owner, and the thread that hangs stays behind.
            asyncio.Task.cancel(self._task)
            await asyncio.wait({self._task})
        count = self._pending_bytes + self._writing_bytes
        if self._writing_bytes:
            count -= self._file.taken_bytes - self._taken_before
        self._pending, self._pending_bytes, self._writing_bytes = [], 0, 0
        self._lose(count)

    async def _rest(self) -> None:
        """Wait for work."""
        self._waker, self._idle = asyncio.get_running_loop().create_future(), True
        try:
            await self._waker
        finally:
            self._idle = False

    async def _pause(self, seconds: float) -> None:
        """Wait for a while; the end of the stream cuts it short."""
        loop = asyncio.get_running_loop()
        self._waker = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._waker
        finally:
            timer.cancel()

    def _wake(self) -> None:
        """Let the task see what there is to do."""
        if self._task is None:
            self._task = service(self._run(), name=f"writer of {self.path}")
            self._task.add_done_callback(self._ended)
        elif self._waker is not None and not self._waker.done():
            self._waker.set_result(None)


def _size(batch: Batch) -> int:
    return sum(len(data) for data, _ in batch)


def _rest_of(batch: Batch, written: int) -> Batch:
    for index, (data, at_ns) in enumerate(batch):
        if written < len(data):
            return [(data[written:], at_ns), *batch[index + 1 :]]
        written -= len(data)
    return []
