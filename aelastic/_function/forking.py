"""Start a worker by fork(2), in the loop's own thread.

Not in another: fork(2) holds the interpreter anyway; no spawn of the loop is half-way then, whose descriptors a worker
would keep; and a child that any but the main thread forked runs no signal handler on Python 3.13.

Nothing is pickled on the way down: the function finds the host's memory as it was. What differs from spawn: threads
of the host don't exist in the worker, locks that they held stay locked, variables that an interpreter reads at its
start (PYTHONHASHSEED, LD_PRELOAD) come too late, /proc shows the host's environment and command line, and fork holds
the host's interpreter for as long as the kernel copies its page tables (56 to 75 ms for 2 GiB).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, final

from aelastic._child import forked, procfs
from aelastic._descriptors import owned
from aelastic._exit import ExitStatus
from aelastic._limits import shortage
from aelastic._process import Command, Confirmation, Process, collect, needed_for

from .channel import ResultChannel

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def settings_of(command: Command) -> dict[str, Any]:
    """What a forked worker must put in force itself, in plain values."""
    words = needed_for(command.options, command.rank, command.env, who=command.who, cgroup=command.cgroup) or ()
    return {"words": list(words), "env": dict(command.env), "cwd": command.cwd}


async def fork(call: Call, command: Command, result: ResultChannel) -> Process:
    """Fork a worker that runs the call.

    Args:
        result: open; its child's end goes to the worker.

    Raises:
        OSError: naming run and rank, if there can be no further process.
    """
    confirmation = Confirmation(command.who)
    started_ns = time.monotonic_ns()
    try:
        streams = (command.stdin, command.stdout, command.stderr)
        kept = {*streams, result.child_fd, confirmation.child_fd, *command.pass_fds}
        become = functools.partial(
            forked.run,
            lambda: call,
            streams=streams,
            result_fd=result.child_fd,
            status_fd=confirmation.child_fd,
            settings=settings_of(command),
            unwanted=owned() - kept,
        )
        pid, ready_fd = forked.begin()
        if pid == 0:
            _leave(become)
        pid = await _session_led(ready_fd, pid)
    except OSError as error:
        confirmation.close()
        what = shortage(error.errno or 0) or error.strerror
        raise OSError(error.errno, f"{command.who} can't be started: {what}") from error
    except BaseException:
        confirmation.close()
        raise
    confirmation.started()
    child = ForkedChild(pid)
    command.on_born(pid, child.pidfd, child.held_ticks)
    process = Process(child, started_ns, confirmation, command.cgroup)
    process.exited.add_done_callback(lambda _: child.collect(process.pidfd))
    return process


def _leave(become: Callable[[], NoReturn]) -> NoReturn:
    """In the child: what the host's task has set is none of the worker's, and nothing comes back from here."""
    try:
        contextvars.Context().run(become)
    finally:
        os._exit(forked.NOT_STARTED)


async def _session_led(ready_fd: int, pid: int) -> int:
    """Wait until the child leads its session, or has ended; give its pid."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def heard() -> None:
        loop.remove_reader(ready_fd)
        ready.set_result(None)

    loop.add_reader(ready_fd, heard)
    await asyncio.wait({ready})
    return forked.told_pid(ready_fd, pid)


@final
class ForkedChild:
    """Collects a child that we forked ourselves, as asyncio does with its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: ExitStatus | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self.held_ticks = procfs.now_ticks()
        self.pidfd = _open_pidfd(pid)
        if self.pidfd is None:
            threading.Thread(target=self._wait, name=f"end of {pid}", daemon=True).start()

    def was_collected(self) -> None:
        """Learn that another waiter of the host took the status."""

    def collect(self, pidfd: int | None) -> None:
        """Collect the child, which has ended.

        Args:
            pidfd: of it. By its number another child could be meant, and waited for, if the kernel collected this one.
        """
        if pidfd is not None:
            collect(pidfd)
        if not self.done.done():
            self.done.set_result(None)

    def _wait(self) -> None:
        """Where there are no pidfds: wait in a thread."""
        try:
            _, status = os.waitpid(self.pid, 0)
            self.status = ExitStatus.from_wait_status(status)
        except ChildProcessError:
            pass  # taken by another waiter: unknown
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.done.set_result, None)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
