"""A run from start to result: opens the machines, lets its rounds be made on them, hands out the result.

The run owns everything that lives as long as it does. Its task is a service: whoever is cancelled, the run comes to
its end, and its result is there after everything of it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar, final

from ._attempt import Machines, StartAbandoned, Terms, check_limits, most_descriptors
from ._bus import Bus
from ._conditions import Question
from ._ending import Cause
from ._events import Event, GuardLost, JournalLost, RestartScheduled, RunFinished, RunStarted, UsageSampled
from ._failures import RankMappingError
from ._function import ForkServer
from ._guard import SERVER, watch
from ._health import Ward
from ._limits import as_start_error, has_one_thread, make_room
from ._logs import (
    Console,
    InheritLogsSpecs,
    Journal,
    LineHub,
    Lines,
    LogsDest,
    LogsSpecs,
    Plans,
    Route,
    check_dest,
    plan,
    shown,
)
from ._policies import Step
from ._process import Cgroups, Tree, choose_cgroups, signal_alone
from ._results import RunProcsResult, Usage
from ._round import Round
from ._spec import RunSpec, worker_environments
from ._std import Std
from ._tasks import ServiceTask, outlast, service
from ._threads import Threads

V = TypeVar("V")
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
        self.log_dir = ""
        """Directory of the run; `""` when logs are off."""
        self.ward: Ward | None = None
        self.context: Any = None
        """The caller's handle, for callables of `HealthPolicy.ready`."""
        self.result: RunProcsResult | None = None
        self.started: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[RunProcsResult] = loop.create_future()
        self._logs = logs or InheritLogsSpecs()
        self._with_journal = journal
        self._host = dict(os.environ)
        self._disks = Threads(f"aelastic {spec.name} disk", DISKS)
        self.kept = False
        """Whether a supervisor decides what follows a round."""
        self.down: asyncio.Future[None] = loop.create_future()
        """Done when a round is over and its keeper is to decide, or the run is; a new one for each round."""
        self._round: Round | None = None
        self._verdict: asyncio.Future[bool] = loop.create_future()
        """Whether another round follows the one under way."""
        self._recalled = False
        self._gave_up = ""
        self._stop: tuple[tuple[Step, ...] | None, str] | None = None
        self._task: ServiceTask[None] | None = None
        self._journal: Journal | None = None
        self._last: Event | None = None

    @property
    def round(self) -> Round:
        """The round under way, or the last one.

        Raises:
            RuntimeError: before the first, while the run opens what it needs.
        """
        if self._round is None:
            raise RuntimeError(f"{self.spec.name} has not begun to start its ranks")
        return self._round

    def begin(self) -> None:
        """Start the run's task."""
        self._task = service(self._supervise(), name=f"run {self.spec.name}", on_cancel=self._loop_ends)

    async def wait_started(self) -> None:
        """Wait until every rank has been started.

        Cancellation: stops the run; raised when nothing of it is left.
        """
        await outlast(self.started, on_cancel=lambda: self.stop(None, "its start was cancelled"), end=self.finished)

    def _loop_ends(self) -> None:
        self.stop(None, "the event loop is ending")

    def stop(self, steps: tuple[Step, ...] | None, why: str) -> None:
        """Stop all of it, also what is only being started or about to be started again; see `Gang.stop`."""
        if self._stop is None or steps is not None:
            self._stop = (steps, why)
        self._end_rounds()
        if self._round is not None:
            self._round.stop(steps, why, Cause.CALLER)

    def recall(self, why: str) -> None:
        """Stop the round under way for the keeper, who then decides what follows."""
        self._recalled = True
        if self._round is not None:
            self._round.stop(None, why, Cause.CALLER)

    def go_on(self, why: str) -> None:
        """Let another round begin; without effect on a run that is not down, or is to end."""
        if not self.down.done() or self._verdict.done():
            return
        self.bus.publish(RestartScheduled(delay=0.0, reason=why))
        self._verdict.set_result(True)
        self._recalled = False
        self._round = self.round.following()
        self._verdict, self.down = (asyncio.get_running_loop().create_future() for _ in range(2))

    def give_up(self, why: str) -> None:
        """Let no other round begin; the result will say why."""
        self._gave_up = why
        self._end_rounds()

    def _end_rounds(self) -> None:
        if not self._verdict.done():
            self._verdict.set_result(False)

    def may_restart(self, rank: int) -> bool:
        """Whether a rank that has ended may yet be started again."""
        return (self.kept and not self._verdict.done()) or self.round.may_restart(rank)

    async def _supervise(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                result = await self._make(stack)
        except BaseException as error:  # noqa: BLE001  # handed to whoever awaits the start or the result
            self._end()
            self._fall(error)
            self._is_down()
        else:
            if self._journal is not None:
                result = dataclasses.replace(result, journal_lost_bytes=self._journal.lost_bytes)
            self.result = result
            self._end()
            self.finished.set_result(result)
            self._is_down()

    def _is_down(self) -> None:
        self._end_rounds()
        if not self.down.done():
            self.down.set_result(None)

    def _fall(self, error: BaseException) -> None:
        if self.started.done():
            self.finished.set_exception(error)
        else:
            self.finished.cancel()
            self.started.set_exception(as_start_error(error, self.spec.name))

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
        stack.callback(self._disks.close)
        if isinstance(self._logs, InheritLogsSpecs):
            stack.push_async_callback(self._on_disk, self._logs.remove)
        loop, stop = asyncio.get_running_loop(), self.spec.stop
        room = self._make_room(threads)
        terms = await self._settle(0)
        check_limits(self.spec, terms.plans)
        console = Console()
        stack.callback(console.close)
        for std in shown(terms.plans):
            console.lease(std)  # before the guard, whose boot would keep the processor from the console's new thread
        self.log_dir = terms.dest.run_dir
        await self._open_journal(stack, terms.dest.journal)
        chosen = await loop.run_in_executor(threads, choose_cgroups, stop.containment, self.run_id, self.spec.name)
        watched = await watch(
            self.run_id,
            stop=stop,
            journal=terms.dest.journal,
            on_lost=self._guard_lost,
            executor=threads,
            cgroup="" if chosen is None else chosen.folder,
        )
        stack.push_async_callback(watched.release)
        await asyncio.wait({room})
        cgroups = None if chosen is None else await self._opened(chosen, stack, threads)
        tree = Tree(self.run_id, threads, cgroups)
        stack.callback(tree.close)
        self.ward = ward = self._open_ward(tree)
        stack.push_async_callback(ward.close)
        server = ForkServer(self.spec.name, self.spec.options, functools.partial(watched.worker, SERVER))
        stack.push_async_callback(server.close)
        stack.push_async_callback(console.settled, self.spec.stop.drain)
        return await self._see_through(
            terms,
            Machines(
                bus=self.bus,
                tree=tree,
                threads=threads,
                disks=self._disks,
                hub=self.hub,
                console=console,
                watch=watched,
                ward=ward,
                cgroups=cgroups,
                server=server,
                starts=asyncio.Lock(),
            ),
        )

    def _make_room(self, threads: Threads) -> asyncio.Future[None]:
        """Let the table of descriptors grow; at once while no thread is there that would make it slow."""
        loop, needed = asyncio.get_running_loop(), most_descriptors(self.spec)
        if not has_one_thread():
            return loop.run_in_executor(threads, make_room, needed)
        make_room(needed)
        made = loop.create_future()
        made.set_result(None)
        return made

    def _open_ward(self, tree: Tree) -> Ward:
        ward = Ward(
            self.spec.name,
            pids=self._pids,
            members=tree.by_rank,
            poke=signal_alone,
            lines=self._lines_of,
            ask=self._ask,
        )
        if self.spec.health is not None and self.spec.health.usage_every is not None:
            ward.sample_usage(self.spec.health.usage_every, self._usage_sampled)
        return ward

    def _pids(self) -> dict[int, int]:
        return self.round.pids()

    def _lines_of(self, rank: int, std: Std) -> Lines:
        return self.hub.lines(ranks=[rank], std=std, lossless=True, partials=True)

    def _ask(self, question: Question, rank: int) -> Awaitable[Any]:
        return question(self.context, rank)

    def _usage_sampled(self, usages: dict[int, Usage]) -> None:
        if self._last is None:
            self.bus.publish(UsageSampled(usages=usages))

    async def _opened(self, cgroups: Cgroups, stack: AsyncExitStack, threads: Threads) -> Cgroups | None:
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(threads, cgroups.open, self.spec.name):
            return None
        stack.push_async_callback(loop.run_in_executor, threads, cgroups.close)
        return cgroups

    async def _on_disk(self, work: Callable[..., V], *args: Any) -> V:
        return await asyncio.get_running_loop().run_in_executor(self._disks, work, *args)

    async def _settle(self, attempt: int) -> Terms:
        """Settle what an attempt is started with: environments, and where output goes."""
        return await self._on_disk(self._settled, attempt)

    def _settled(self, attempt: int) -> Terms:
        envs = worker_environments(self.spec, self._host, self.run_id, attempt)
        dest = check_dest(self._reified(envs), self.spec.nprocs, self.spec.name)
        for rank, path in dest.error_files.items():
            if path:
                envs[rank] |= {"AELASTIC_ERROR_FILE": path, "TORCHELASTIC_ERROR_FILE": path}
        plans = plan(dest, self.spec.nprocs, self.spec.filters)
        self._refuse_pipes_to_keep(plans)
        return Terms(attempt=attempt, envs=envs, dest=dest, plans=plans)

    def _reified(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        try:
            return self._logs.reify(envs)
        except OSError as error:
            if error.errno is None:
                raise  # a sentence already
            why = f"{self.spec.name}: its logs have no place: {error.strerror}; name a log_dir that can be written to"
            raise OSError(error.errno, why, error.filename) from error
        except RankMappingError as error:
            raise error.of(self.spec.name) from error

    def _refuse_pipes_to_keep(self, plans: Plans) -> None:
        piped = [rank for rank, streams in plans.items() if any(s.route is Route.PIPE for s in streams.values())]
        if piped and self.spec.stop.on_supervisor_death == "keep":
            raise ValueError(
                f"{self.spec.name}: StopPolicy.on_supervisor_death='keep' can't be kept for rank"
                f" {', '.join(map(str, piped))}: its output goes through the supervisor and would break with it;"
                " redirect it to a file without tee, capture, rotation or filters"
            )

    async def _open_journal(self, stack: AsyncExitStack, path: str) -> None:
        if not (self._with_journal and path):
            return
        journal = self._journal = await Journal.open(path, executor=self._disks, on_lost=self._journal_lost)
        stack.push_async_callback(journal.close)
        self.bus.journal = lambda event: journal.append(json.dumps(event.to_dict()).encode() + b"\n")

    def _journal_lost(self, lost_bytes: int, reason: str) -> None:
        if self._last is None:  # else it was lost at the very end: the result tells
            self.bus.publish(JournalLost(lost_bytes=lost_bytes, reason=reason))

    def _guard_lost(self, pid: int, reason: str) -> None:
        self.bus.publish(GuardLost(pid=pid, reason=reason))

    async def _see_through(self, terms: Terms, machines: Machines) -> RunProcsResult:
        """Let the rounds be made, from the first to the last, and say how they ended."""
        containment = "session" if machines.cgroups is None else "cgroup"
        self.bus.publish(RunStarted(nprocs=self.spec.nprocs, containment=containment, log_dir=self.log_dir))
        gave_up, succeeded = "", False
        try:
            if self._stop is not None:
                raise StartAbandoned(f"{self.spec.name} was stopped while it was being started")
            self._round = Round.first(self.spec, self._settle, machines, terms)
            await self._make_rounds()
            result = self._round.conclude(closed=self._stop is not None, gave_up=self._gave_up)
            gave_up, succeeded = result.gave_up, result.outcome == "succeeded"
        finally:
            self._last = self.bus.number(RunFinished(succeeded=succeeded, gave_up=gave_up))
        return result

    async def _make_rounds(self) -> None:
        await self.round.start()
        self.started.set_result(None)
        await self.round.ended()
        while await self._goes_on():
            with contextlib.suppress(OSError, StartAbandoned):  # the round tells of it at its end
                await self.round.start()
            await self.round.ended()

    async def _goes_on(self) -> bool:
        """Whether a keeper lets another round begin."""
        over = not (self.round.failed or self._recalled or self.spec.restart.when == "always")
        if over or not self.kept or self._verdict.done():
            return False
        verdict = self._verdict
        self.down.set_result(None)
        await asyncio.wait({verdict})
        return verdict.result()
