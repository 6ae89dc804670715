"""With a cgroup for each worker nothing gets away, whatever it makes of session, parents and environment."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aelastic import DefaultLogsSpecs, PContext, RunStarted, Std, StopPolicy, WorkerExited, start_processes
from aelastic._evidence import build_failure, read_evidence
from aelastic._exit import ExitStatus
from aelastic._process import cgroups, platform
from aelastic._returned import NO_RESULT
from tests.real.jobs import evaluate
from tests.real.runs import all_events, capture, ready, start
from tests.real.zookeeper import GRACE, METHODS, Method, Zoo
from tests.real.zookeeper import start as start_zoo
from tests.ways_to_die import EXIT_0, RUNS_ON, Way, python
from tests.zoo import PRELUDE

pytestmark = pytest.mark.one_loop

POLICY = StopPolicy(steps=((signal.SIGTERM, 0.2), (signal.SIGKILL, 10.0)), drain=0.1, containment="cgroup")
HIDDEN = (
    "import os, signal, sys, time\n"
    "args = [sys.executable, '-I', '-S', '-c', 'import os, signal, time; signal.signal(15, signal.SIG_IGN);"
    ' os.write(1, b"ready\\\\n"); time.sleep(600)\']\n'
    "os.fork() or (os.setsid(), os.fork() or os.execve(args[0], args, {}), os._exit(0))\n"
    "os.wait()\n"
)
"""Session, environment and parents of its own: nothing but a cgroup tells whose it is."""
HIDES = Way("hides a process", python(HIDDEN + "time.sleep(600)"))


def can_have_cgroups() -> bool:
    tried = cgroups.Cgroups(cgroups.own_folder() or "/nowhere", "tests", asked=True)
    with suppress(OSError):
        tried.open("tests")
        tried.close()
        return True
    return False


needs_cgroups = pytest.mark.skipif(not can_have_cgroups(), reason="needs a cgroup of version 2 that we may divide")


def folders() -> list[Path]:
    """What is left of the cgroups of any run of ours."""
    return list(Path(cgroups.own_folder()).glob("aelastic-*"))


async def level(ctx: PContext) -> str:
    return next(event.containment for event in await all_events(ctx) if isinstance(event, RunStarted))


@needs_cgroups
@pytest.mark.parametrize("method", METHODS)
async def test_every_worker_is_in_a_cgroup_of_its_own_from_its_first_instruction(
    method: Method, tmp_path: Path
) -> None:
    """It is below ours, and gone with the run."""
    show = "value = open('/proc/self/cgroup').read()"
    command = method == "command"
    async with start_processes(
        "contained",
        "cat" if command else evaluate,
        dict.fromkeys(range(2), ("/proc/self/cgroup",) if command else (show,)),
        start_method="spawn" if method == "command" else method,
        stop=POLICY,
        logs_specs=DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL),
    ) as ctx:
        result = await ctx.wait()
    assert await level(ctx) == "cgroup"
    for rank in range(2):
        seen = Path(result.stdouts[rank]).read_text() if command else result.return_values[rank]
        assert f"/aelastic-{ctx.run_id}/{rank}\n" in seen
    assert folders() == []


@needs_cgroups
async def test_what_hides_from_everything_else_is_ended_with_its_rank() -> None:
    """A process that left session, environment and parents."""
    async with start({0: HIDES, 1: RUNS_ON}, stop=POLICY, logs_specs=capture()) as ctx:
        await ready(ctx)
        here = Path(cgroups.own_folder(), f"aelastic-{ctx.run_id}", "0", "cgroup.procs")
        hidden = [int(pid) for pid in here.read_text().split() if int(pid) not in ctx.pids().values()]
        assert len(hidden) == 1
        held = os.pidfd_open(hidden[0])
        await ctx.close()
        ended = platform.has_ended(held)
        os.close(held)
    assert ended
    assert ctx.result is not None
    assert ctx.result.survivors == ()
    assert folders() == []


@needs_cgroups
async def test_a_cgroup_is_removed_with_its_rank() -> None:
    """While others run on."""
    policy = StopPolicy(steps=POLICY.steps, on_failure="continue", containment="cgroup")
    async with start({0: EXIT_0, 1: RUNS_ON}, stop=policy, logs_specs=capture()) as ctx:
        await ready(ctx)
        run = Path(cgroups.own_folder(), f"aelastic-{ctx.run_id}")
        async with asyncio.timeout(20):
            while (run / "0").exists():
                await asyncio.sleep(0.005)
        assert (run / "1").exists()
    assert folders() == []


@needs_cgroups
async def test_the_whole_zoo_ends_in_cgroups() -> None:
    """As it does in sessions."""
    zoo = Zoo()
    try:
        ctx = await start_zoo("command", zoo.pipe, zoo.gate, containment="cgroup")
        zoo.handed_over()
        await asyncio.to_thread(zoo.stands)
        zoo.let_leave()
        await ctx.close()
        assert zoo.is_gone()
    finally:
        zoo.close()
    assert folders() == []


@needs_cgroups
@pytest.mark.parametrize("policy", ["stop", "kill"])
def test_the_guard_ends_and_removes_the_cgroups_of_a_killed_supervisor(policy: str) -> None:
    """The hidden process with them."""
    reading, writing = os.pipe()
    program = (
        "import asyncio, os, sys\n"
        "from aelastic import StopPolicy, start_processes\n"
        "async def main():\n"
        "    policy, grace, *argv = sys.argv[1:]\n"
        "    stop = StopPolicy(containment='cgroup', on_supervisor_death=policy, orphan_grace=float(grace))\n"
        "    await start_processes('hidden', argv[0], {0: tuple(argv[1:])}, stop=stop)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    words = (policy, str(GRACE if policy == "stop" else 60), *HIDES.argv)
    supervisor = subprocess.Popen([sys.executable, "-c", program, *words], stdout=writing, cwd=root())
    os.close(writing)
    with open(reading, "rb") as output:
        assert output.readline() == b"ready\n"
        supervisor.kill()
        supervisor.wait()
        assert output.read() == b""  # its end: nobody holds it any more
    deadline = time.monotonic() + 20
    while folders():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def root() -> Path:
    return Path(__file__).parents[2]


SHOW_LEVEL = """
import asyncio, json
from aelastic import RunStarted, start_processes
async def main():
    async with start_processes("level", "true", {0: ()}) as ctx:
        await ctx.wait()
    return [event.containment async for event in ctx.events() if isinstance(event, RunStarted)]
