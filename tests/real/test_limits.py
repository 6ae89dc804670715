"""When something runs out, the error says what, how much there is and how much is needed; nothing is half open."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    DefaultLogsSpecs,
    PContext,
    Std,
    StopPolicy,
    Survivor,
    WorkerExited,
    WorkerOptions,
    WorkerUnkillable,
    start_processes,
)
from aelastic._child import forked
from aelastic._process import census, launch, tree
from tests.real import children
from tests.real.runs import QUICK, all_events, capture, ready, start
from tests.real.zookeeper import METHODS, Method, Zoo, be
from tests.ways_to_die import RUNS_ON
from tests.zoo import OWN_SESSION

RANKS = 3
PIDS = Path("/sys/fs/cgroup/pids")
LOGS = DefaultLogsSpecs(os.devnull, capture=Std.ALL)
"""Pipes, and no file."""


def launched(method: Method, zoo: Zoo) -> Any:
    """Some ranks that SIGTERM doesn't end, and neither do their groups."""
    command = method == "command"
    return start_processes(
        "job",
        OWN_SESSION.argv[0] if command else be,
        dict.fromkeys(range(RANKS), OWN_SESSION.argv[1:] if command else (OWN_SESSION.source,)),
        {rank: {"ZOO_PIPE": str(zoo.pipe)} for rank in range(RANKS)},
        LOGS,
        start_method="spawn" if method == "command" else method,
        options=WorkerOptions(pass_fds=(zoo.pipe,)),
        stop=QUICK,
    )


async def tried(method: Method) -> OSError | None:
    """Start and kill; the error of the start, if there was one. Nothing is left either way."""
    zoo = Zoo()
    try:
        ctx: PContext = await launched(method, zoo)
        await ctx.close(9)
    except OSError as error:
        return error
    else:
        return None
    finally:
        zoo.handed_over()
        assert zoo.is_gone()
        zoo.close()


@contextmanager
def descriptors(free: int) -> Iterator[None]:
    """Lower the soft limit to so many more than are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    fillers = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    while fillers[-1] < max(used):  # the kernel gives the lowest free number
        fillers.append(os.dup(fillers[0]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in fillers:
            os.close(fd)


@pytest.mark.parametrize("method", METHODS)
async def test_a_start_that_runs_out_of_descriptors_anywhere_leaves_nothing(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the guard, at any rank; the error is typed and says it all, and the next start works."""
    monkeypatch.setattr("aelastic._run.check_limits", lambda *_: 0)  # as if the host took them meanwhile
    assert await tried(method) is None  # what the loop opens once is open
    errors: list[OSError] = []
    for free in range(12, 64, 3 if method == "command" else 5):
        with descriptors(free):
            error = await tried(method)
        if error is None:
            break
        errors.append(error)
    assert len(errors) >= 2
    for error in errors:
        assert error.errno == errno.EMFILE
        assert "no descriptor is left: this process may have" in str(error)
    assert await tried(method) is None


async def test_a_stop_finds_everybody_although_the_host_has_no_descriptor_left() -> None:
    """What it needs to look for them was kept."""
    zoo = Zoo()
    try:
        ctx: PContext = await launched("command", zoo)
        zoo.handed_over()
        await asyncio.to_thread(zoo.stands, RANKS * OWN_SESSION.lines)
        with descriptors(0):
            await ctx.close()
        assert zoo.is_gone()
        assert ctx.result is not None
        assert (ctx.result.outcome, ctx.result.survivors) == ("stopped", ())
    finally:
        zoo.close()


async def test_who_could_not_be_looked_for_is_not_said_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blindness is a survivor, not a success."""
    monkeypatch.setattr(tree, "KILL_GRACE", 0.2)
    ctx = await start(RUNS_ON, logs_specs=capture())
    await ready(ctx)
    with monkeypatch.context() as patch:
        patch.setattr(census.Census, "look", blind)
        await ctx.close(9, timeout=0.1)
    assert ctx.result is not None
    (survivor,) = ctx.result.survivors
    assert "/proc could not be read" in survivor.why
    assert ctx.result.outcome == "failed"


def blind(*_: object) -> None:
    raise census.Blind("as if all descriptors were taken")


def failing(times: int, error: OSError, what: Callable[..., Any]) -> Callable[..., Any]:
    """The same, until it has been called so often."""
    calls = iter(range(times))

    def fail(*args: Any, **settings: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return what(*args, **settings)

    return fail


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENFILE, errno.EAGAIN])
@pytest.mark.parametrize("method", ["command", "spawn", "fork"])
async def test_any_rank_may_be_the_one_that_the_kernel_refuses(
    method: Method, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names it and what ran out; those before it are gone."""
    what = {errno.ENOMEM: "no memory left", errno.ENFILE: "fs.file-max", errno.EAGAIN: "RLIMIT_NPROC"}[number]
    home, name = (forked, "begin") if method == "fork" else (launch_module(), "start_collected")
    for rank in range(RANKS) if method == "command" else [1]:
        with monkeypatch.context() as patch:
            patch.setattr(home, name, failing(rank, OSError(number, os.strerror(number)), getattr(home, name)))
            error = await tried(method)
        assert error is not None
        assert type(error) is type(OSError(number, ""))
        assert f"job rank {rank} can't be started: " in str(error)
        assert what in str(error)


