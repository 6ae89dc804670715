"""One incarnation of a rank: its process, its output, its end.

A worker owns its state and its part of a stop. It judges its own exit and reports it at once; whether the others are
stopped for it is `_gang`'s decision.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Protocol, final

from ._child import cgroupfs
from ._ending import Cause, End
from ._events import (
    Event,
    OutputHeld,
    SurvivorsLeft,
    WatchdogExpired,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerSignaled,
    WorkerStarted,
    WorkerUnkillable,
)
from ._evidence import Evidence, OomKills, build_failure, read_evidence
from ._exit import ExitStatus
from ._failures import ProcessFailure
from ._health import Monitor, Verdict, Ward
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
        monitor: observes it; None lets nobody look.
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
        monitor: Monitor | None,
        ward: Ward,
    ) -> None:
        self.rank = rank
        self.pid = process.pid
        self.state = State.RUNNING
        self.cause: Cause | None = None
        self.verdict: Verdict | None = None
        """Why it had to go, where its health was the reason."""
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
        self._monitor = monitor
        self._ward = ward
        self._dues: tuple[Due, ...] = ()
        self._why = "left behind by the worker"
        self._loop = asyncio.get_running_loop()
        self._hurry: asyncio.Future[None] = self._loop.create_future()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when it is ready; at once where running is ready."""
        publish(WorkerStarted(rank=rank, pid=process.pid))
        process.exited.add_done_callback(self._exit_seen)
        if returned is not None:
            returned.add_done_callback(self._was_told)
        if monitor is not None:
            monitor.begin(self)
        if monitor is None or not monitor.has_condition:
            self.ready.set_result(None)
        self.ended = service(self._live(), name=f"rank {rank} (pid {process.pid})")

    def stop(self, dues: tuple[Due, ...], cause: Cause | None, why: str) -> None:
        """Begin the steps, or replace those that are left; without a cause where the worker's own work is done."""
        if self._monitor is not None:
            self._monitor.stand_down()
        if self._begins_to_stop():
            self._had_returned = self._has_value()
            self.cause, self._stopped_ns = None if self._had_returned else cause, time.monotonic_ns()
        if self.verdict is None or not self.verdict.kills:  # who is being killed is not asked more gently
            self._press_on(dues, why)

    def _begins_to_stop(self) -> bool:
        if self.state is not State.RUNNING or self._process.has_ended():
            return False
        self.state = after(self.rank, self.state, Fact.STOP_ASKED)
        return True

    def _press_on(self, dues: tuple[Due, ...], why: str) -> None:
        self._dues, self._why = dues, why
        hurry, self._hurry = self._hurry, self._loop.create_future()
        hurry.set_result(None)

    def is_ready(self) -> None:
        """Take note that the condition of readiness is true."""
        self.ready.set_result(None)
        seconds = (time.monotonic_ns() - self._process.started_ns) / 1e9
        self._publish(WorkerReady(rank=self.rank, pid=self.pid, seconds=seconds))

    def watchdog_expired(self, seconds: float) -> None:
        """Take note of it; the verdict follows when the stacks are written."""
        self._publish(WatchdogExpired(rank=self.rank, pid=self.pid, seconds=seconds))

    def condemn(self, verdict: Verdict) -> None:
        """Fail for this reason, and go; without effect on who has ended or is being stopped."""
        if not self._begins_to_stop():
            return
        self.verdict = verdict
        steps = self._policy.steps[-1:] if verdict.kills else self._policy.steps
        self._press_on(schedule(steps, self._loop.time()), verdict.message)
        self._judge(self, failed=True)

    def send_signal(self, sig: int, why: str) -> None:
        """Signal the process group, unless nobody is in it any more."""
        if self._process.signal_group(sig):
            self._publish(WorkerSignaled(rank=self.rank, pid=self.pid, signal=sig, reason=why))

    @property
    def _end(self) -> End | None:
        return self.ended.result() if self.ended.done() and self.ended.exception() is None else None

    @property
    def failure(self) -> ProcessFailure | None:
        """Its bad end; None before, and where there is none."""
        return None if self._end is None else self._end.failure

    @property
    def tail(self) -> tuple[str, ...]:
        """Its last lines, as far as they are known."""
        return () if self._end is None else self._end.tail

    @property
    def has_become_ready(self) -> bool:
        """Whether it was ready, and has not failed since."""
        crashed = self._process.exited.done() and not self._ended_well and self.cause is None
        return self.ready.done() and self.verdict is None and self.failure is None and not crashed

    @property
    def has_missed_ready(self) -> bool:
        """Whether it has failed, or ended by itself before it was ready."""
        ended = self.ended.done() and self.cause is None
        return not self.has_become_ready and (self.verdict is not None or ended)

    def why_not_ready(self) -> str:
        """Who it is, and what keeps it from being ready, in words."""
        who = f"rank {self.rank} (pid {self.pid})"
        missing = "" if self._monitor is None or self.ready.done() else f"; {self._monitor.missing()}"
        if self.verdict is not None:
            return f"{who}: {self.verdict.message}"
        if not self._process.exited.done():
            return f"{who} runs{missing}"
        when = "after it had been ready" if self.ready.done() else "before it was ready"
        return f"{who} {self._process.exited.result().describe()} {when}{missing}"

    async def failure_so_far(self) -> ProcessFailure:
        """The failure of a worker that was condemned and has not ended yet."""
        message = "" if self.verdict is None else self.verdict.message
        return dataclasses.replace(await self._failure(None), message=message)

    def _exit_seen(self, exited: asyncio.Future[ExitStatus]) -> None:
        if self._monitor is not None:
            self._monitor.hear_the_last()
        self.state = after(self.rank, self.state, Fact.EXIT_SEEN)
        if self.state is State.UNKILLABLE:
            return  # its end was told already
        self._publish(
            WorkerExited(
                rank=self.rank,
                pid=self.pid,
                status=exited.result(),
                seconds=self._seconds,
                usage=self._ward.meter.at_exit(self.pid, self._process.usage),
            )
        )

    @property
    def _seconds(self) -> float:
        return (self._process.exit_ns - self._process.started_ns) / 1e9

    def _was_told(self, returned: asyncio.Future[Returned]) -> None:
        self._told_ns = time.monotonic_ns()
        if self._monitor is not None and not isinstance(returned.result(), NoResult):
            self._monitor.hear_the_last()  # whose function is over sends no heartbeat any more

    async def _live(self) -> End:
        try:
            return await self._live_on()
        finally:
            if self._monitor is not None:
                await self._monitor.close()

    async def _live_on(self) -> End:
        if not self._dues:  # a stop may have come before this task had its first turn
            await self._run_its_course()
        if self.state is State.EXITED:
            self._judge(self, failed=await self._has_failed())
            await self._linger()
        survivors = await self._extinguish()
        if not self._process.exited.done() and self._process.has_ended():
            await first_of(self._process.exited)  # told a moment later: another waiter of the host took the status
        await self._outputs.finish(self.rank, within=self._policy.drain)
        self.state = after(self.rank, self.state, Fact.END_REACHED)
        await self._process.reaped(within=1.0)
        end = await self._conclude(survivors)
        if self._process.cgroup:
            await self._loop.run_in_executor(self._threads, cgroupfs.remove, self._process.cgroup)
        return end

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
        if self._process.exited.done() and await self._tree.is_gone(self.rank):
            return ()
        if not self._dues:
            self._dues = schedule(self._policy.steps, self._loop.time())
        gone = False
        while self._dues and not gone:
            if len(self._dues) == 1:
                await self._show_stacks()
            due, *rest = self._dues
            self._dues = tuple(rest)
            gone = await self._step(due)
        return () if gone else await self._left_over()

    async def _show_stacks(self) -> None:
        shown = self.verdict is not None and self.verdict.kills
        if self._policy.dump_stacks and not shown and not self._process.exited.done():
            await self._ward.stacks.into_log(self.rank, self.pid, f"it is killed next: {self._why}")

    async def _step(self, due: Due) -> bool:
        """Send one signal to everything of the rank; True when nothing is left."""
        return await self._tree.press(self.rank, due.signal, due.until, hurry=self._hurry, on_hit=self._signaled)

    def _signaled(self, pids: tuple[int, ...], sig: int) -> None:
        for pid in pids:
            self._publish(WorkerSignaled(rank=self.rank, pid=pid, signal=sig, reason=self._why))

    async def _left_over(self) -> tuple[Survivor, ...]:
        survivors = await self._tree.survivors(self.rank)
        if not self._process.exited.done():
            self.state = after(self.rank, self.state, Fact.GIVEN_UP)
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
            tail=await self._last_lines(status, failure),
        )

    async def _last_lines(self, status: ExitStatus | None, failure: ProcessFailure | None) -> tuple[str, ...]:
        if failure is None and not self.ready.done():
            failure = await self._failure(status)
        return () if failure is None else failure.tail

    def _is_good(self) -> bool:
        return self.verdict is None and self._ended_well and isinstance(self._outcome(), Value)

    @property
    def _ended_well(self) -> bool:
        return self._process.exited.done() and (self._had_returned or self._process.exited.result().ok)

    def _stopped_before(self, failure: ProcessFailure) -> bool:
        """Whether it ended only because it was stopped: its own error file may say that it had failed before."""
        return self.cause is not None and failure.reason != "unkillable" and failure.monotonic_ns >= self._stopped_ns

    async def _failure(self, status: ExitStatus | None) -> ProcessFailure:
        evidence: Evidence = await self._loop.run_in_executor(
            self._threads, read_evidence, self._error_file, *self._outputs.files(self.rank), self._process.cgroup
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
            reason=None if self.verdict is None else self.verdict.reason,
            message="" if self.verdict is None else self.verdict.message,
        )