print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup that says that it was delegated."""
    folder = Path(cgroups.own_folder(), f"delegated-{os.getpid()}")
    folder.mkdir()
    try:
        os.setxattr(folder, "user.delegate", b"1")
        yield folder
    finally:
        folder.rmdir()


def auto_level(folder: Path, **env: str) -> Any:
    """The level that a supervisor in this cgroup takes by itself."""
    enter = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(folder)]
    run = subprocess.run(
        [*enter, sys.executable, "-c", SHOW_LEVEL], cwd=root(), env=os.environ | env, check=True, capture_output=True
    )
    return json.loads(run.stdout)


@needs_cgroups
def test_auto_takes_cgroups_where_ours_is_delegated(delegated: Path) -> None:
    """By the attribute that systemd sets for Delegate=yes."""
    assert auto_level(delegated) == ["cgroup"]
    assert [path.name for path in delegated.iterdir() if path.is_dir()] == []


@needs_cgroups
def test_auto_keeps_to_the_session_where_nobody_delegated(delegated: Path) -> None:
    """Being able to is not being asked to: it would slow every start."""
    os.removexattr(delegated, "user.delegate")
    assert auto_level(delegated) == ["session"]


@needs_cgroups
async def test_auto_keeps_to_the_session_where_no_process_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cgroup whose controllers forbid it."""
    monkeypatch.setattr(cgroups, "is_delegated", lambda folder: True)
    monkeypatch.setattr(cgroups.Cgroups, "_try_to_move", refuse)
    async with start(EXIT_0) as ctx:
        await ctx.wait()
    assert await level(ctx) == "session"
    assert folders() == []


def refuse(_cgroups: cgroups.Cgroups) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


@needs_cgroups
async def test_cgroups_that_cannot_be_are_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is missing and what to do."""
    monkeypatch.setattr(cgroups.Cgroups, "_try_to_move", refuse)
    with pytest.raises(OSError, match=r"test can't be started: .* none can be made: .*Delegate=yes") as raised:
        await start(EXIT_0, stop=POLICY)
    assert raised.value.errno == errno.EBUSY
    assert folders() == []


async def test_a_host_without_cgroups_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of version 2 is mounted."""
    monkeypatch.setattr(cgroups, "own_folder", lambda: "")
    with pytest.raises(OSError, match=r"none of version 2 is mounted here.*containment='session'") as raised:
        await start(EXIT_0, stop=POLICY)
    assert raised.value.errno == errno.ENOTSUP


@needs_cgroups
async def test_a_cgroup_that_cannot_be_entered_is_that_ranks_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others are gone before it arrives."""
    make = cgroups.Cgroups.make

    def make_one(self: cgroups.Cgroups, rank: int) -> str:
        return make(self, rank) if rank == 0 else f"{make(self, rank)}/nowhere"

    monkeypatch.setattr(cgroups.Cgroups, "make", make_one)
    with pytest.raises(FileNotFoundError, match="test rank 1 can't be started: its cgroup can't be entered"):
        await start({0: RUNS_ON, 1: RUNS_ON}, stop=POLICY)
    assert folders() == []


@needs_cgroups
async def test_the_usage_of_a_worker_is_that_of_all_it_started() -> None:
    """Its children's CPU counts."""
    burn = "while time.process_time() < 0.15: pass"
    way = Way("burns", python(f"{PRELUDE}\nif os.fork():\n    os.wait()\nelse:\n    {burn}"), code=0)
    async with start(way, stop=POLICY) as ctx:
        await ctx.wait()
    (exited,) = [event for event in await all_events(ctx) if isinstance(event, WorkerExited)]
    assert exited.usage.cpu_seconds is not None
    assert 0.14 < exited.usage.cpu_seconds < 5


def test_a_kill_for_lack_of_memory_is_told_by_the_workers_own_cgroup(tmp_path: Path) -> None:
    """Also where the machine's counter says nothing."""
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    failure = build_failure(
        rank=0,
        pid=1,
        status=ExitStatus(None, signal.SIGKILL),
        returned=NO_RESULT,
        evidence=read_evidence("", cgroup=str(tmp_path)),
        started_ns=0,
        exit_ns=1,
    )
    assert failure.reason == "out_of_memory"
    assert "its cgroup" in failure.message
