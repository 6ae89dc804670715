"""What the ranks of a run use: read by psutil in threads, remembered for the ends of workers.

Nothing is read unless somebody asks, or `HealthPolicy.usage_every` is set.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import final

from .._child.procfs import Member
from .._results import ExitUsage, Usage
from .._tasks import ServiceTask, service
from .stacks import Members


@final
class Meter:
    """Reads what the ranks of a run use. Belongs to the running loop.

    Args:
        pids: by rank, of the workers whose process is running.
        members: of these ranks, the live processes.
        threads: where /proc is read.
    """

    def __init__(
        self,
        pids: Callable[[], Mapping[int, int]],
        members: Members,
        threads: Executor,
    ) -> None:
        self._pids = pids
        self._members = members
        self._threads = threads
        self._known: dict[int, ExitUsage] = {}
        """By pid of a worker, what samples told: CPU seconds of its own, the most memory of its tree."""
        self._ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sampling: ServiceTask[None] | None = None

    async def read(self) -> dict[int, Usage]:
        """What each running rank's tree uses now; ranks that have ended are left out."""
        pids = self._pids()
        members = await self._members(pids) if pids else {}
        if not members or self._ends.done():
            return {}
        trees = {rank: (pid, members.get(rank, ())) for rank, pid in pids.items()}
        reading = asyncio.get_running_loop().run_in_executor(self._threads, _read, trees)
        await asyncio.wait({reading})
        if reading.cancelled():  # the run has ended meanwhile
            return {}
        for rank, (_, own) in reading.result().items():
            if self._pids().get(rank) == pids[rank]:
                self._remember(pids[rank], own)
        return {rank: usage for rank, (usage, _) in reading.result().items()}

    def _remember(self, pid: int, own: ExitUsage) -> None:
        earlier = self._known.get(pid, ExitUsage()).peak_rss_bytes or 0
        self._known[pid] = ExitUsage(own.cpu_seconds, max(earlier, own.peak_rss_bytes or 0))

    def at_exit(self, pid: int, seen: ExitUsage) -> ExitUsage:
        """What a worker has used, from what the kernel told at its exit, else from the last sample.

        Args:
            pid: of a worker that has ended.
            seen: what the kernel told.
        """
        known = self._known.pop(pid, ExitUsage())
        return ExitUsage(
            known.cpu_seconds if seen.cpu_seconds is None else seen.cpu_seconds,
            known.peak_rss_bytes if seen.peak_rss_bytes is None else seen.peak_rss_bytes,
        )

    def begin(self, every: float, tell: Callable[[dict[int, Usage]], object]) -> None:
        """Read again and again until `close`, and tell each time that a rank was running."""
        self._sampling = service(self._sample(every, tell), name="usage")

    async def _sample(self, every: float, tell: Callable[[dict[int, Usage]], object]) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._ends.done():
            due = max(due + every, loop.time())  # what a slow machine can't keep up with is left out
            await asyncio.wait({self._ends}, timeout=due - loop.time())
            usages: dict[int, Usage] = {}
            if not self._ends.done():
                with contextlib.suppress(OSError, RuntimeError):  # no descriptor, no thread: the next may have
                    usages = await self.read()
            if usages:
                tell(usages)

    async def close(self) -> None:
        """Sample no more; idempotent."""
        if not self._ends.done():
            self._ends.set_result(None)
        if self._sampling is not None:
            await asyncio.wait({self._sampling})


def _read(trees: Mapping[int, tuple[int, Sequence[Member]]]) -> dict[int, tuple[Usage, ExitUsage]]:
    from .figures import read_tree  # noqa: PLC0415  # imports psutil, 20 ms, off the loop and for those who ask

    read = {rank: read_tree(pid, members) for rank, (pid, members) in trees.items()}
    return {rank: figures for rank, figures in read.items() if figures is not None}
