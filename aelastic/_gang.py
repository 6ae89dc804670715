"""One attempt: start all ranks, watch them, stop them, and say how it ended.

The gang owns who still runs and what failed first. It decides without awaiting, in `_judged` and `stop`; the workers
do the rest.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from signal import SIGKILL
from typing import Any, final

from ._bus import Bus
from ._events import AttemptFinished, AttemptStarted, OutputLost, StopRequested
from ._evidence import OomKills, count_oom_kills
from ._exit import ExitStatus
from ._failures import ProcessFailure
from ._function import Function
from ._guard import Watch
from ._lifecycle import State, schedule
from ._limits import check_descriptors, check_open
from ._logs import Console, LineHub, LogsDest, Outputs, Plans, Route
from ._policies import Step
from ._process import Command, Process, Tree, launch, resolve
from ._results import Survivor
from ._returned import Value
from ._spec import RunSpec
from ._std import Std
from ._threads import Threads
from ._worker import Cause, End, Worker

_DESCRIPTORS = {Route.INHERIT: 0, Route.DISCARD: 1, Route.FILE: 1, Route.PIPE: 4}
"""By route, what one stream of one rank has open: both ends of a pipe, the file and its index."""


TRANSIENT_DESCRIPTORS = 20
"""What one spawn has open while it is under way, a look at /proc beside it, the guard and the journal."""


class StartAbandoned(Exception):
    """The run was stopped before all its ranks had been started."""


def check_limits(spec: RunSpec, plans: Plans) -> None:
    """Raise unless a gang's descriptors are there: those it passes on are open, and there is room for its own.

    Raises:
        OSError: EBADF or EMFILE, naming the run and what is missing.
    """
    check_open(spec.options.pass_fds, spec.name)
    streams = sum(_DESCRIPTORS[plan.route] for streams in plans.values() for plan in streams.values())
    ranks = spec.nprocs * (2 if spec.is_command else 4)  # pidfds (ours and asyncio's) and pipes
    check_descriptors(streams + ranks + TRANSIENT_DESCRIPTORS, spec.name)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What a run lends to its attempts."""

    bus: Bus
    tree: Tree
    threads: Threads
    """For /proc, evidence and pickles."""
    disks: Threads
    """For log files."""
    hub: LineHub
    console: Console
    watch: Watch


@final
@dataclass(slots=True)
class AttemptEnd:
    """How an attempt ended; mappings by rank."""

    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    exits: dict[int, ExitStatus] = field(default_factory=dict)
    victims: dict[int, ExitStatus] = field(default_factory=dict)
    survivors: tuple[Survivor, ...] = ()
    lost_bytes: int = 0
    pieces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    closed: bool = False
    """Whether the caller stopped it before it ended by itself."""

    def add(self, end: End) -> None:
        """Count one rank in."""
        if end.status is not None:
            self.exits[end.rank] = end.status
            if end.stopped is Cause.FAILURE:
                self.victims[end.rank] = end.status
        if end.failure is not None:
            self.failures[end.rank] = end.failure
        elif end.stopped is None and isinstance(end.returned, Value):
            self.return_values[end.rank] = end.returned.value
        self.survivors += end.survivors


