"""The two pipes of a function worker: the call goes down, the result comes up.

Neither ever holds up the loop: the call is written as the pipe takes it, the result is read and unpickled in a thread
that exists while there is something to read. `ResultChannel.returned` is resolved exactly once, whatever happens.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, final

from aelastic._child.frames import RAISED, Aborted, ChunkReader, Restarted
from aelastic._descriptors import close_fd, open_pipe
from aelastic._returned import NO_RESULT, Raised, RemoteTraceback, Returned, Torn, Unloadable, Value

WRITE_BYTES = 1 << 20
"""The most that is handed to the kernel in one turn of the loop."""
CLOSE_SECONDS = 1.0
"""How long a close waits for a thread that is stuck in a user's `__setstate__`."""


@final
class CallPipe:
    """Sends a call to a worker, in turns of the loop.

    Args:
        parts: written one after the other.
    """

    def __init__(self, parts: Sequence[bytes]) -> None:
        self.child_fd, self._fd = open_pipe()
        os.set_blocking(self._fd, False)
        self._left = [memoryview(part) for part in parts]
        self._loop = asyncio.get_running_loop()
        self._waiting = False

    def started(self) -> None:
        """Close the child's end and begin to write."""
        self._close_child_end()
        if self._write():
            self._waiting = True
            self._loop.add_writer(self._fd, self._write)

    def _write(self) -> bool:
        """Write what the pipe takes; False when it is done, or nobody will read it."""
        try:
            while self._left:
                view = self._left[0]
                self._left[0] = view[os.write(self._fd, view[:WRITE_BYTES]) :]
                if not self._left[0]:
                    del self._left[0]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            pass  # the worker ended early; its exit says why
        self.close()
        return False

    def _close_child_end(self) -> None:
        if self.child_fd >= 0:
            close_fd(self.child_fd)
            self.child_fd = -1

    def close(self) -> None:
        """Give up what is left; idempotent."""
        self._close_child_end()
        self._left.clear()
        if self._waiting:
            self._waiting = False
            self._loop.remove_writer(self._fd)
        if self._fd >= 0:
            close_fd(self._fd)
            self._fd = -1


@final
class ResultChannel:
    """Waits for one rank's result; `returned` resolves to it, and is never cancelled from here.

    Args:
        who: the run and rank as error texts name them.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._loop = asyncio.get_running_loop()
        self.returned: asyncio.Future[Returned] = self._loop.create_future()
        self._fd = self.child_fd = -1
        self._listening = False
        self._transfer: Transfer | None = None

    def open(self) -> None:
        """Make the pipe; the worker is given `child_fd`.

        Raises:
            OSError: if no descriptor is left.
        """
        self._fd, self.child_fd = open_pipe()
        os.set_blocking(self._fd, False)

    def started(self) -> None:
        """Close the child's end and wait for a result."""
        self._close_child_end()
        self._listening = True
        self._loop.add_reader(self._fd, self._begin)

    def worker_ended(self) -> None:
        """Expect nothing more than what is in the pipe, even if another process holds its other end."""
        if self._transfer is None and self._listening:
            self._begin()
        if self._transfer is not None:
            self._transfer.end()
        else:
            self._resolve(NO_RESULT)

    def _begin(self) -> None:
        """Read the first byte, and leave the rest to a thread."""
        try:
            kind = os.read(self._fd, 1)
        except BlockingIOError:
            return
        self._stop_listening()
        if not kind:
            self._resolve(NO_RESULT)
            return
        try:
            self._transfer = Transfer(self._fd, kind, self._who, self._loop, self._resolve)
        except (OSError, RuntimeError) as error:  # no descriptor or no thread is left
            self._resolve(Torn(f"the result of {self._who} could not be received: {error}"))
        else:
            self._fd = -1

    def _resolve(self, returned: Returned) -> None:
        if not self.returned.done():
            self.returned.set_result(returned)
        self._close_fds()

    async def close(self) -> None:
        """Give up what has not arrived; idempotent, bounded by `CLOSE_SECONDS`."""
        if self._transfer is not None and not self.returned.done():
            self._transfer.end()
            await asyncio.wait({self.returned}, timeout=CLOSE_SECONDS)
        late = Torn(f"the result of {self._who} was not loaded in time")
        self._resolve(NO_RESULT if self._transfer is None else late)
        if self._transfer is not None:
            await self._transfer.gone(CLOSE_SECONDS)

    def _close_fds(self) -> None:
        self._stop_listening()
        self._close_child_end()
        if self._fd >= 0:
            close_fd(self._fd)
            self._fd = -1

    def _stop_listening(self) -> None:
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._fd)

    def _close_child_end(self) -> None:
        if self.child_fd >= 0:
            close_fd(self.child_fd)
            self.child_fd = -1


