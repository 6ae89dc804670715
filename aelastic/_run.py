"""A run from start to result: opens the machines, lets its gang or its ranks follow one another, draws the conclusion.

The run owns everything that lives as long as it does. Its task is a service: whoever is cancelled, the run comes to
its end, and its result is there after everything of it is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar, final

from ._attempt import Machines, StartAbandoned, Terms, check_limits
from ._bus import Bus
from ._conditions import Question
from ._contagion import Contagion
from ._ending import Cause
from ._events import Event, GuardLost, RunFinished, RunStarted, StopRequested, UsageSampled
from ._function import ForkServer
from ._guard import watch
from ._health import Ward
from ._lifecycle import outcome
from ._limits import as_start_error
from ._logs import Console, InheritLogsSpecs, Journal, LineHub, Lines, LogsDest, LogsSpecs, Plans, Route, plan
from ._policies import Step
from ._process import Cgroups, Tree, choose_cgroups, signal_alone
from ._results import RunProcsResult, Usage
from ._spec import RunSpec, worker_environments
from ._std import Std
from ._succession import Succession
from ._tasks import ServiceTask, first_of, service
from ._threads import Threads
from ._worker import Worker

K = TypeVar("K")
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
        self._successions: tuple[Succession, ...] = ()
        self._contagion = Contagion(spec.stop.on_failure, self._stop_for_failure)
        self._stop: tuple[tuple[Step, ...] | None, str] | None = None
        self._error: BaseException | None = None
        self._task: ServiceTask[None] | None = None
        self._last: Event | None = None

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

    def begin(self) -> None:
        """Start the run's task."""
        self._task = service(self._supervise(), name=f"run {self.spec.name}", on_cancel=self._loop_ends)

    def _loop_ends(self) -> None:
        self.stop(None, "the event loop is ending")

    def stop(self, steps: tuple[Step, ...] | None, why: str) -> None:
        """Stop all of it, also what is only being started or about to be started again; see `Gang.stop`."""
        if self._stop is None or steps is not None:
            self._stop = (steps, why)
        self._stop_all(steps, why, Cause.CALLER)

    def _stop_all(self, steps: tuple[Step, ...] | None, why: str, cause: Cause) -> None:
        self._contagion.end()
        changed = [succession.stop(steps, why, cause) for succession in self._successions]
        if any(changed):
            self.bus.publish(StopRequested(reason=why))

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
        terms = await self._settle(0)
        check_limits(self.spec, terms.plans)
        self.log_dir = terms.dest.run_dir
        await self._open_journal(stack, terms.dest.journal)
        loop, stop = asyncio.get_running_loop(), self.spec.stop
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
        cgroups = None if chosen is None else await self._opened(chosen, stack, threads)
        tree = Tree(self.run_id, threads, cgroups)
        stack.callback(tree.close)
        self.ward = ward = self._open_ward(tree)
        stack.push_async_callback(ward.close)
        server = ForkServer(self.spec.name, self.spec.options)
        stack.push_async_callback(server.close)
        console = Console()
        stack.callback(console.close)
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

    def _open_ward(self, tree: Tree) -> Ward:
        ward = Ward(
            self.spec.name,
            pids=self.pids,
            members=tree.by_rank,
            poke=signal_alone,
            lines=self._lines_of,
            ask=self._ask,
        )
        if self.spec.health is not None and self.spec.health.usage_every is not None:
            ward.sample_usage(self.spec.health.usage_every, self._usage_sampled)
        return ward

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
        dest = self._logs.reify(envs)
        for rank, path in dest.error_files.items():
            if path:
                envs[rank] |= {"AELASTIC_ERROR_FILE": path, "TORCHELASTIC_ERROR_FILE": path}
        plans = plan(dest, self.spec.nprocs, self.spec.filters)
        self._refuse_pipes_to_keep(plans)
        return Terms(attempt=attempt, envs=envs, dest=dest, plans=plans)

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
        journal = await Journal.open(path, executor=self._disks)
        stack.push_async_callback(journal.close)
        self.bus.journal = lambda event: journal.append(json.dumps(event.to_dict()).encode() + b"\n")

    def _guard_lost(self, pid: int, reason: str) -> None:
        self.bus.publish(GuardLost(pid=pid, reason=reason))

    async def _see_through(self, terms: Terms, machines: Machines) -> RunProcsResult:
        """Let the attempts be made, from the first to the last, and say how they ended."""
        containment = "session" if machines.cgroups is None else "cgroup"
        self.bus.publish(RunStarted(nprocs=self.spec.nprocs, containment=containment, log_dir=self.log_dir))
        everybody = range(self.spec.nprocs)
        groups = [(rank,) for rank in everybody] if self.spec.restarts_ranks else [tuple(everybody)]
        self._successions = tuple(Succession(self.spec, ranks, terms, self._settle, machines) for ranks in groups)
        gave_up, succeeded = "", False
        try:
            await self._live()
            result = self._conclude()
            gave_up, succeeded = result.gave_up, result.outcome == "succeeded"
        finally:
            self._last = self.bus.number(RunFinished(succeeded=succeeded, gave_up=gave_up))
        return result

    async def _live(self) -> None:
        lives: list[ServiceTask[None]] = []
        try:
            for succession in self._successions:
                self._raise_if_ended()
                lives.append(service(self._follow(succession), name=f"attempts of {self.spec.name}"))
                await asyncio.wait({succession.started})
                succession.started.result()
                if self.spec.starts_in_order and not await self._may_follow(succession, lives[-1]):
                    break
            self._contagion.all_started()
            self.started.set_result(None)
        except BaseException as error:
            self._stop_for_failure(f"the start did not succeed: {error}")
            raise
        finally:
            if lives:
                await asyncio.wait(lives)
            self._contagion.end()
        if self._error is not None:
            raise self._error

    async def _may_follow(self, succession: Succession, life: ServiceTask[None]) -> bool:
        """Wait until a rank that restarts by itself is ready, or has ended well; False if it failed for good."""
        if succession is self._successions[-1]:
            return True
        while not (succession.ready or life.done() or self._stop is not None or self._contagion.breaks_out):
            await self.news(life)
        return not self._contagion.breaks_out

    async def news(self, *ends: asyncio.Future[Any]) -> None:
        """Wait until anything happens to the run, or one of these is done."""
        event = asyncio.ensure_future(self.bus.next(self.bus.next_seq))
        try:
            await first_of(event, self.finished, *ends)
        finally:
            event.cancel()

    def _raise_if_ended(self) -> None:
        if self._stop is not None or self._error is not None:
            raise self._error or StartAbandoned(f"{self.spec.name} was stopped while it was being started")

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

    def _stop_for_failure(self, why: str) -> None:
        self._stop_all(None, why, Cause.FAILURE)

    def _conclude(self) -> RunProcsResult:
        """Put together how everything ended."""
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
                failed=any(one.failed for one in each),
                survived=bool(survivors),
                closed=self._stop is not None and cut_short,
            ),
            exits=union(end.exits for end in ends),
            victims=union(end.victims for end in ends),
            survivors=survivors,
            attempts=max(len(one.history) for one in each),
            history=tuple(map(union, itertools.zip_longest(*(one.history for one in each), fillvalue={}))),
            gave_up="; ".join(filter(None, (one.gave_up for one in each))),
            lost_bytes=sum(one.lost_bytes for one in each),
            pieces=union(one.pieces for one in each),
            name=self.spec.name,
        )


def union(mappings: Iterable[Mapping[K, V]]) -> dict[K, V]:
    """One mapping of several, each with keys of its own."""
    return {key: value for mapping in mappings for key, value in mapping.items()}
