"""One started process: its pidfd, its exit, signals to its group.

asyncio collects the process; we look at it through the pidfd, before or after. The handle owns pid, pidfd and exit
status. What the process left behind is `tree`'s.

Theory of operation: the pidfd becomes readable the moment the process ends, whoever collects it. Then the status is
told by the first of these that can: the zombie, looked at without collecting it (where nobody waits in a thread we are
called before it is collected); the pidfd, once it was collected (Linux 6.15); asyncio. Where another waiter of the
host took the status and the kernel doesn't keep it, it is unknown, never guessed.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Protocol, final

from .._child import procfs
from .._exit import ExitStatus
from .._results import ExitUsage
from . import platform
from .cgroups import usage_of
from .pace import Pace
from .trampoline import Confirmation

UNKNOWN = ExitStatus(None, None)
PAUSES = (0.001, 0.01, 0.1, 0.5)
"""Seconds between questions for a status that is just being taken by another thread; after the last it is unknown."""


class Child(Protocol):
    """Who collects a process that has been born; asyncio, or whoever forked it."""

    pid: int
    pidfd: int | None
    held_ticks: int
    """Clock ticks since boot at which the number was certainly its own; 0 when no pidfd tells."""
    done: asyncio.Future[None]
    """Resolved when it is collected."""

    @property
    def status(self) -> ExitStatus | None:
        """As the collector tells it; None while it doesn't, or can't know."""
        ...

    def was_collected(self) -> None:
        """Hear from the kernel that somebody collected it."""
        ...


@final
class Process:
    """A started process that we watch. Belongs to the running loop.

    Args:
        child: what its collector knows of it.
        started_ns: monotonic nanoseconds before it was started.
        confirmation: of the trampoline that it was started through; None without one.
        cgroup: folder of its own cgroup; empty without one.
    """

    def __init__(self, child: Child, started_ns: int, confirmation: Confirmation | None, cgroup: str = "") -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self._confirmation = confirmation
        self._pace = Pace.of_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self.cgroup = cgroup
        self.pid = child.pid
        self.pidfd = child.pidfd
        self.started_ns = started_ns
        self.exit_ns = 0
        """Monotonic nanoseconds at which the end was seen, maybe a little before it is told; 0 before."""
        self.usage = ExitUsage()
        """Known at the exit where the figures could be read before anybody collected the process."""
        self._seen: ExitStatus | None = None
        """Its status as the zombie told it."""
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        """Resolved as soon as the process has ended, whatever it left running; never fails."""
        self.held_ticks = child.held_ticks
        """Clock ticks since boot up to which its number was certainly its own (procfs.Member.started)."""
        if self.pidfd is not None:
            self._loop.add_reader(self.pidfd, self._end_seen)
        child.done.add_done_callback(self._collected)

    async def confirmed(self) -> None:
        """Wait until the program itself runs; at once where no trampoline is needed.

        Raises:
            OSError: of the errno's class, if an option could not be put in force or the program not be executed.
        """
        if self._confirmation is not None:
            await self._confirmation.wait()

    def has_ended(self) -> bool:
        """Whether the process has ended by now, also when `exited` doesn't tell yet."""
        return self.exited.done() or (self.pidfd is not None and platform.has_ended(self.pidfd))

    def signal_group(self, sig: int) -> bool:
        """Signal the process group that this process leads, also after its end.

        Returns:
            False when nobody is in it, or nobody whom we may signal.
        """
        if self.pidfd is not None:
            return platform.signal_group(self.pidfd, self.pid, sig)
        return not self.exited.done() and platform.signal_group_of_child(self.pid, sig)

    def _end_seen(self) -> None:
        if self.pidfd is None:
            return
        if not self.exit_ns:
            self.exit_ns = time.monotonic_ns()
            self._look_at_zombie(self.pidfd)
        if not self._pace.admits():
            return  # the reader is called again in the next turn
        self._loop.remove_reader(self.pidfd)
        if self.cgroup:
            self.usage = usage_of(self.cgroup)
        if self._seen is not None:
            self._resolve(self._seen)
        else:
            self._child.was_collected()
            self._ask(PAUSES)

    def _look_at_zombie(self, pidfd: int) -> None:
        """Read what it tells, at once: asyncio may collect it before this turn ends."""
        now, seconds = procfs.now_ticks(), cpu_seconds(self.pid)
        self._seen = platform.peek_status(pidfd)
        if self._seen is not None:
            # Still there after the figures were read, so they were its own.
            self.held_ticks, self.usage = now, ExitUsage(cpu_seconds=seconds)

    def _ask(self, pauses: tuple[float, ...]) -> None:
        """Ask the kernel and asyncio; again a little later while another thread is just collecting."""
        if self.exited.done() or self.pidfd is None:
            return
        status = platform.collected_status(self.pidfd) or self._child.status
        if status is not None or not pauses:
            self._resolve(status or UNKNOWN)
        else:
            self._retry = self._loop.call_later(pauses[0], self._ask, pauses[1:])

    def _collected(self, _done: asyncio.Future[None]) -> None:
        if self.exited.done():
            return
        told = None if self.pidfd is None else platform.collected_status(self.pidfd)
        self._resolve(told or self._child.status or UNKNOWN)

    def _resolve(self, status: ExitStatus) -> None:
        if not self.exited.done():
            self.exit_ns = self.exit_ns or time.monotonic_ns()
            self.exited.set_result(status)

    async def reaped(self, within: float) -> None:
        """Wait until the process is collected, so that no zombie of ours is left; `within` seconds at the most."""
        deadline, pause = self._loop.time() + within, PAUSES[0]
        while not self._child.done.done() and (left := deadline - self._loop.time()) > 0:
            # On uvloop a foreign waiter may have been faster after we had looked, and then nobody tells.
            await asyncio.wait({self._child.done}, timeout=min(pause, left))
            pause = min(pause * 2, PAUSES[-1])
            if self.exited.done() and self.pidfd is not None and not platform.is_uncollected(self.pidfd):
                self._child.was_collected()

    def close(self) -> None:
        """Close the descriptors. Idempotent; after it nothing is signalled, and an exit not seen yet is not told."""
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        if self._retry is not None:
            self._retry.cancel()
        if self._confirmation is not None:
            self._confirmation.close()


def cpu_seconds(pid: int) -> float | None:
    """What a process has used, its ended threads included; proc_pid_stat(5) still tells it for a zombie."""
    stat = procfs.read(f"/proc/{pid}/stat")
    fields = stat[stat.rfind(b")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / procfs.TICKS_A_SECOND if len(fields) > 12 else None
