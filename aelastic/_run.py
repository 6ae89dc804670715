"""A run from start to result: opens the machines, makes the attempt, draws the conclusion.

The run owns the attempt number and everything that lives as long as it does. Its task is a service: whoever is
cancelled, the run comes to its end, and its result is there after everything of it is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Collection
from contextlib import AsyncExitStack
from typing import final

from ._bus import Bus
from ._events import Event, GuardLost, RunFinished, RunStarted
from ._gang import AttemptEnd, Gang, Machines, check_limits
from ._guard import watch
from ._lifecycle import outcome
from ._logs import Console, InheritLogsSpecs, Journal, LineHub, LogsDest, LogsSpecs, Plans, Route, plan
from ._policies import Step
from ._process import Tree
from ._results import RunProcsResult
from ._spec import RunSpec, worker_environments
from ._tasks import ServiceTask, service
from ._threads import Threads

PROBES = 2
"""Threads of a run for /proc, evidence and pickles."""
DISKS = 4
"""Threads of a run for its log files: how many writes a stalled disk can hold."""


@final
class Run:
    """One launch, from the first check of the disk to the result.

    Args:
        spec: what to run, checked.
        logs: where output goes; None inherits it.
        journal: whether events are written to the run's directory.
    """

    def __init__(self, spec: RunSpec, logs: LogsSpecs | None, *, journal: bool) -> None:
        loop = asyncio.get_running_loop()
        self.spec = spec
        self.run_id = secrets.token_hex(8)
        self.bus = Bus(spec.name, self.run_id)
        self.hub = LineHub(spec.name)
        self.gang: Gang | None = None
        self.dest = LogsDest()
        self.result: RunProcsResult | None = None
        self.started: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[RunProcsResult] = loop.create_future()
        self._logs = logs or InheritLogsSpecs()
        self._with_journal = journal
        self._stop: tuple[tuple[Step, ...] | None, str] | None = None
        self._task: ServiceTask[None] | None = None
        self._last: Event | None = None

    @property
    def log_dir(self) -> str:
        """Directory of the run; `""` when logs are off."""
        return self.dest.run_dir

    def pids(self) -> dict[int, int]:
        """By rank, of the workers whose process is running."""
        return {} if self.gang is None else self.gang.pids()

    def send_signal(self, sig: int, ranks: Collection[int]) -> None:
        """Signal the process groups of these ranks."""
        for worker in () if self.gang is None else map(self.gang.workers.get, ranks):
            if worker is not None:
                worker.send_signal(sig, "its caller asked")

    def begin(self) -> None:
        """Start the run's task."""
        self._task = service(self._supervise(), name=f"run {self.spec.name}", on_cancel=self._loop_ends)

    def _loop_ends(self) -> None:
        self.stop(None, "the event loop is ending")

    def stop(self, steps: tuple[Step, ...] | None, why: str) -> None:
        """Stop the gang, also one that is only being started; see `Gang.stop`."""
        if self._stop is None or steps is not None:
            self._stop = (steps, why)
        if self.gang is not None and not self.finished.done():
            self.gang.stop(steps, why)

    async def _supervise(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                result = await self._make(stack)
        except BaseException as error:  # noqa: BLE001  # handed to whoever awaits the start or the result
            self._end()
            self._fall(error)
        else:
            self.result = result
            self._end()
            self.finished.set_result(result)

    def _fall(self, error: BaseException) -> None:
        if self.started.done():
            self.finished.set_exception(error)
        else:
            self.finished.cancel()
            self.started.set_exception(error)

    def _end(self) -> None:
        """Hand out the last event, which the journal already holds, and end the readers."""
        if self._last is not None:
            self.bus.deliver(self._last)
        self.bus.close()
        self.hub.finish()

    async def _make(self, stack: AsyncExitStack) -> RunProcsResult:
        """Open what the run needs, in the order in which it depends on each other, and run it."""
        threads = Threads(f"aelastic {self.spec.name} probe", PROBES)
        stack.callback(threads.close)
        disks = Threads(f"aelastic {self.spec.name} disk", DISKS)
        stack.callback(disks.close)
        envs = worker_environments(self.spec, os.environ, self.run_id, attempt=0)
        plans = await self._settle_output(stack, envs, disks)
        check_limits(self.spec, plans)
        await self._open_journal(stack, disks)
        tree = Tree(self.run_id, threads)
        stack.callback(tree.close)
        watched = await watch(
            self.run_id, stop=self.spec.stop, journal=self.dest.journal, on_lost=self._guard_lost, executor=threads
        )
        stack.push_async_callback(watched.release)
        console = Console()
        stack.callback(console.close)
        stack.push_async_callback(console.settled, self.spec.stop.drain)
        machines = Machines(
            bus=self.bus, tree=tree, threads=threads, disks=disks, hub=self.hub, console=console, watch=watched
        )
        return await self._attempt(Gang(self.spec, self.dest, plans, envs, machines))

    async def _settle_output(self, stack: AsyncExitStack, envs: dict[int, dict[str, str]], disks: Threads) -> Plans:
        """Ask the specs where output goes; tell the workers where their error files are."""
        loop = asyncio.get_running_loop()
        if isinstance(self._logs, InheritLogsSpecs):
            stack.push_async_callback(loop.run_in_executor, disks, self._logs.remove)
        self.dest = await loop.run_in_executor(disks, self._logs.reify, envs)
        for rank, path in self.dest.error_files.items():
            if path:
                envs[rank] |= {"AELASTIC_ERROR_FILE": path, "TORCHELASTIC_ERROR_FILE": path}
        plans = plan(self.dest, self.spec.nprocs, self.spec.filters)
        self._refuse_pipes_to_keep(plans)
        return plans

    def _refuse_pipes_to_keep(self, plans: Plans) -> None:
        piped = [rank for rank, streams in plans.items() if any(s.route is Route.PIPE for s in streams.values())]
        if piped and self.spec.stop.on_supervisor_death == "keep":
            raise ValueError(
                f"{self.spec.name}: StopPolicy.on_supervisor_death='keep' can't be kept for rank"
                f" {', '.join(map(str, piped))}: its output goes through the supervisor and would break with it;"
                " redirect it to a file without tee, capture, rotation or filters"
            )

    async def _open_journal(self, stack: AsyncExitStack, disks: Threads) -> None:
        if not (self._with_journal and self.dest.journal):
            return
        journal = await Journal.open(self.dest.journal, executor=disks)
        stack.push_async_callback(journal.close)
        self.bus.journal = lambda event: journal.append(json.dumps(event.to_dict()).encode() + b"\n")

    def _guard_lost(self, pid: int, reason: str) -> None:
        self.bus.publish(GuardLost(pid=pid, reason=reason))

    async def _attempt(self, gang: Gang) -> RunProcsResult:
        self.bus.publish(RunStarted(nprocs=self.spec.nprocs, containment="session", log_dir=self.log_dir))
        succeeded = False
        try:
            self.gang = gang
            if self._stop is not None:
                gang.stop(*self._stop)
            await gang.start()
            self.started.set_result(None)
            result = self._conclude(gang, await gang.ended())
            succeeded = result.outcome == "succeeded"
        finally:
            self._last = self.bus.number(RunFinished(succeeded=succeeded))
        return result

    def _conclude(self, gang: Gang, end: AttemptEnd) -> RunProcsResult:
        return RunProcsResult(
            return_values=end.return_values,
            failures=end.failures,
            stdouts=dict(gang.dest.stdouts),
            stderrs=dict(gang.dest.stderrs),
            outcome=outcome(failed=bool(end.failures), survived=bool(end.survivors), closed=end.closed),
            exits=end.exits,
            victims=end.victims,
            survivors=end.survivors,
            attempts=1,
            history=(end.failures,),
            lost_bytes=end.lost_bytes,
            pieces=end.pieces,
        )
