"""What is left when the supervisor itself is killed: nothing (DESIGN 4.1, issue 5).

The supervisors here are processes of their own. Their workers hold our pipe as stdout, so that its end tells that the
last one is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aelastic import DefaultLogsSpecs, GuardLost, StopPolicy, start_processes
from aelastic._child import procfs
from aelastic._guard import Watch, watch
from tests.zoo import DEAF_CHILD, OBEDIENT, OWN_SESSION, TREES, Tree

NET = 20.0
"""Seconds after which a test is taken to hang."""
GRACE = 0.4
BOUND = 1.0
"""What DESIGN allows on top of the grace."""
GUARD = str(Path(procfs.__file__).with_name("guard.py"))

SUPERVISOR = """
import asyncio, json, os, signal, sys
from aelastic import DefaultLogsSpecs, Std, StopPolicy, start_processes
told = json.loads(sys.argv[1])
async def main():
    async with start_processes(
        "zoo", told["argv"][0], {rank: tuple(told["argv"][1:]) for rank in range(told["ranks"])},
        stop=StopPolicy(**told["stop"]), logs_specs=DefaultLogsSpecs(told["logs"]) if told["logs"] else None,
    ) as ctx:
        exec(told["then"])
        await asyncio.Event().wait()
if told["loop"] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
"""A supervisor that says on stderr what it is asked to, then waits to be killed."""


