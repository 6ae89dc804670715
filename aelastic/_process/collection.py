"""asyncio's side of a child: how we come by its pid before anyone can collect it, and when asyncio has collected it.

A worker may be over and collected before asyncio tells its pid, by a thread at any moment where the host's loop waits
in threads (`watcher`). Then neither its true status nor its process group could be known. So the pidfd is taken in the
turn in which the child is born.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from asyncio.subprocess import Process as Child
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, final

from .._child import procfs
from .._exit import UNKNOWN_RETURNCODE, ExitStatus
from .._tasks import ServiceTask
from . import platform
from .watcher import collected_by_pidfd

T = TypeVar("T")
OnBorn = Callable[[int, int | None, int], object]
"""Is given pid, pidfd and the ticks at which the pid was certainly its own (0 when no pidfd tells)."""
ONE_FORK = threading.Lock()
"""uvloop refuses to fork in two threads at once ("racing with another loop"), and then leaves descriptors open."""


def _forked() -> None:
    """Begin anew in a forked child: the lock may be held by a thread that is not there."""
    global ONE_FORK  # noqa: PLW0603  # of this file
    ONE_FORK = threading.Lock()


os.register_at_fork(after_in_child=_forked)


async def start_collected(argv: tuple[str | bytes, ...], collection: Collection, **settings: Any) -> None:
    """Start a child by `asyncio.create_subprocess_exec`, with a pidfd of it before anybody waits for it.

    Args:
        settings: as for `asyncio.create_subprocess_exec`; descriptors for all three streams, so that asyncio has no
            pipe of its own, whose end its `Process.wait()` would wait for on 3.11 (gh-119710).

    Raises:
        OSError: as the spawn told it.
        RuntimeError: if 3.11 finds no thread to wait in, where it needs one (`watcher`).
    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.BaseEventLoop):
        settings["extra"] = Notes(collection)  # goes through to the transport
        first = _tasks_outlast(loop)
    else:
        first = _newborn_of(collection)
    collection.attend(await _FirstStep(asyncio.create_subprocess_exec(*argv, **settings), first))


@contextlib.contextmanager
def _tasks_outlast(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Let what becomes a task here end by itself, whoever cancels it; the child that is born here is asyncio's.

    asyncio connects a child in a task of its own, for whose end the start waits. `asyncio.run`'s end cancels every
    task, and one that was cancelled before its first turn would never tell.
    """
    before = loop.get_task_factory()
    loop.set_task_factory(_outlasting)
    try:
        with collected_by_pidfd():
            yield
    finally:
        loop.set_task_factory(before)


def _outlasting(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], **settings: Any
) -> asyncio.Future[T]:
    return ServiceTask(coro, loop=loop, **settings)


@contextlib.contextmanager
def _newborn_of(collection: Collection) -> Iterator[None]:
    """Take note of the child that another loop spawns here: it is this thread's newest, and nobody waits for it yet."""
    before = platform.children()
    with ONE_FORK:
        yield
    newborn = [pid for pid in platform.children() if pid not in before]
    if len(newborn) == 1:
        collection.born(newborn[0], watched=False)


@final
class Notes(dict[str, Any]):
    """What asyncio notes about a transport: the child first of all, before it arranges for its collection."""

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self._collection = collection

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name == "subprocess":
            self._collection.popen = value
            self._collection.born(value.pid, watched=False)


@final
class _FirstStep:
    """A start, whose first step spawns, with something around that step."""

    def __init__(self, start: Coroutine[Any, Any, Any], around: AbstractContextManager[None]) -> None:
        self._start = start
        self._around = around

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._start.__await__()
        try:
            with self._around:
                awaited = next(steps)
            while True:
                try:
                    sent = yield awaited
                except BaseException as error:  # noqa: BLE001  # passed on to where it belongs
                    awaited = steps.throw(error)
                else:
                    awaited = steps.send(sent)
        except StopIteration as done:
            return done.value


@final
class Collection:
    """asyncio's side of a child: its pid, our pidfd of it as early as can be, and that asyncio has collected it."""

    def __init__(self, on_born: OnBorn) -> None:
        self._on_born = on_born
        self.pid = 0
        self.pidfd: int | None = None
        self.held_ticks = 0
        self.shortage: OSError | None = None
        """Why there is no pidfd, when no descriptor was left."""
        self.popen: subprocess.Popen[bytes] | None = None
        """What asyncio's own loops make of the child, known before they arrange for its collection."""
        self.taken = False
        """Whether another waiter of the host has certainly collected the child."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Resolved when the child is collected and asyncio is through with it."""
        self._child: Child | None = None
        self._waiting: asyncio.Task[int] | None = None

    def attend(self, child: Child) -> None:
        """Learn the pid, where it was not seen before, and when asyncio has collected the child."""
        self._child = child
        self.born(child.pid, watched=True)
        self._wait()

    def _wait(self) -> None:
        # No service: on uvloop it would never end after a foreign waitpid.
        if self._child is not None and not self.done.done():
            self._waiting = self.done.get_loop().create_task(self._child.wait())
            self._waiting.add_done_callback(self._waited)

    def _waited(self, waiting: asyncio.Task[int]) -> None:
        if not waiting.cancelled():
            self.is_done()
        elif not self.done.done():
            self._wait()  # asyncio.run's end cancels every task, and the child is still to be collected

    def is_done(self) -> None:
        """Say that the child is collected, or never will be by asyncio."""
        if not self.done.done():
            self.done.set_result(None)
        if self._waiting is not None:
            self._waiting.cancel()

    def born(self, pid: int, *, watched: bool) -> None:
        """Take a pidfd of the child, unless that was done already.

        Args:
            watched: whether the loop may have collected it by now.
        """
        if self.pid == pid:
            return
        if self.pidfd is not None:  # what we took for it is another child
            os.close(self.pidfd)
        self.pid, now = pid, procfs.now_ticks()
        try:
            self.pidfd = platform.open_child(pid)
        except OSError as error:
            self.shortage = error
        else:
            self.held_ticks = now if self.pidfd is not None else 0
            self._on_born(pid, self.pidfd, self.held_ticks)
            if self.pidfd is None and not platform.is_uncollected_child(pid):
                self.taken = not watched
                self.was_collected()

    @property
    def returncode(self) -> int | None:
        """As asyncio tells it: 255 also for a status that it could not get."""
        return None if self._child is None else self._child.returncode

    @property
    def status(self) -> ExitStatus | None:
        """As asyncio tells it; None while it doesn't, or can't know."""
        if self.returncode is None:
            return None
        if self.returncode == UNKNOWN_RETURNCODE and (self.taken or self.pidfd is not None):
            return None  # through the pidfd it would have been seen before it was collected: another waiter was faster
        return ExitStatus.from_returncode(self.returncode)

    def was_collected(self) -> None:
        """The kernel says that somebody collected the child: find out whether that was asyncio."""
        ignored = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN  # then the kernel collects (wait(2))
        # uvloop sets its return code in the turn in which it collects, asyncio's loops a turn later.
        ours = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
        self.taken = self.taken or ignored or (self.returncode is None and not ours)
        if self.taken and not ours:
            self.is_done()  # uvloop never tells of a child that another waiter took