@final
class Gang:
    """All ranks of one attempt."""

    def __init__(
        self,
        spec: RunSpec,
        dest: LogsDest,
        plans: Plans,
        envs: Mapping[int, dict[str, str]],
        machines: Machines,
    ) -> None:
        self._loop = asyncio.get_running_loop()  # a stop may come while it doesn't run, as asyncio.run ends
        self.spec = spec
        self.dest = dest
        self.workers: dict[int, Worker] = {}
        self._plans = plans
        self._envs = envs
        self._machines = machines
        self._outputs: Outputs | None = None
        self._function: Function | None = None
        self._stopped: Cause | None = None
        self._steps: tuple[Step, ...] = spec.stop.steps
        self._all_started = False
        self._failed_early: list[Worker] = []
        self._grace: asyncio.TimerHandle | None = None
        self._error: BaseException | None = None
        self._oom_before: OomKills | None = None

    async def start(self) -> None:
        """Start every rank, or none.

        Raises:
            OSError: of the errno's class, naming run and rank, if one can't be started.
            StartAbandoned: if `stop` was called meanwhile.
        """
        self._machines.bus.publish(AttemptStarted())
        processes: dict[int, Process] = {}
        try:
            await self._start_all(processes)
        except BaseException:
            await self._take_down(processes)
            raise
        self._all_started = True
        for worker in self._failed_early:
            self._failure_seen(worker)

    async def _start_all(self, processes: dict[int, Process]) -> None:
        await self._prepare()
        for rank in range(self.spec.nprocs):
            self._raise_if_stopped()
            processes[rank] = process = await self._launch(rank)
            self._machines.tree.add(rank, process)
            self._machines.watch.worker(rank, process.pid, process.held_ticks)
            self._opened.started(rank)
        await self._opened.opened()
        for rank, process in processes.items():
            await process.confirmed()
            self.workers[rank] = self._employ(rank, process)
        self._raise_if_stopped()

    @property
    def _opened(self) -> Outputs:
        if self._outputs is None:
            raise RuntimeError("the outputs of this attempt were not opened yet")
        return self._outputs

    def _look_up(self, program: str) -> None:
        """Raise unless every rank finds the program, which is looked for once along each PATH."""
        paths: set[str | None] = set()
        for rank, env in self._envs.items():
            if env.get("PATH") not in paths:
                resolve(program, env, self._cwd, who=self.spec.who(rank))
                paths.add(env.get("PATH"))

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise StartAbandoned(f"{self.spec.name} was stopped while it was being started")

    async def _prepare(self) -> None:
        """Look up, pickle and open everything that the starts need."""
        spec, machines = self.spec, self._machines
        self._oom_before = await self._loop.run_in_executor(machines.threads, count_oom_kills)
        if isinstance(spec.entrypoint, str):
            self._look_up(spec.entrypoint)
        else:
            self._function = await Function.prepare(spec, machines.threads)
        self._outputs = await Outputs.open(
            self._plans,
            name=spec.name,
            attempt=machines.bus.attempt,
            prefixes=spec.prefixes,
            filters=spec.filters,
            executor=machines.disks,
            console=machines.console,
            hub=machines.hub,
            on_lost=self._output_lost,
            on_broken=self._broken,
            buffer_bytes=self.dest.buffer_bytes,
        )

    @property
    def _cwd(self) -> str | None:
        cwd = self.spec.options.cwd
        return None if cwd is None else os.fspath(cwd)

    async def _launch(self, rank: int) -> Process:
        spec = self.spec
        stdout, stderr = await self._opened.child_fds(rank)
        with self._stdin(rank) as stdin:
            command = Command(
                argv=(str(spec.entrypoint), *spec.args[rank]) if spec.is_command else (),
                env=self._envs[rank],
                cwd=self._cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(spec.options.pass_fds),
                options=spec.options,
                rank=rank,
                who=spec.who(rank),
            )
            return await (launch(command) if self._function is None else self._function.launch(rank, command))

    @contextmanager
    def _stdin(self, rank: int) -> Iterator[int]:
        """The descriptor a worker reads from, for the time of its start."""
        stdin = os.fspath(self.spec.options.stdin)
        if stdin == "inherit":
            yield 0
            return
        path = os.devnull if stdin == "null" else os.path.join(self._cwd or "", stdin)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(error.errno, f"{self.spec.who(rank)}: stdin can't be read: {error.strerror}", path) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _employ(self, rank: int, process: Process) -> Worker:
        machines = self._machines
        worker = Worker(
            rank,
            process,
            outputs=self._opened,
            tree=machines.tree,
            policy=self.spec.stop,
            threads=machines.threads,
            oom_before=self._oom_before,
            error_file=self.dest.error_files.get(rank, ""),
            returned=None if self._function is None else self._function.returned[rank],
            publish=machines.bus.publish,
            judge=self._judged,
        )
        worker.ended.add_done_callback(self._supervised)
        return worker

    def _supervised(self, ended: asyncio.Task[End]) -> None:
        if (error := ended.exception()) is not None:
            self._broken(error)

    async def _take_down(self, processes: Mapping[int, Process]) -> None:
        """Undo a half start: everything that was launched is gone on return, or reported."""
        for rank in processes.keys() - self.workers.keys():
            self.workers[rank] = self._employ(rank, processes[rank])
        self._stop_all(self._stopped or Cause.FAILURE, "the start did not succeed")
        await self.ended()

    def pids(self) -> dict[int, int]:
        """By rank, of the workers whose process is running."""
        running = (State.RUNNING, State.STOPPING)
        return {rank: worker.pid for rank, worker in self.workers.items() if worker.state in running}

    def stop(self, steps: tuple[Step, ...] | None, why: str) -> None:
        """Stop all ranks for the caller.

        Args:
            steps: replace the steps that are left; None takes the policy's, or leaves a stop under way as it is.
        """
        if self._stopped is None or steps is not None:
            self._steps = steps or self._steps
            self._stop_all(self._stopped or Cause.CALLER, why)

    def _stop_all(self, cause: Cause, why: str) -> None:
        self._stopped = cause
        if self._grace is not None:
            self._grace.cancel()
        if self._outputs is not None:
            self._outputs.release()  # no reader holds a worker back any more
        self._machines.bus.publish(StopRequested(reason=why))
        dues = schedule(self._steps, self._loop.time())
        for worker in self.workers.values():
            worker.stop(dues, cause, why)

    def _judged(self, worker: Worker, *, failed: bool) -> None:
        """Decide what an exit means for the others."""
        if not failed or self._stopped is not None:
            return
        if self._all_started:
            self._failure_seen(worker)
        else:
            self._failed_early.append(worker)

    def _failure_seen(self, worker: Worker) -> None:
        why = f"rank {worker.rank} (pid {worker.pid}) failed"
        on_failure = self.spec.stop.on_failure
        if self._stopped is not None or self._grace is not None or on_failure == "continue":
            return
        if isinstance(on_failure, float):
            self._grace = self._loop.call_later(on_failure, self._stop_all, Cause.FAILURE, why)
        else:
            self._stop_all(Cause.FAILURE, why)

    def _broken(self, error: BaseException) -> None:
        """A machine of ours failed: the run must fail aloud, after everything was taken down."""
        self._error = self._error or error
        self._stop_all(self._stopped or Cause.FAILURE, f"its output could not be supervised: {error!r}")

    async def _kill_unsupervised(self) -> None:
        """End what a worker whose supervision broke has left: nobody takes its steps any more."""
        for worker in self.workers.values():
            if worker.ended.exception() is not None:
                until = self._loop.time() + self.spec.stop.steps[-1][1]
                never = self._loop.create_future()
                await self._machines.tree.press(worker.rank, SIGKILL, until, hurry=never, on_hit=lambda *_: None)

    def _output_lost(self, rank: int, std: Std, lost_bytes: int, reason: str) -> None:
        self._machines.bus.publish(OutputLost(rank=rank, std=std, lost_bytes=lost_bytes, reason=reason))

    async def ended(self) -> AttemptEnd:
        """Wait until every rank has ended and every file is closed."""
        attempt = AttemptEnd(closed=False)
        if self.workers:
            await asyncio.wait([worker.ended for worker in self.workers.values()])
        if self._error is not None:
            await self._kill_unsupervised()
        if self._grace is not None:
            self._grace.cancel()
        if self._function is not None:
            await self._function.close()
        if self._outputs is not None:
            await self._outputs.close()
            attempt.lost_bytes, attempt.pieces = self._outputs.lost_bytes, self._outputs.pieces
        if self._error is not None:
            raise self._error
        for worker in self.workers.values():
            attempt.add(worker.ended.result())
        attempt.closed = self._stopped is Cause.CALLER
        failed = bool(attempt.failures or attempt.survivors)
        self._machines.bus.publish(AttemptFinished(succeeded=not failed and not attempt.closed))
        return attempt