@dataclass
class Supervisor:
    """A supervisor in a process of its own, with the pipe that its workers hold."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader

    async def said(self, line: str, times: int = 1) -> None:
        """Wait until that line has come that often."""
        while times:
            said = await self.reader.readline()
            if not said:
                raise EOFError(f"nothing of the run is left, and {line!r} was not said {times} times")
            times -= said.decode().strip() == line

    async def gone(self) -> float:
        """Kill it; seconds until nothing of its run was left."""
        began = time.monotonic()
        self.process.kill()
        await self.process.wait()
        await self.reader.read()
        return time.monotonic() - began


@asynccontextmanager
async def supervisor(
    argv: tuple[str, ...], *, ranks: int = 1, stop: dict[str, Any] | None = None, logs: str = "", then: str = ""
) -> AsyncIterator[Supervisor]:
    reading, writing = os.pipe()
    loop = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
    stop = {"orphan_grace": GRACE} | (stop or {})
    told = {"argv": argv, "ranks": ranks, "stop": stop, "logs": logs, "then": then, "loop": loop}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR, json.dumps(told), stdout=writing, cwd=Path(__file__).parents[2]
    )
    os.close(writing)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
    )
    try:
        async with asyncio.timeout(NET):
            yield Supervisor(process, reader)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        transport.close()
        await guards_gone(process.pid)


def guards() -> dict[int, int]:
    """Guards of this machine: pid, and the supervisor that each watches."""
    found = {}
    for pid in procfs.pids():
        words = procfs.command_of(pid).split(" ")
        if GUARD in words[:4]:
            found[pid] = int(words[words.index(GUARD) + 1])
    return found


def guard_of(supervisor_pid: int) -> int:
    """The guard of a supervisor."""
    (found,) = [guard for guard, watched in guards().items() if watched == supervisor_pid]
    return found


async def guards_gone(supervisor_pid: int) -> None:
    while supervisor_pid in guards().values():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("tree", TREES, ids=str)
async def test_nothing_outlives_a_killed_supervisor(tree: Tree) -> None:
    """Within the grace and a second, whatever the tree looks like."""
    ranks = 1 if tree.leaves else 2  # one that ends would take the other with it
    async with supervisor(tree.argv, ranks=ranks) as zoo:
        await zoo.said("alive", ranks * tree.lines)
        assert await zoo.gone() < GRACE + BOUND


@pytest.mark.parametrize("tree", TREES, ids=str)
async def test_kill_asks_nobody(tree: Tree) -> None:
    """With `on_supervisor_death="kill"` there is no grace."""
    async with supervisor(tree.argv, stop={"on_supervisor_death": "kill", "orphan_grace": 30.0}) as zoo:
        await zoo.said("alive", tree.lines)
        assert await zoo.gone() < BOUND


async def test_those_who_obey_are_gone_long_before_the_grace_is_over() -> None:
    """The first step's signal asks; SIGKILL is for those who don't listen."""
    async with supervisor(OBEDIENT.argv, stop={"orphan_grace": 30.0}) as zoo:
        await zoo.said("alive", OBEDIENT.lines)
        assert await zoo.gone() < BOUND


async def test_the_first_steps_signal_asks() -> None:
    """It is SIGINT where the policy says so."""
    source = (
        "import signal, os, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (os.write(1, b'asked\\n'), os._exit(0)))\n"
        "os.write(1, b'alive\\n'); time.sleep(600)"
    )
    steps = [[int(signal.SIGINT), 5.0], [int(signal.SIGKILL), 5.0]]
    argv = (sys.executable, "-I", "-S", "-c", source)
    async with supervisor(argv, stop={"steps": steps, "orphan_grace": 30.0}) as zoo:
        await zoo.said("alive")
        zoo.process.kill()
        await zoo.said("asked")


async def test_a_nested_run_goes_with_the_outer_one() -> None:
    """A worker that uses the library itself leaves nothing either, its own guard included."""
    inner = {"argv": DEAF_CHILD.argv, "ranks": 2, "stop": {}, "logs": "", "then": "", "loop": "asyncio"}
    argv = (sys.executable, "-c", SUPERVISOR, json.dumps(inner))
    before = guards()
    async with supervisor(argv, stop={"orphan_grace": 1.5}) as zoo:
        await zoo.said("alive", 4)
        assert len(guards().keys() - before.keys()) == 2
        assert await zoo.gone() < 1.5 + BOUND
        while guards().keys() - before.keys():
            await asyncio.sleep(0.005)


async def test_a_nested_supervisor_that_is_killed_leaves_nothing() -> None:
    """Its own guard acts although the outer run goes on."""
    inner = {"argv": OWN_SESSION.argv, "ranks": 1, "stop": {"orphan_grace": GRACE}, "logs": "", "then": ""}
    argv = (sys.executable, "-c", SUPERVISOR, json.dumps(inner | {"loop": "asyncio"}))
    async with supervisor(argv, then="exec('async def over(): await ctx.wait(); os._exit(0)'); await over()") as zoo:
        await zoo.said("alive", 2)
        (worker,) = [pid for pid in procfs.pids() if parent_of(pid) == zoo.process.pid and pid not in guards()]
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        await zoo.reader.read()
        assert time.monotonic() - began < GRACE + BOUND + 1.0


def parent_of(pid: int) -> int:
    member = procfs.read_member(pid, lineage=False)
    return 0 if member is None else member.parent


async def test_keep_leaves_the_workers_alone() -> None:
    """With `on_supervisor_death="keep"` they go on."""
    source = "import os, sys; os.write(1, b'alive\\n'); sys.stdin.read(); os.write(1, b'went on\\n')"
    fifo_end, hold = os.pipe()
    argv = (sys.executable, "-I", "-S", "-c", source)
    async with supervisor(("sh", "-c", 'exec "$@" <"$0"', f"/proc/{os.getpid()}/fd/{fifo_end}", *argv)) as zoo:
        await zoo.said("alive")
        zoo.process.terminate()
        await zoo.process.wait()
    async with supervisor(
        ("sh", "-c", 'exec "$@" <"$0"', f"/proc/{os.getpid()}/fd/{fifo_end}", *argv),
        stop={"on_supervisor_death": "keep"},
    ) as zoo:
        await zoo.said("alive")
        zoo.process.kill()
        await zoo.process.wait()
        await guards_gone(zoo.process.pid)
        os.close(hold)
        os.close(fifo_end)
        await zoo.said("went on")
        await zoo.reader.read()


async def test_a_host_that_forked_is_seen_to_die() -> None:
    """Its child holds a copy of everything, the lifeline included: the pidfd tells."""
    then = "os.fork() or (os.close(1), os.write(2, b''), signal.pause())"
    async with supervisor(OWN_SESSION.argv, then=then) as zoo:
        await zoo.said("alive", OWN_SESSION.lines)
        try:
            assert await zoo.gone() < GRACE + BOUND
        finally:
            forked = [pid for pid in procfs.pids() if SUPERVISOR[:40] in procfs.command_of(pid)]
            for pid in forked:
                os.kill(pid, signal.SIGKILL)


async def test_a_host_that_becomes_another_program_counts_as_dead() -> None:
    """Its pid lives on: the end of the lifeline tells."""
    then = "os.execv('/bin/sh', ['sh', '-c', 'exec sleep 600 >&2'])"
    async with supervisor(OWN_SESSION.argv, then=then) as zoo:
        await zoo.said("alive", OWN_SESSION.lines)
        await zoo.reader.read()


async def test_the_journal_tells_what_the_guard_did(tmp_path: Path) -> None:
    """Who was sent which signal, in lines shaped like the events before them."""
    source = DEAF_CHILD.source.replace('os.write(1, b"alive\\n")', 'os.write(2, b"alive\\n")')
    async with supervisor((*DEAF_CHILD.argv[:-1], source), logs=str(tmp_path)) as zoo:
        errors = await log_lines(tmp_path, "stderr.log", 0)
        del errors
        journal = await found(tmp_path, "events.jsonl")
        while journal.read_text().count("WorkerStarted") < 1:
            await asyncio.sleep(0.005)
        await zoo.gone()
        await guards_gone(zoo.process.pid)
    told = [json.loads(line) for line in journal.read_text().splitlines()]
    told = told[[each["event"] for each in told].index("SupervisorDied") :]
    assert told[0]["pid"] == zoo.process.pid
    assert told[-1]["event"] == "OrphansGone"
    assert {each["run_id"] for each in told} == {told[0]["run_id"]}
    signaled = [each for each in told if each["event"] == "WorkerSignaled"]
    assert {each["rank"] for each in signaled} == {0}
    assert signaled[0]["signal"] == signal.SIGTERM


async def found(root: Path, name: str) -> Path:
    """Wait until there is such a file below the directory."""
    while not (paths := list(root.rglob(name))):
        await asyncio.sleep(0.005)
    return paths[0]


async def log_lines(root: Path, name: str, count: int) -> list[str]:
    """Wait until a log has that many lines."""
    path = await found(root, name)
    while len(lines := path.read_text().splitlines()) < count:
        await asyncio.sleep(0.005)
    return lines


async def test_a_dead_guard_is_announced_and_replaced() -> None:
    """The next one is told everything again: it protects the workers of before."""
    async with start_processes("zoo", "sleep", {0: "600", 1: "600"}) as ctx:
        first = guard_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(NET):
            lost = await anext(event async for event in ctx.events() if isinstance(event, GuardLost))
            assert (lost.pid, lost.reason) == (first, "killed by SIGKILL")
            while set(guards().values()) != {os.getpid()} or guard_of(os.getpid()) == first:
                await asyncio.sleep(0.005)
    assert os.getpid() not in guards().values()


async def test_the_guard_that_replaced_a_dead_one_acts() -> None:
    """It knows the workers of before: they are found without any lineage."""
    then = "del os.environ['PATH']"
    argv = ("env", "-i", *OWN_SESSION.argv[:-1], DEAF_CHILD.source)
    async with supervisor(argv, then=then) as zoo:
        await zoo.said("alive", DEAF_CHILD.lines)
        first = guard_of(zoo.process.pid)
        os.kill(first, signal.SIGKILL)
        while zoo.process.pid not in guards().values() or guard_of(zoo.process.pid) == first:
            await asyncio.sleep(0.005)
        await booted(guard_of(zoo.process.pid))
        assert await zoo.gone() < GRACE + BOUND


async def booted(guard: int) -> None:
    """Wait until a guard has come to rest."""
    while not ("poll" in procfs.wait_channel(guard)):
        await asyncio.sleep(0.005)


async def test_the_guard_holds_nothing_and_is_hard_to_disturb() -> None:
    """Session of its own, no directory, no terminal, no output; SIGTERM, SIGINT and SIGHUP are ignored."""
    async with supervisor(OBEDIENT.argv) as zoo:
        await zoo.said("alive", OBEDIENT.lines)
        guard = guard_of(zoo.process.pid)
        await booted(guard)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guard, number)
        member = procfs.read_member(guard)
        assert member is not None and (member.session, member.group) == (guard, guard)
        assert os.readlink(f"/proc/{guard}/cwd") == "/"
        held = [os.readlink(f"/proc/{guard}/fd/{fd}") for fd in (0, 1, 2)]
        assert held == ["/dev/null"] * 3
        open_ones = [os.readlink(f"/proc/{guard}/fd/{fd}") for fd in os.listdir(f"/proc/{guard}/fd")]
        assert len([what for what in open_ones if what.startswith("pipe:")]) == 1  # its lifeline
        assert await zoo.gone() < GRACE + BOUND


async def test_the_guard_is_small_and_idle() -> None:
    """At most 12 MiB and 60 ms of CPU once, and nothing while it waits."""
    async with supervisor(OBEDIENT.argv, ranks=4) as zoo:
        await zoo.said("alive", 4 * OBEDIENT.lines)
        guard = guard_of(zoo.process.pid)
        await booted(guard)
        before = cpu_seconds(guard)
        await asyncio.sleep(0.3)  # the fact is that nothing happens
        status = procfs.read(f"/proc/{guard}/status").decode()
        (resident,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        assert resident <= 12 * 1024
        assert before <= 0.060
        assert cpu_seconds(guard) == before


def cpu_seconds(pid: int) -> float:
    return int(procfs.read(f"/proc/{pid}/schedstat").split()[0]) / 1e9


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


async def watched(run_id: str, executor: ThreadPoolExecutor, lost: list[str] | None = None) -> Watch:
    return await watch(
        run_id,
        stop=StopPolicy(),
        journal="",
        on_lost=lambda pid, reason: None if lost is None else lost.append(f"{pid} {reason}"),
        executor=executor,
    )


async def test_one_guard_for_all_runs_gone_with_the_last() -> None:
    """It is shared by the runs of a process, and left by none."""
    with threads() as executor:
        one = await watched("one", executor)
        guard = guard_of(os.getpid())
        two = await watched("two", executor)
        assert guard_of(os.getpid()) == guard
        await one.release()
        assert guard_of(os.getpid()) == guard
        await two.release()
        await two.release()
    assert os.getpid() not in guards().values()


async def test_runs_of_several_loops_in_several_threads_share_the_guard() -> None:
    """It belongs to no loop: the first loop may end before the second's run does."""
    both = asyncio.Event()
    here = asyncio.get_running_loop()
    with threads() as executor:
        mine = await watched("mine", executor)

        async def there() -> int:
            with threads() as others:
                lost: list[str] = []
                theirs = await watched("theirs", others, lost)
                here.call_soon_threadsafe(both.set)
                while not lost:
                    await asyncio.sleep(0.005)
                await theirs.release()
                return len(lost)

        async with asyncio.timeout(NET):
            thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
            await both.wait()
            os.kill(guard_of(os.getpid()), signal.SIGKILL)
            assert await thread == 1
        await mine.release()
    assert os.getpid() not in guards().values()