class Ended(Exception):
    """The pipe gives no more; the argument says why."""


@final
class Transfer:
    """Reads and unpickles one result in a thread of its own.

    Args:
        fd: the pipe, not blocking; owned once the transfer was made.
        kind: its first byte.
        deliver: called in the loop, once.

    Raises:
        OSError: if no descriptor is left.
        RuntimeError: if there can be no further thread.
    """

    def __init__(
        self, fd: int, kind: bytes, who: str, loop: asyncio.AbstractEventLoop, deliver: Callable[[Returned], None]
    ) -> None:
        self._fd = fd
        self._who = who
        self._loop = loop
        self._deliver = deliver
        self._wake_r, self._wake_w = open_pipe()
        self._ended = False
        self._received = len(kind)
        # A daemon, because it may be stuck in the user's __setstate__ when the host exits.
        self._thread = threading.Thread(target=self._work, args=(kind,), name=f"result of {who}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._close_wake()
            raise

    def end(self) -> None:
        """Read on only while there is something in the pipe."""
        if not self._ended and self._wake_w >= 0:
            self._ended = True
            os.write(self._wake_w, b".")

    async def gone(self, within: float) -> None:
        """Wait for the end of the thread, `within` seconds at the most."""
        deadline = self._loop.time() + within
        while self._thread.is_alive() and self._loop.time() < deadline:
            await asyncio.sleep(0.001)

    def _work(self, kind: bytes) -> None:
        try:
            returned = self._receive(kind)
        finally:
            close_fd(self._fd)
        try:
            self._loop.call_soon_threadsafe(self._finish, returned)
        except RuntimeError:  # the loop was closed meanwhile, so nobody waits
            self._close_wake()

    def _finish(self, returned: Returned) -> None:
        # The thread is not joined: it has nothing left to do, but on a busy machine it may wait long for its turn.
        self._close_wake()
        self._deliver(returned)

    def _close_wake(self) -> None:
        close_fd(self._wake_r)
        close_fd(self._wake_w)
        self._wake_w = -1

    def _receive(self, kind: bytes) -> Returned:
        reader = ChunkReader(self._fill)
        remote = ""
        try:
            remote = reader.chunk().decode("utf-8", "replace") if kind == RAISED else ""
            loaded = _load(reader)
        except Ended as error:
            failed: Returned = Torn(f"the result of {self._who} is torn after {self._received} bytes: {error}")
        except Aborted as error:
            failed = Unloadable(f"what {self._who} returned can't be pickled", str(error))
        except BaseException:  # noqa: BLE001  # the user's code, in a thread that only works for it
            failed = Unloadable(f"what {self._who} returned can't be loaded here", traceback.format_exc())
        else:
            return _raised(loaded, remote) if kind == RAISED else Value(loaded)
        return Raised(None, remote) if remote else failed

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = os.readv(self._fd, [view])
            except BlockingIOError:
                self._wait()
                continue
            if not count:
                raise Ended("its worker closed the pipe")
            self._received += count
            view = view[count:]

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if self._ended:
            if not poll.poll(0):
                raise Ended("its worker ended")
            return
        poll.register(self._wake_r, select.POLLIN)
        poll.poll()


def _load(reader: ChunkReader) -> Any:
    while True:
        try:
            loaded = pickle.load(reader)  # noqa: S301  # a worker of ours wrote it, and is trusted (WorkerOptions)
        except Restarted:
            continue
        reader.finish()
        return loaded


def _raised(loaded: Any, remote: str) -> Raised:
    if not isinstance(loaded, BaseException):
        return Raised(None, remote)
    loaded.__cause__ = RemoteTraceback(remote)
    return Raised(loaded, remote)
