"""One round of a run: from the start of all its ranks until all have ended for good.

There is one round a run; a supervisor may ask for more. The round owns who restarts together, and what a rank that has
failed for good means for the others.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar, final

from ._attempt import Machines, StartAbandoned, Terms
from ._bus import Bus
from ._contagion import Contagion
from ._ending import Cause
from ._events import StopRequested
from ._failures import ProcessFailure
from ._lifecycle import outcome
from ._logs import LogsDest
from ._policies import Step
from ._results import RunProcsResult
from ._spec import RunSpec
from ._succession import Settle, Succession
from ._tasks import ServiceTask, service
from ._worker import Worker

K = TypeVar("K")
V = TypeVar("V")


@final
class Round:
    """All successions of a run: that of its gang, or one for each rank.

    Args:
        successions: none of them has begun.
    """

    def __init__(self, spec: RunSpec, bus: Bus, successions: Iterable[Succession]) -> None:
        self._spec = spec
        self._bus = bus
        self._successions = tuple(successions)
        self._contagion = Contagion(spec.stop.on_failure, self._stop_for_failure)
        self._lives: list[ServiceTask[None]] = []
        self._stopped = False
        self._over = False
        self._error: BaseException | None = None

    @classmethod
    def first(cls, spec: RunSpec, settle: Settle, machines: Machines, terms: Terms) -> Round:
        """The first of a run.

        Args:
            settle: makes the terms of all attempts but the first.
            terms: of the first attempt.
        """
        everybody = range(spec.nprocs)
        groups = [range(rank, rank + 1) for rank in everybody] if spec.restarts_ranks else [everybody]
        return cls(spec, machines.bus, (Succession(spec, ranks, terms, settle, machines) for ranks in groups))

    def following(self) -> Round:
        """The next one; attempts are counted on, budgets begin anew."""
        return Round(self._spec, self._bus, (each.following() for each in self._successions))

    @property
    def failed(self) -> bool:
        """Whether a rank has failed for good."""
        return any(each.failed for each in self._successions)

    @property
    def root_cause(self) -> ProcessFailure | None:
        """The first failure of the newest attempts that are over."""
        failures = (failure for each in self._successions for failure in each.end.failures.values())
        return min(failures, key=lambda failure: failure.monotonic_ns, default=None)

    @property
    def survived(self) -> bool:
        """Whether processes are left, although everything was tried."""
        return any(each.end.survivors for each in self._successions)

    @property
    def workers(self) -> dict[int, Worker]:
        """By rank, the newest incarnations; a rank that is only being started is left out."""
        return {rank: worker for each in self._successions for rank, worker in each.workers.items()}

    @property
    def stdouts(self) -> dict[int, str]:
        """By rank, files of the newest incarnations; `""` where the stream has none."""
        return self._newest(lambda dest: dest.stdouts)

    @property
    def stderrs(self) -> dict[int, str]:
        """As `stdouts`."""
        return self._newest(lambda dest: dest.stderrs)

    @property
    def error_files(self) -> dict[int, str]:
        """As `stdouts`."""
        return self._newest(lambda dest: dest.error_files)

    def _newest(self, paths: Callable[[LogsDest], Mapping[int, str]]) -> dict[int, str]:
        settled = [(each.ranks, paths(each.terms.dest)) for each in self._successions]
        return {rank: path for ranks, found in settled for rank, path in found.items() if rank in ranks}

    def ready_captures(self) -> dict[int, dict[str, str]]:
        """By rank, what line patterns captured of the newest incarnations."""
        return {rank: captures for each in self._successions for rank, captures in each.captures().items()}

    def may_restart(self, rank: int) -> bool:
        """Whether a rank that has ended may yet be started again."""
        return any(each.may_go_on for each in self._successions if rank in each.ranks)

    def pids(self) -> dict[int, int]:
        """By rank, of the workers whose process is running."""
        return {rank: pid for each in self._successions for rank, pid in each.pids().items()}

    def send_signal(self, sig: int, ranks: Collection[int]) -> None:
        """Signal the process groups of these ranks."""
        for worker in map(self.workers.get, ranks):
            if worker is not None:
                worker.send_signal(sig, "its caller asked")

    def stop(self, steps: tuple[Step, ...] | None, why: str, cause: Cause) -> None:
        """Stop all of it, also what is only being started or about to be started again; see `Gang.stop`."""
        if self._over:
            return
        self._stopped = True
        self._contagion.end()
        changed = [succession.stop(steps, why, cause) for succession in self._successions]
        if any(changed):
            self._bus.publish(StopRequested(reason=why))

    def _stop_for_failure(self, why: str) -> None:
        self.stop(None, why, Cause.FAILURE)

    async def start(self) -> None:
        """Start every rank, or none.

        Raises:
            OSError: of the errno's class, if one can't be started, and no restart is left for it.
            StartAbandoned: if `stop` was called meanwhile.
        """
        try:
            for succession in self._successions:
                self._raise_if_stopped()
                life = service(self._follow(succession), name=f"attempts of {self._spec.name}")
                self._lives.append(life)
                await asyncio.wait({succession.started})
                succession.started.result()
                if self._spec.starts_in_order and not await self._may_follow(succession, life):
                    break
        except BaseException as error:
            self._stop_for_failure(f"the start did not succeed: {error}")
            await self._all_over()
            if self._error is not None and isinstance(error, StartAbandoned):
                raise self._error from None  # which is why it was abandoned
            raise
        self._contagion.all_started()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise self._error or StartAbandoned(f"{self._spec.name} was stopped while it was being started")

    async def _may_follow(self, succession: Succession, life: ServiceTask[None]) -> bool:
        """Wait until a rank that restarts by itself is ready, or has ended; False if none may follow."""
        if succession is self._successions[-1]:
            return True
        while not (succession.ready or life.done() or self._stopped or self._contagion.breaks_out):
            await self._bus.news(life)
        return not self._contagion.breaks_out

    async def _follow(self, succession: Succession) -> None:
        """Let one succession live, and tell the others when it has failed for good."""
        try:
            await succession.live()
        except BaseException as error:  # noqa: BLE001  # a bug, ours or of a `retriable`: raised when all have ended
            self._error = self._error or error
            self._stop_for_failure(f"it could not be supervised: {error!r}")
        else:
            if succession.failed:
                self._contagion.failed(f"rank {', '.join(map(str, succession.end.failures))} failed for good")

    async def ended(self) -> None:
        """Wait until all have ended for good.

        Raises:
            Exception: if the supervision itself broke.
        """
        await self._all_over()
        if self._error is not None:
            raise self._error

    async def _all_over(self) -> None:
        if self._lives:
            await asyncio.wait(self._lives)
        self._contagion.end()
        self._over = True

    def conclude(self, *, closed: bool, gave_up: str) -> RunProcsResult:
        """Put together how everything ended.

        Args:
            closed: whether the caller has stopped the run.
            gave_up: why a supervisor let no other round begin; `""` where there is none.
        """
        each = self._successions
        ends = [one.end for one in each]
        cut_short = any(one.end.closed or one.cut_short for one in each)
        survivors = tuple(left for end in ends for left in end.survivors)
        return RunProcsResult(
            return_values=union(end.return_values for end in ends),
            failures=union(end.failures for end in ends),
            stdouts=self.stdouts,
            stderrs=self.stderrs,
            outcome=outcome(
                failed=self.failed,
                survived=bool(survivors),
                closed=closed and cut_short,
            ),
            exits=union(end.exits for end in ends),
            victims=union(end.victims for end in ends),
            survivors=survivors,
            attempts=max(len(one.history) for one in each),
            history=tuple(map(union, itertools.zip_longest(*(one.history for one in each), fillvalue={}))),
            gave_up="; ".join(filter(None, [*(one.gave_up for one in each), gave_up])),
            lost_bytes=sum(one.lost_bytes for one in each),
            pieces=union(one.pieces for one in each),
            name=self._spec.name,
        )


def union(mappings: Iterable[Mapping[K, V]]) -> dict[K, V]:
    """One mapping of several, each with keys of its own."""
    return {key: value for mapping in mappings for key, value in mapping.items()}
