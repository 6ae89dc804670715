"""The attempts of what restarts together, one after the other: of the whole gang, or of a single rank.

A succession owns the attempt number, the gang in office, and what the former ones left to count. Between two gangs it
asks its budget; a stop ends it wherever it is, and nothing is started after one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from typing import final

from ._attempt import AttemptEnd, Machines, StartAbandoned, Terms
from ._ending import Cause
from ._events import RestartScheduled
from ._evidence import failure_of_start
from ._failures import ProcessFailure
from ._gang import Gang
from ._policies import Step
from ._restart import Budget, Ended, GiveUp, Rest, Restart
from ._spec import RunSpec
from ._worker import Worker

WHOLE_FAILURES = 100
"""The newest attempts, whose failures are kept with all their evidence."""

Settle = Callable[[int], Awaitable[Terms]]
"""Makes the terms of an attempt, by its number."""


@final
class Succession:
    """Gang after gang, until one is the last.

    Args:
        ranks: which of the run's: all, or one.
        terms: of the first attempt.
        settle: makes those of the others.
    """

    def __init__(self, spec: RunSpec, ranks: Collection[int], terms: Terms, settle: Settle, machines: Machines) -> None:
        loop = asyncio.get_running_loop()
        self.ranks = ranks
        self.rank = min(ranks) if spec.restarts_ranks else None
        """Whose attempts these are; None for all ranks together."""
        self.terms = terms
        """Of the newest attempt."""
        self.started: asyncio.Future[None] = loop.create_future()
        """Done when its ranks have been started for the first time, or can't be: then it holds the error."""
        self.end = AttemptEnd()
        """How the newest attempt that is over ended."""
        self.gave_up = ""
        """Why it was not started again, a sentence; `""` where no restart was asked for."""
        self.cut_short = True
        """Whether another attempt, or the first, was due when it was stopped."""
        self.history: list[dict[int, ProcessFailure]] = []
        """By attempt that is over: failures by rank."""
        self.lost_bytes = 0
        self.pieces: dict[str, tuple[str, ...]] = {}
        self._spec = spec
        self._settle = settle
        self._machines = machines
        self._loop = loop
        self._budget = Budget(spec.restart)
        self._gang: Gang | None = None
        self._unstarted: OSError | None = None
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._began = loop.time()
        self._over = False

    def following(self) -> Succession:
        """One that goes on where this one ended, with a budget of its own."""
        following = Succession(self._spec, self.ranks, self.terms, self._settle, self._machines)
        following.end, following.history = self.end, self.history
        following.lost_bytes, following.pieces = self.lost_bytes, self.pieces
        return following

    @property
    def workers(self) -> dict[int, Worker]:
        """By rank, the newest incarnations."""
        return {} if self._gang is None else self._gang.workers

    @property
    def failed(self) -> bool:
        """Whether its last attempt failed and no other was due."""
        return bool(self.end.failures or self.end.survivors) and not self.cut_short

    @property
    def ready(self) -> bool:
        """Whether all its newest incarnations are ready."""
        return bool(self.workers) and all(worker.has_become_ready for worker in self.workers.values())

    @property
    def may_go_on(self) -> bool:
        """Whether another attempt may follow this one."""
        return not self._over and not self._stopped.done() and self._spec.restart.max_restarts > 0

    def captures(self) -> dict[int, dict[str, str]]:
        """By rank, what line patterns captured of the newest incarnations."""
        return {} if self._gang is None else self._gang.captures()

    def pids(self) -> dict[int, int]:
        """By rank, of the workers whose process is running."""
        return {} if self._gang is None else self._gang.pids()

    def stop(self, steps: tuple[Step, ...] | None, why: str, cause: Cause) -> bool:
        """Stop the gang in office, and let none follow; see `Gang.stop`.

        Returns:
            False when it changed nothing: it was over, or being stopped already.
        """
        if self._over:
            return False
        first = not self._stopped.done()
        if first:
            self._stopped.set_result(None)
        if self._gang is None or self._gang.over:
            return first
        return self._gang.stop(steps, why, cause) or first

    async def live(self) -> None:
        """Make attempts until one is the last, or a stop comes.

        Raises:
            Exception: if the supervision itself broke.

        Publishes:
            RestartScheduled: before each attempt but the first.
        """
        try:
            while not self._stopped.done() and (end := await self._attempt()) is not None:
                self._note(end)
                if not await self._goes_on(end):
                    break
        except BaseException as error:
            self._give_start_up(error)
            raise
        finally:
            self._over = True
        self._give_start_up(self._unstarted or StartAbandoned(f"{self._spec.name} was stopped while it was started"))

    def _give_start_up(self, error: BaseException) -> None:
        if self.started.done():
            return
        if self.gave_up:
            error.add_note(f"not tried again: {self.gave_up}")
        self.started.set_exception(error)
        self.started.exception()  # seen: who waits for the start raises it, and if nobody does, `live` has told

    async def _attempt(self) -> AttemptEnd | None:
        """Make one attempt, to its end; None if a stop came before it began."""
        number = len(self.history)
        self._unstarted = None
        try:
            terms = self.terms if self.terms.attempt == number else await self._settle(number)
        except OSError as error:
            self._unstarted = error
            return AttemptEnd(failures={min(self.ranks): failure_of_start(min(self.ranks), error)})
        if self._stopped.done():
            return None
        self.terms = terms
        self._gang = Gang(self._spec, self.ranks, terms, self._machines)
        await self._start(self._gang)
        return await self._gang.ended()

    async def _start(self, gang: Gang) -> None:
        try:
            await gang.start()
        except StartAbandoned:
            pass  # its end tells
        except OSError as error:
            self._unstarted = error
        else:
            if not self.started.done():
                self.started.set_result(None)
        self._began = self._loop.time()

    def _note(self, end: AttemptEnd) -> None:
        self.end, self.cut_short = end, False
        self.lost_bytes += end.lost_bytes
        self.pieces |= end.pieces
        self.history.append(end.failures)
        if len(self.history) > WHOLE_FAILURES:
            old = self.history[-WHOLE_FAILURES - 1]
            old |= {rank: failure.abridged() for rank, failure in old.items()}

    async def _goes_on(self, end: AttemptEnd) -> bool:
        """Whether another attempt is to follow now: decided at once, and told after its delay."""
        now = self._loop.time()
        ended = Ended(failures=end.failures, seconds=now - self._began, survived=bool(end.survivors))
        chance = random.random()  # noqa: S311  # spreads restarts; there is no secret in it
        match self._budget.decide(ended, now=now, chance=chance):
            case Restart(delay, reason):
                await self._pause(delay, reason)
                return not self._stopped.done()
            case GiveUp(reason):
                self.gave_up = reason if self.rank is None else f"rank {self.rank}: {reason}"
            case Rest():
                pass
        return False

    async def _pause(self, delay: float, reason: str) -> None:
        """Wait for the next attempt's time, or for a stop."""
        self.cut_short = True
        if not self._stopped.done():
            scheduled = RestartScheduled(delay=delay, reason=reason, rank=self.rank)
            self._machines.bus.publish(scheduled, attempt=len(self.history) - 1)
            await asyncio.wait({self._stopped}, timeout=delay)
