"""Start a worker by fork(2): in a thread, since the host's loop runs on meanwhile.

Nothing is pickled on the way down: the function finds the host's memory as it was. What differs from spawn: threads
of the host don't exist in the worker, locks that they held stay locked, variables that an interpreter reads at its
start (PYTHONHASHSEED, LD_PRELOAD) come too late, /proc shows the host's environment and command line, and fork holds
the host's interpreter for as long as the kernel copies its page tables (56 to 75 ms for 2 GiB).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, final

from aelastic._child import forked, procfs
from aelastic._exit import ExitStatus
from aelastic._process import Command, Confirmation, Process, needed_for

from .channel import ResultChannel, open_channels

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def settings_of(command: Command) -> dict[str, Any]:
    """What a forked worker must put in force itself, in plain values."""
    words = needed_for(command.options, command.rank, command.env, who=command.who) or ()
    return {"words": list(words), "env": dict(command.env), "cwd": command.cwd}


async def fork(call: Call, command: Command, result: ResultChannel, threads: Executor) -> Process:
    """Fork a worker that runs the call.

    Args:
        result: open; its child's end goes to the worker.
        threads: where it is forked.

    Raises:
        OSError: naming run and rank, if there can be no further process.
    """
    loop = asyncio.get_running_loop()
    settings = settings_of(command)
    confirmation = Confirmation(command.who)
    started_ns = time.monotonic_ns()
    try:
        pid = await loop.run_in_executor(
            threads, _fork, call, command, result.child_fd, confirmation.child_fd, settings
        )
    except OSError as error:
        confirmation.close()
        raise OSError(error.errno, f"{command.who} can't be started: {error.strerror}") from error
    confirmation.started()
    child = ForkedChild(pid)
    process = Process(child, started_ns, confirmation)
    process.exited.add_done_callback(lambda _: child.collect())
    return process


def _fork(call: Call, command: Command, result_fd: int, status_fd: int, settings: Mapping[str, Any]) -> int:
    pid = forked.fork_apart()
    if pid == 0:
        try:
            kept = {result_fd, status_fd, *command.pass_fds}
            ours = {fd for channel in list(open_channels) for fd in channel.descriptors()}
            forked.run(
                lambda: call,
                streams=(command.stdin, command.stdout, command.stderr),
                result_fd=result_fd,
                status_fd=status_fd,
                settings=settings,
                unwanted=ours - kept,
            )
        finally:
            os._exit(forked.NOT_STARTED)
    return pid


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

    def collect(self) -> None:
        """Collect the child, which has ended."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
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
