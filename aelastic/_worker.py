"""One incarnation of a rank: its process, its output, its end.

A worker owns its state and its part of a stop. It judges its own exit and reports it at once; whether the others are
stopped for it is `_gang`'s decision.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

from ._events import (
    Event,
    OutputHeld,
    SurvivorsLeft,
    WorkerExited,
    WorkerFailed,
    WorkerSignaled,
    WorkerStarted,
    WorkerUnkillable,
)
from ._evidence import Evidence, OomKills, build_failure, read_evidence
from ._exit import ExitStatus
from ._failures import ProcessFailure
from ._lifecycle import Due, Fact, State, after, schedule
from ._logs import Outputs
from ._policies import StopPolicy
from ._process import Process, Tree
from ._results import Survivor
from ._returned import NO_RESULT, NoResult, Returned, Torn, Value
from ._std import Std
from ._tasks import first_of, service
from ._threads import Threads

NOT_LOADED = Torn("its result was still being loaded here when its run had to end")


@final
class Cause(enum.Enum):
    """Why a worker was stopped."""

    FAILURE = "another rank failed"
    CALLER = "its caller asked"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a worker ended, all of it."""

    rank: int
    status: ExitStatus | None
    """None when the process is still alive."""
    stopped: Cause | None
    """Set when it was still running as the stop was asked for."""
    returned: Returned
    failure: ProcessFailure | None
    survivors: tuple[Survivor, ...]


class Judge(Protocol):
    """Is told of an exit as soon as it can be judged."""

    def __call__(self, worker: Worker, *, failed: bool) -> None: ...