async def test_a_cancelled_watch_leaves_no_guard() -> None:
    """Whenever the cancellation comes."""
    with threads() as executor:
        for turns in range(4):
            task = asyncio.create_task(watched("cut", executor))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert os.getpid() not in guards().values()


async def test_a_forked_host_has_a_guard_of_its_own() -> None:
    """The child begins anew, and doesn't hold the parent's lifeline."""
    with threads() as executor:
        mine = await watched("mine", executor)
        pipe = {os.readlink(f"/proc/{guard_of(os.getpid())}/fd/{fd}") for fd in os.listdir(f"/proc/{guard_of(os.getpid())}/fd")}
        (lifeline,) = [what for what in pipe if what.startswith("pipe:")]
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) != writing and os.path.lexists(f"/proc/self/fd/{fd}")]
            os.write(writing, b"holds it" if lifeline in held else b"free")
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        assert os.read(reading, 100) == b"free"
        os.close(reading)
        await mine.release()


async def test_a_stopped_guard_is_replaced_when_it_reads_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling never waits: what the pipe can't take is kept, and a guard that takes nothing is replaced."""
    monkeypatch.setattr("aelastic._guard.BACKLOG_BYTES", 4096)
    with threads() as executor:
        lost: list[str] = []
        mine = await watched("mine", executor, lost)
        os.kill(guard_of(os.getpid()), signal.SIGSTOP)
        async with asyncio.timeout(NET):
            while not lost:
                for _ in range(100):
                    mine.worker(0, os.getpid())
                await asyncio.sleep(0)
        await mine.release()
    assert os.getpid() not in guards().values()


async def test_a_pid_that_came_to_mean_another_is_not_hit() -> None:
    """A worker's number that was reused: the start time tells the stranger."""
    stranger = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
    started = procfs.started_ticks(stranger.pid)
    assert started is not None
    source = (
        "import asyncio, os, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from aelastic._guard import watch\n"
        "from aelastic._policies import StopPolicy\n"
        "async def main():\n"
        "    watched = await watch('odd', stop=StopPolicy(on_supervisor_death='kill'), journal='',\n"
        "                          on_lost=print, executor=ThreadPoolExecutor(1))\n"
        f"    watched.worker(0, {stranger.pid}, {started - 500})\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    host = await asyncio.create_subprocess_exec(sys.executable, "-c", source, cwd=Path(__file__).parents[2])
    await host.wait()
    await guards_gone(host.pid)
    assert stranger.returncode is None
    assert procfs.started_ticks(stranger.pid) == started
    stranger.kill()
    await stranger.wait()