def launch_module() -> Any:
    return sys.modules[launch.__module__]


CROWDED = """
import asyncio, json, os, sys
from pathlib import Path
from tests.real.test_limits import tried
cgroup, method = Path(sys.argv[1]), sys.argv[2]
async def main():
    told = []
    assert await tried(method) is None
    for room in range(1, 40, 2):
        (cgroup / "pids.max").write_text(str(int((cgroup / "pids.current").read_text()) + room))
        error = await tried(method)
        (cgroup / "pids.max").write_text("max")
        if error is None:
            break
        told.append([error.errno, str(error)])
    assert await tried(method) is None
    return told
(cgroup / "cgroup.procs").write_text("0")
if "uvloop" in sys.argv[3]:
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture
def crowd() -> Iterator[Path]:
    """A cgroup that may be told how many tasks it has room for."""
    folder = PIDS / f"crowd-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of pids to make a shortage with: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.parametrize("method", ["command", "forkserver", "fork"])
def test_a_start_that_runs_out_of_processes_or_threads_anywhere_leaves_nothing(method: Method, crowd: Path) -> None:
    """At a thread of ours, at the guard, at any rank; the host goes on."""
    loop = "uvloop" if method == "forkserver" else "asyncio"
    run = subprocess.run(
        [sys.executable, "-c", CROWDED, str(crowd), method, loop],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what workers say that could not fork
        check=True,
    )
    told: Sequence[tuple[int, str]] = json.loads(run.stdout)
    assert len(told) >= 2
    for number, text in told:
        assert number == errno.EAGAIN
        assert "no process or thread can be added: this user may have" in text


async def test_the_exit_of_a_worker_that_was_reported_unkillable_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is told once, although it obeys in the moment in which it is given up."""
    monkeypatch.setattr(tree, "KILL_GRACE", 0.1)
    survivors = tree.Tree.survivors

    async def seen_and_let_go(self: tree.Tree, rank: int) -> tuple[Survivor, ...]:
        seen = await survivors(self, rank)
        children.thaw(pid)
        return seen

    stop = StopPolicy(steps=((signal.SIGKILL, 0.1),), drain=5.0)
    ctx = await start(RUNS_ON, logs_specs=capture(), stop=stop)
    await ready(ctx)
    pid = ctx.pids()[0]
    monkeypatch.setattr(tree.Tree, "survivors", seen_and_let_go)
    with children.frozen(pid):
        await ctx.close()
    ends = [event for event in await all_events(ctx) if isinstance(event, (WorkerExited, WorkerUnkillable))]
    assert [type(event) for event in ends] == [WorkerUnkillable]


async def test_an_unkillable_worker_is_reported_in_time_with_state_and_wait_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is a survivor and a failure; the others are gone."""
    monkeypatch.setattr(tree, "KILL_GRACE", 0.3)
    stop = StopPolicy(steps=((signal.SIGTERM, 0.1), (signal.SIGKILL, 0.3)), drain=0.1)
    ctx = await start({0: RUNS_ON, 1: RUNS_ON}, logs_specs=capture(), stop=stop)
    await ready(ctx)
    with children.frozen(ctx.pids()[1]):
        async with asyncio.timeout(10):
            await ctx.close()
    assert ctx.result is not None
    (survivor,) = ctx.result.survivors
    (told,) = [event for event in await all_events(ctx) if isinstance(event, WorkerUnkillable)]
    assert (survivor.rank, told.rank, told.state) == (1, 1, survivor.state)
    assert survivor.state.startswith("D (disk sleep) in ")
    assert (ctx.result.outcome, ctx.result.failures[1].reason) == ("failed", "unkillable")
    assert ctx.result.exits[0].signal == signal.SIGTERM


def test_room_for_descriptors_is_made_at_once_and_nothing_stays_open() -> None:
    """The kernel's table grows in a thread, before the loop opens what fills it."""
    program = (
        "import os\n"
        "from aelastic._limits import make_room\n"
        "def size(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'FDSize' in line)\n"
        "before, opened = size(), os.listdir('/proc/self/fd')\n"
        "make_room(600)\n"
        "assert before < 600 <= size(), (before, size())\n"
        "make_room(10**9)\n"  # more than the limit allows: the check before the start says that, not this
        "assert os.listdir('/proc/self/fd') == opened\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
