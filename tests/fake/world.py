"""A world in which no process is real and no time passes: runs, gangs and workers of ours on fakes of what is below.

Time is the loop's own: it jumps to the next timer as soon as nothing else is to be done.
"""

from __future__ import annotations

import asyncio
import heapq
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aelastic import Event, ExitStatus, ExitUsage, RestartPolicy, StopPolicy, Survivor
from aelastic import _gang as gang_module
from aelastic import _worker as worker_module
from aelastic._attempt import Machines, Terms
from aelastic._evidence import Evidence
from aelastic._logs import LogsDest, plan
from aelastic._run import Run
from aelastic._spec import check, worker_environments

LAG = 0.1
"""Seconds that a worker takes to obey SIGTERM."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while anything is to be done, and then jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        loop = cast("Any", self)
        while loop._scheduled and loop._scheduled[0]._cancelled:
            loop._timer_cancelled_count -= 1
            heapq.heappop(loop._scheduled)._scheduled = False
        if not loop._ready:
            if not loop._scheduled:
                raise RuntimeError("everybody waits for something that nobody will do")
            self.now = max(self.now, loop._scheduled[0]._when)
        loop.__class__.__mro__[1]._run_once(self)

    @property
    def now_ns(self) -> int:
        return int(self.now * 1e9)


class Inline(Executor):
    """Does each job at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class FakeProcess:
    """One process; it ends when the test, or a signal, says so."""

    def __init__(self, world: World, rank: int, pid: int) -> None:
        self.world, self.rank, self.pid, self.pidfd, self.held_ticks = world, rank, pid, None, 0
        self.started_ns, self.exit_ns = world.loop.now_ns, 0
        self.exited: asyncio.Future[ExitStatus] = world.loop.create_future()
        self.usage = ExitUsage()
        self.deaf = world.deaf
        self.immortal = False
        self.cgroup = ""
        self.left = False
        """Whether something that it left behind is alive."""

    @property
    def alive(self) -> bool:
        return not self.exited.done() or self.left

    def end(self, returncode: int) -> None:
        """Exit; after the run nobody looks any more, as at a handle that was closed."""
        if not self.exited.done() and not self.world.run.finished.done():
            self.exit_ns = self.world.loop.now_ns
            self.exited.set_result(ExitStatus.from_returncode(returncode))

    def take(self, sig: int) -> None:
        """Get a signal, with all that it left behind."""
        if self.immortal or (self.deaf and sig != signal.SIGKILL):
            return
        self.left = False
        if sig == signal.SIGKILL:
            self.end(-sig)
        else:
            self.world.loop.call_later(LAG, self.end, -sig)

    async def confirmed(self) -> None:
        await asyncio.sleep(0)

    def has_ended(self) -> bool:
        return self.exited.done()

    def signal_group(self, sig: int) -> bool:
        self.take(sig)
        return self.alive

    async def reaped(self, within: float) -> None:
        pass

    def close(self) -> None:
        pass


