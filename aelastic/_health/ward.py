"""The health of a whole run: what its monitors share, and what its caller may ask at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, final

from .._child.procfs import Member
from .._conditions import HealthPolicy, Question
from .._results import Usage
from .._std import Std
from .._threads import Threads
from .monitor import Monitor
from .readiness import Reader, Senses
from .stacks import ENDED, Members, Stacks
from .usage import Meter

WAITING = 4
"""Threads for stacks, figures and names of hosts, each of which may have to wait for an answer."""


@final
class Ward:
    """Observes the ranks of one run. Belongs to the running loop.

    Args:
        name: the run's.
        pids: by rank, of the workers whose process is running.
        members: of these ranks, the live processes.
        poke: sends one process a signal, if it is still the same process.
        lines: by rank and streams, its lines from the first one on.
        ask: asks a callable about a rank.
    """

    def __init__(
        self,
        name: str,
        *,
        pids: Callable[[], Mapping[int, int]],
        members: Members,
        poke: Callable[[Member, int], bool],
        lines: Callable[[int, Std], Reader],
        ask: Callable[[Question, int], Awaitable[Any]],
    ) -> None:
        self._threads = Threads(f"aelastic {name} health", WAITING)
        self._pids = pids
        self._senses = Senses(lines=lines, ask=ask, threads=self._threads)
        self._look = members
        self.stacks = Stacks(self._members, poke, self._threads)
        self.meter = Meter(pids, self._members, self._threads)

    async def _members(self, ranks: Collection[int]) -> Mapping[int, Sequence[Member]]:
        try:
            return await self._look(ranks)
        except RuntimeError:  # the run has just ended, and its threads with it
            return {}

    def monitor(self, rank: int, policy: HealthPolicy) -> Monitor:
        """A monitor for the next worker of a rank.

        Raises:
            OSError: if no descriptor is left.
            StreamNotCaptured: if the lines of a pattern can't be read.
        """
        return Monitor(rank, policy, self._senses, self.stacks)

    def sample_usage(self, every: float, tell: Callable[[dict[int, Usage]], object]) -> None:
        """Tell what the ranks use, every so many seconds."""
        self.meter.begin(every, tell)

    async def dump_stacks(self, ranks: Collection[int]) -> dict[int, str]:
        """The stacks of these ranks, or why there are none."""
        pids = self._pids()
        running = [rank for rank in ranks if rank in pids]
        texts = await asyncio.gather(*(self.stacks.of(rank, pids[rank]) for rank in running))
        return dict.fromkeys(ranks, ENDED) | dict(zip(running, texts, strict=True))

    async def close(self) -> None:
        """End what was begun; idempotent."""
        await self.meter.close()
        self.stacks.close()
        self._threads.close()
