"""One attempt: start all its ranks, watch them, stop them, and say how it ended.

The gang owns who still runs and what failed first. It decides without awaiting, in `_judged` and `stop`; the workers
do the rest. Whether another attempt follows is decided above it.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from signal import SIGKILL
from typing import final

from ._attempt import AttemptEnd, Machines, StartAbandoned, Terms
from ._contagion import Contagion
from ._ending import Cause, End
from ._events import AttemptFinished, AttemptStarted, OutputLost, StopRequested
from ._evidence import OomKills, count_oom_kills, failure_of_start
from ._failures import ProcessFailure
from ._function import Function
from ._health import Monitor
from ._lifecycle import State, schedule
from ._limits import as_start_error, shortage
from ._logs import Outputs
from ._policies import Step
from ._process import Command, Process, launch, resolve
from ._spec import RunSpec
from ._std import Std
from ._tasks import first_of
from ._worker import Worker


@final
class Gang:
    """All ranks of one attempt.

    Args:
        ranks: which of the run's; all of them, or the one that restarts by itself.
    """

    def __init__(self, spec: RunSpec, ranks: Collection[int], terms: Terms, machines: Machines) -> None:
        self._loop = asyncio.get_running_loop()  # a stop may come while it doesn't run, as asyncio.run ends
        self.spec = spec
        self.terms = terms
        self.workers: dict[int, Worker] = {}
        self._ranks = tuple(ranks)
        self._machines = machines
        self._publish = functools.partial(machines.bus.publish, attempt=terms.attempt)
        self._outputs: Outputs | None = None
        self._function: Function | None = None
        self._found: dict[str | None, str] = {}
        """By PATH: where the program is."""
        self._monitors: dict[int, Monitor] = {}
        self._disturbed: asyncio.Future[None] = self._loop.create_future()
        """Done when a start that waits for readiness waits in vain: a failure spreads, or a stop came."""
        self._stopped: Cause | None = None
        self._steps: tuple[Step, ...] = spec.stop.steps
        self._contagion = Contagion(
            # A rank that restarts by itself is no danger to the others before it is given up.
            "continue" if spec.restarts_ranks else spec.stop.on_failure,
            self._stop_for_failure,
        )
        self._starting = self._ranks[0]
        self._unstarted: ProcessFailure | None = None
        self._end: AttemptEnd | None = None
        self._error: BaseException | None = None
        self._oom_before: OomKills | None = None

    @property
    def rank(self) -> int | None:
        """Whose attempt it is; None for all ranks together."""
        return self._ranks[0] if self.spec.restarts_ranks else None

    @property
    def over(self) -> bool:
        """Whether nothing of it is left."""
        return self._end is not None

    async def start(self) -> None:
        """Start every rank, or none.

        Raises:
            OSError: of the errno's class, naming run and rank, if one can't be started; `ended` then tells of it too.
            StartAbandoned: if `stop` was called meanwhile.
        """
        self._publish(AttemptStarted(rank=self.rank))
        processes: dict[int, Process] = {}
        try:
            await self._start_all(processes)
        except BaseException as error:  # noqa: BLE001  # raised again when all is taken down
            why = as_start_error(error, self.spec.who(self._starting))
            if isinstance(why, OSError):
                self._unstarted = failure_of_start(self._starting, why)
            await self._take_down(processes)
            raise why from (None if why is error else error)
        self._contagion.all_started()

    async def _start_all(self, processes: dict[int, Process]) -> None:
        await self._prepare()
        for rank in self._ranks:
            self._starting = rank
            processes[rank] = process = await self._launch(rank)
            self._machines.tree.add(rank, process)
            self._opened.started(rank)
            if self.spec.starts_in_order and not await self._may_follow(rank, process):
                break
        await self._opened.opened()
        for rank in processes.keys() - self.workers.keys():
            await self._confirm(rank, processes[rank])
        self._raise_if_stopped()

    async def _confirm(self, rank: int, process: Process) -> Worker:
        self._starting = rank
        await process.confirmed()
        worker = self.workers[rank] = self._employ(rank, process)
        return worker

    async def _may_follow(self, rank: int, process: Process) -> bool:
        """Wait until this rank is ready, or has ended, if another one waits for it; False if none may follow."""
        worker = await self._confirm(rank, process)
        if rank != self._ranks[-1]:
            await first_of(worker.ready, worker.ended, self._disturbed)
        return not self._contagion.breaks_out and self._stopped is None

    @property
    def _opened(self) -> Outputs:
        if self._outputs is None:
            raise RuntimeError("the outputs of this attempt were not opened yet")
        return self._outputs

    def _look_up(self, program: str) -> None:
        """Raise unless every rank finds the program, which is looked for once along each PATH."""
        for rank in self._ranks:
            env, self._starting = self.terms.envs[rank], rank
            if (along := env.get("PATH")) not in self._found:
                self._found[along] = resolve(program, env, self._cwd, who=self.spec.who(rank))

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
            self._function = await Function.prepare(spec, self._ranks, machines.threads, machines.server)
        self._outputs = await Outputs.open(
            {rank: self.terms.plans[rank] for rank in self._ranks},
            name=spec.name,
            attempt=self.terms.attempt,
            prefixes=spec.prefixes,
            filters=spec.filters,
            executor=machines.disks,
            console=machines.console,
            hub=machines.hub,
            on_lost=self._output_lost,
            on_broken=self._broken,
            prefix=self.terms.dest.prefix,
            buffer_bytes=self.terms.dest.buffer_bytes,
        )
        for rank in self._ranks:
            self._observe(rank)

    def _observe(self, rank: int) -> None:
        """Make ready to observe a worker of this rank, and let it know how to talk to us."""
        if self.spec.health is not None:
            self._starting = rank
            try:
                self._monitors[rank] = monitor = self._machines.ward.monitor(rank, self.spec.health)
            except OSError as error:
                what = shortage(error.errno or 0) or error.strerror
                raise OSError(error.errno, f"{self.spec.who(rank)} can't be started: no socket: {what}") from error
            self.terms.envs[rank].update(monitor.env)

    def captures(self) -> dict[int, dict[str, str]]:
        """By rank, what its line patterns captured; ranks without any are left out."""
        return {rank: dict(captures) for rank, monitor in self._monitors.items() if (captures := monitor.captures)}

    @property
    def _cwd(self) -> str | None:
        cwd = self.spec.options.cwd
        return None if cwd is None else os.fspath(cwd)

    async def _launch(self, rank: int) -> Process:
        spec = self.spec
        stdout, stderr = await self._opened.child_fds(rank)
        cgroup = await self._cgroup(rank)
        with self._stdin(rank) as stdin:
            command = Command(
                argv=(str(spec.entrypoint), *spec.args[rank]) if spec.is_command else (),
                env=self.terms.envs[rank],
                cwd=self._cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(spec.options.pass_fds),
                options=spec.options,
                rank=rank,
                who=spec.who(rank),
                cgroup=cgroup,
                on_born=functools.partial(self._machines.watch.worker, rank),
                found=self._found.get(self.terms.envs[rank].get("PATH"), ""),
            )
            async with self._machines.starts:
                self._raise_if_stopped()
                return await (launch(command) if self._function is None else self._function.launch(rank, command))

    async def _cgroup(self, rank: int) -> str:
        machines = self._machines
        if machines.cgroups is None:
            return ""
        try:
            return await self._loop.run_in_executor(machines.threads, machines.cgroups.make, rank)
        except OSError as error:
            what = f"{self.spec.who(rank)} can't be started: its cgroup can't be made: {error.strerror}"
            raise OSError(error.errno, what, error.filename) from error

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
            error_file=self.terms.dest.error_files.get(rank, ""),
            returned=None if self._function is None else self._function.returned[rank],
            publish=self._publish,
            judge=self._judged,
            monitor=self._monitors.get(rank),
            ward=machines.ward,
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
        self._stop_for_failure("the start did not succeed")
        await self.ended()

    def pids(self) -> dict[int, int]:
        """By rank, of the workers whose process is running."""
        running = (State.RUNNING, State.STOPPING)
        return {rank: worker.pid for rank, worker in self.workers.items() if worker.state in running}

    def stop(self, steps: tuple[Step, ...] | None, why: str, cause: Cause) -> bool:
        """Stop all ranks; who asks publishes `StopRequested`.

        Args:
            steps: replace the steps that are left; None takes the policy's, or leaves a stop under way as it is.
            cause: what it makes of those who still run; a stop under way keeps its own.

        Returns:
            False when a stop under way goes on as it was.
        """
        if self._stopped is not None and steps is None:
            return False
        self._steps = steps or self._steps
        self._stop_all(self._stopped or cause, why)
        return True

    def _stop_for_failure(self, why: str) -> None:
        self._publish(StopRequested(reason=why))
        self._stop_all(self._stopped or Cause.FAILURE, why)

    def _stop_all(self, cause: Cause, why: str) -> None:
        self._stopped = cause
        self._disturb()
        self._contagion.end()
        if self._outputs is not None:
            self._outputs.release()  # no reader holds a worker back any more
        if self._function is not None:
            self._function.hasten()
        dues = schedule(self._steps, self._loop.time())
        for worker in self.workers.values():
            worker.stop(dues, cause, why)

    def _judged(self, worker: Worker, *, failed: bool) -> None:
        """Decide what an exit means for the others."""
        if failed:
            self._contagion.failed(f"rank {worker.rank} (pid {worker.pid}) failed")
            if self._contagion.breaks_out:
                self._disturb()

    def _disturb(self) -> None:
        if not self._disturbed.done():
            self._disturbed.set_result(None)

    def _broken(self, error: BaseException) -> None:
        """A machine of ours failed: the run must fail aloud, after everything was taken down."""
        self._error = self._error or error
        self._stop_for_failure(f"its output could not be supervised: {error!r}")

    async def _kill_unsupervised(self) -> None:
        """End what a worker whose supervision broke has left: nobody takes its steps any more."""
        for worker in self.workers.values():
            if worker.ended.exception() is not None:
                until = self._loop.time() + self.spec.stop.steps[-1][1]
                never = self._loop.create_future()
                await self._machines.tree.press(worker.rank, SIGKILL, until, hurry=never, on_hit=lambda *_: None)

    def _output_lost(self, rank: int, std: Std, lost_bytes: int, reason: str) -> None:
        self._publish(OutputLost(rank=rank, std=std, lost_bytes=lost_bytes, reason=reason))

    async def ended(self) -> AttemptEnd:
        """Wait until every rank has ended and every file is closed. Not for two tasks at once."""
        if self._end is None:
            self._end = await self._make_end()
            self._publish(AttemptFinished(succeeded=self._end.succeeded, rank=self.rank))
        return self._end

    async def _make_end(self) -> AttemptEnd:
        end = AttemptEnd()
        if self.workers:
            await asyncio.wait([worker.ended for worker in self.workers.values()])
        if self._error is not None:
            await self._kill_unsupervised()
        self._contagion.end()
        for monitor in self._monitors.values():
            await monitor.close()
        if self._function is not None:
            await self._function.close()
        if self._outputs is not None:
            await self._outputs.close()
            end.lost_bytes, end.pieces = self._outputs.lost_bytes, self._outputs.pieces
        if self._error is not None:
            raise self._error
        for worker in self.workers.values():
            end.add(worker.ended.result())
        if self._unstarted is not None:
            end.failures[self._unstarted.rank] = self._unstarted
        end.closed = self._stopped is Cause.CALLER
        return end