class FakeTree:
    """The trees of fake processes."""

    def __init__(self, world: World) -> None:
        self.world = world

    def add(self, rank: int, process: Any) -> None:
        pass

    async def is_gone(self, rank: int) -> bool:
        await asyncio.sleep(0)
        return not self.world.living(rank)

    async def press(self, rank: int, sig: int, until: float, *, hurry: asyncio.Future[None], on_hit: Any) -> bool:
        for process in self.world.living(rank):
            on_hit((process.pid,), sig)
            process.take(sig)
        while (alive := self.world.living(rank)) and (left := until - self.world.loop.now) > 0 and not hurry.done():
            facts: set[asyncio.Future[Any]] = {each.exited for each in alive if not each.exited.done()} | {hurry}
            await asyncio.wait(facts, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return not self.world.living(rank)

    async def survivors(self, rank: int) -> tuple[Survivor, ...]:
        return tuple(Survivor(rank, each.pid, "[fake]", "D", "it is immortal") for each in self.world.living(rank))

    async def holders(self, rank: int, inodes: Any) -> tuple[int, ...]:
        return ()


class FakeOutputs:
    """Streams that nobody writes to."""

    lost_bytes = 0

    def __init__(self) -> None:
        self.pieces: dict[str, tuple[str, ...]] = {}

    @classmethod
    async def open(cls, plans: Any, **_: Any) -> FakeOutputs:
        return cls()

    async def child_fds(self, rank: int) -> tuple[int, int]:
        await asyncio.sleep(0)
        return 1, 2

    async def opened(self) -> None:
        pass

    def started(self, rank: int) -> None:
        pass

    def release(self) -> None:
        pass

    async def at_eof(self, rank: int, within: float, hurry: Any) -> bool:
        return True

    async def finish(self, rank: int, within: float) -> bool:
        return True

    def tail(self, rank: int, std: Any) -> tuple[str, ...]:
        return ()

    def files(self, rank: int) -> tuple[str, str]:
        return "", ""

    async def close(self) -> None:
        await asyncio.sleep(0)


class World:
    """One run of fakes, and what was seen of it."""

    def __init__(self, nprocs: int, restart: RestartPolicy, stop: StopPolicy) -> None:
        self.loop = VirtualLoop()
        self.processes: list[FakeProcess] = []
        self.events: list[tuple[float, Event]] = []
        self.closed_at: float | None = None
        """When its caller stopped it."""
        self.refused: set[int] = set()
        """Ranks whose next start fails."""
        self.deaf = False
        """Whether what is started next ignores SIGTERM."""
        self.spawn_seconds = 0.0
        self.settle_seconds = 0.0
        self.on_start: Callable[[FakeProcess], object] = lambda _: None
        self.wrong: list[str] = []
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(gang_module, "launch", self._launch)
        self._patch.setattr(gang_module, "Outputs", FakeOutputs)
        self._patch.setattr(gang_module, "count_oom_kills", lambda: None)
        self._patch.setattr(gang_module, "resolve", lambda *_, **__: "true")
        self._patch.setattr(worker_module, "read_evidence", lambda *_: Evidence())
        self._patch.setattr(worker_module, "time", SimpleNamespace(monotonic_ns=lambda: self.loop.now_ns))
        self.run = self.do(self._make(nprocs, restart, stop))

    async def _make(self, nprocs: int, restart: RestartPolicy, stop: StopPolicy) -> Run:
        spec = check(
            "fake", "true", dict.fromkeys(range(nprocs), ()), None, None, "spawn",
            duplicate_stdout_filters=None, duplicate_stderr_filters=None, options=None, stop=stop, restart=restart,
        )  # fmt: skip
        run = Run(spec, None, journal=False)

        async def settle(attempt: int) -> Terms:
            await asyncio.sleep(self.settle_seconds)
            envs, dest = worker_environments(spec, {}, run.run_id, attempt), LogsDest()
            return Terms(attempt=attempt, envs=envs, dest=dest, plans=plan(dest, nprocs, {}))

        async def make(_stack: Any) -> Any:
            return await run._see_through(await settle(0), machines)

        inline, ignore = Inline(), SimpleNamespace(worker=lambda *_: None, flush=lambda: None)
        ward = SimpleNamespace(meter=SimpleNamespace(at_exit=lambda _pid, seen: seen))
        machines = cast(
            "Machines",
            SimpleNamespace(
                bus=run.bus, tree=FakeTree(self), threads=inline, disks=inline, hub=None, console=None, watch=ignore,
                ward=ward, cgroups=None, server=None, starts=asyncio.Lock(),
            ),
        )  # fmt: skip
        run.bus.journal = lambda event: self.events.append((self.loop.now, event))
        cast("Any", run)._settle, cast("Any", run)._make = settle, make
        run.begin()
        return run

    async def _launch(self, command: Any) -> FakeProcess:
        rank = command.rank
        if self.closed_at is not None:
            self.wrong.append(f"rank {rank} was started after the close")
        await asyncio.sleep(self.spawn_seconds)
        if rank in self.refused:
            self.refused.discard(rank)
            raise FileNotFoundError(2, f"{command.who} can't be started")
        if self.living(rank):
            self.wrong.append(f"rank {rank} was started beside {self.living(rank)[0].pid}")
        process = FakeProcess(self, rank, 100 + len(self.processes))
        self.processes.append(process)
        self.on_start(process)
        return process

    def living(self, rank: int | None = None) -> list[FakeProcess]:
        """The processes that are alive, of one rank or of all."""
        return [each for each in self.processes if each.alive and rank in (None, each.rank)]

    def do(self, what: Any) -> Any:
        """Let the loop run until this is done."""
        return self.loop.run_until_complete(what)

    def wait(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.do(asyncio.sleep(seconds))

    def seen(self, kind: type[Event]) -> list[tuple[float, Any]]:
        """The events of one kind, each with its time."""
        return [(at, event) for at, event in self.events if isinstance(event, kind)]

    def close(self, steps: Any = None) -> None:
        """Stop the run as a context would."""
        if self.closed_at is None and not self.run.finished.done():
            self.closed_at = self.loop.now
        self.run.stop(steps, "its context was closed")

    def end(self) -> None:
        """Wait for the run's end, and take the world down."""
        try:
            self.do(asyncio.wait({self.run.finished}))
            self.run.started.exception()  # a start that was stopped is nobody's here
        finally:
            self._patch.undo()
            self.loop.close()