@final
class Worker:
    """A started process of a rank, watched until nothing of it is left.

    Args:
        process: confirmed to run the program.
        returned: resolves to what a function handed back; None for a command.
        judge: called once, unless the worker was stopped before it exited.
    """

    def __init__(
        self,
        rank: int,
        process: Process,
        *,
        outputs: Outputs,
        tree: Tree,
        policy: StopPolicy,
        threads: Threads,
        error_file: str,
        oom_before: OomKills | None,
        returned: asyncio.Future[Returned] | None,
        publish: Callable[[Event], object],
        judge: Judge,
    ) -> None:
        self.rank = rank
        self.pid = process.pid
        self.state = State.RUNNING
        self.cause: Cause | None = None
        self._stopped_ns = 0
        self._told_ns = 0
        self._had_returned = False
        """Whether its value was here before anybody stopped it: then its process's end says nothing any more."""
        self._process = process
        self._outputs = outputs
        self._tree = tree
        self._policy = policy
        self._threads = threads
        self._error_file = error_file
        self._oom_before = oom_before
        self._returned = returned
        self._publish = publish
        self._judge = judge
        self._dues: tuple[Due, ...] = ()
        self._why = "left behind by the worker"
        self._loop = asyncio.get_running_loop()
        self._hurry: asyncio.Future[None] = self._loop.create_future()
        publish(WorkerStarted(rank=rank, pid=process.pid))
        process.exited.add_done_callback(self._exit_seen)
        if returned is not None:
            returned.add_done_callback(self._was_told)
        self.ended = service(self._live(), name=f"rank {rank} (pid {process.pid})")

    def stop(self, dues: tuple[Due, ...], cause: Cause | None, why: str) -> None:
        """Begin the steps, or replace those that are left; without a cause where the worker's own work is done."""
        if self.state is State.RUNNING and not self._process.has_ended():
            self.state = after(self.rank, self.state, Fact.STOP_ASKED)
            self._had_returned = self._has_value()
            self.cause, self._stopped_ns = None if self._had_returned else cause, time.monotonic_ns()
        self._dues, self._why = dues, why
        hurry, self._hurry = self._hurry, self._loop.create_future()
        hurry.set_result(None)

    def send_signal(self, sig: int, why: str) -> None:
        """Signal the process group, unless nobody is in it any more."""
        if self._process.signal_group(sig):
            self._publish(WorkerSignaled(rank=self.rank, pid=self.pid, signal=sig, reason=why))

    def _exit_seen(self, exited: asyncio.Future[ExitStatus]) -> None:
        self.state = after(self.rank, self.state, Fact.EXIT_SEEN)
        self._publish(
            WorkerExited(
                rank=self.rank,
                pid=self.pid,
                status=exited.result(),
                seconds=self._seconds,
                usage=self._process.usage,
            )
        )

    @property
    def _seconds(self) -> float:
        return (self._process.exit_ns - self._process.started_ns) / 1e9

    def _was_told(self, _returned: asyncio.Future[Returned]) -> None:
        self._told_ns = time.monotonic_ns()

    async def _live(self) -> End:
        if not self._dues:  # a stop may have come before this task had its first turn
            await self._run_its_course()
        if self.state is State.EXITED:
            self._judge(self, failed=await self._has_failed())
            await self._linger()
        survivors = await self._extinguish()
        await self._outputs.finish(self.rank, within=self._policy.drain)
        self.state = after(self.rank, self.state, Fact.END_REACHED)
        await self._process.reaped(within=1.0)
        return await self._conclude(survivors)

    async def _run_its_course(self) -> None:
        """Wait for the exit, or a stop; a function that is over waits for its process only so long."""
        over = self._process.exited, self._hurry
        if self._returned is None:
            await first_of(*over)
            return
        await first_of(*over, self._returned)
        if self._returned.done() and isinstance(self._returned.result(), NoResult):
            await first_of(*over)  # it closed the pipe, as one that executes another program does: its exit will tell
        if self._is_over():
            return
        patience = self._policy.steps[0][1] if self._has_value() else self._policy.drain
        await first_of(*over, timeout=patience)
        if not self._is_over():
            self._outstay(patience)

    def _is_over(self) -> bool:
        return self._process.exited.done() or bool(self._dues)

    def _outstay(self, patience: float) -> None:
        """Its function is over and its process is not: a failure is judged now, and the steps end the process."""
        if not self._has_value():
            self._judge(self, failed=True)
        if not self._dues:
            why = (
                f"its function was over, and {patience:g} s later its process was still there: a thread that is no"
                " daemon, a child process or an exit hook kept it"
            )
            self.stop(schedule(self._policy.steps, self._loop.time()), None, why)

    async def _has_failed(self) -> bool:
        if self._returned is not None and not self._dues:
            await first_of(self._returned, self._hurry)  # what has arrived is loaded, however long that takes
        return not self._is_good()

    def _outcome(self) -> Returned:
        """What was handed back; a command that succeeded hands back None."""
        if self._returned is None:
            return Value(None)
        if self._returned.done():
            return self._returned.result()
        return NOT_LOADED if self._process.exited.done() else NO_RESULT

    def _has_value(self) -> bool:
        """Whether a function's value is here."""
        return self._returned is not None and self._returned.done() and isinstance(self._returned.result(), Value)

    async def _linger(self) -> None:
        """Let whoever still holds the pipes finish writing, for `drain` seconds, or until a stop."""
        if self._dues or await self._outputs.at_eof(self.rank, self._policy.drain, self._hurry) or self._dues:
            return
        holders = await self._tree.holders(self.rank, self._outputs.pipe_inodes(self.rank))
        self._publish(OutputHeld(rank=self.rank, holders=holders))

    async def _extinguish(self) -> tuple[Survivor, ...]:
        """Take the steps until nothing of the tree is left; what is left after the last is reported."""
        if self._process.exited.done() and not await self._tree.members(self.rank):
            return ()
        if not self._dues:
            self._dues = schedule(self._policy.steps, self._loop.time())
        gone = False
        while self._dues and not gone:
            due, *rest = self._dues
            self._dues = tuple(rest)
            gone = await self._step(due)
        return () if gone else await self._left_over()

    async def _step(self, due: Due) -> bool:
        """Send one signal to everything of the rank; True when nothing is left."""
        return await self._tree.press(self.rank, due.signal, due.until, hurry=self._hurry, on_hit=self._signaled)

    def _signaled(self, pids: tuple[int, ...], sig: int) -> None:
        for pid in pids:
            self._publish(WorkerSignaled(rank=self.rank, pid=pid, signal=sig, reason=self._why))

    async def _left_over(self) -> tuple[Survivor, ...]:
        survivors = await self._tree.survivors(self.rank)
        if not self._process.exited.done():
            state = next((left.state for left in survivors if left.pid == self.pid), "unknown")
            self._publish(WorkerUnkillable(rank=self.rank, pid=self.pid, state=state))
        if survivors:
            self._publish(SurvivorsLeft(rank=self.rank, survivors=survivors))
        return survivors

    async def _conclude(self, survivors: tuple[Survivor, ...]) -> End:
        status = self._process.exited.result() if self._process.exited.done() else None
        if self._returned is not None and status is not None:
            await first_of(self._returned, timeout=self._policy.drain)
        failure = None if self._is_good() else await self._failure(status)
        if failure is not None and self._stopped_before(failure):
            failure = None
        if failure is not None:
            self._publish(WorkerFailed(rank=self.rank, failure=failure))
        return End(
            rank=self.rank,
            status=status,
            stopped=None if failure is not None else self.cause,
            returned=self._outcome(),
            failure=failure,
            survivors=survivors,
        )

    def _is_good(self) -> bool:
        status = self._process.exited.done() and (self._had_returned or self._process.exited.result().ok)
        return status and isinstance(self._outcome(), Value)

    def _stopped_before(self, failure: ProcessFailure) -> bool:
        """Whether it ended only because it was stopped: its own error file may say that it had failed before."""
        return self.cause is not None and failure.reason != "unkillable" and failure.monotonic_ns >= self._stopped_ns

    async def _failure(self, status: ExitStatus | None) -> ProcessFailure:
        evidence: Evidence = await self._loop.run_in_executor(
            self._threads, read_evidence, self._error_file, *self._outputs.files(self.rank)
        )
        return build_failure(
            rank=self.rank,
            pid=self.pid,
            status=status,
            returned=self._outcome(),
            evidence=evidence,
            tail=self._outputs.tail(self.rank, Std.ERR) or self._outputs.tail(self.rank, Std.OUT),
            started_ns=self._process.started_ns,
            exit_ns=self._process.exit_ns,
            told_ns=self._told_ns,
            oom_before=self._oom_before,
        )
