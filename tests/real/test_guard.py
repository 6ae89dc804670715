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
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aelastic import GuardLost, StopPolicy, start_processes
from aelastic._child import ledger, procfs
from aelastic._guard import Watch, watch
from tests import leaks
from tests.real.children import process_of_pid, python
from tests.ways_to_die import PYTHON
from tests.zoo import DEAF_CHILD, OBEDIENT, OWN_SESSION

pytestmark = pytest.mark.one_loop

NET = 60.0
"""Seconds after which a test is taken to hang."""
GRACE = 0.4
BOUND = 1.0
"""What DESIGN allows on top of the grace."""
GUARD = str(Path(procfs.__file__).with_name("guard.py"))

SUPERVISOR = '''
import asyncio, ctypes, json, os, signal, sys, time
from aelastic import DefaultLogsSpecs, Std, StopPolicy, start_processes

told = json.loads(sys.argv[1])
def let_go():
    """Close every copy of stdout; uvloop keeps some that programs inherit."""
    output = os.readlink("/proc/self/fd/1")
    held = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + fd)]
    [os.dup2(2, fd) for fd in held if os.readlink(f"/proc/self/fd/{fd}") == output]
async def main():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, exec, told["then"], globals())
    os.write(1, b"starting\\n")
    async with start_processes(
        "zoo", told["argv"][0], {rank: tuple(told["argv"][1:]) for rank in range(told["ranks"])},
        stop=StopPolicy(**told["stop"]), logs_specs=DefaultLogsSpecs(told["logs"]) if told["logs"] else None,
    ) as ctx:
        told["blocks"] and time.sleep(600)
        await (ctx.wait() if told["ends"] else asyncio.Event().wait())
if told["loop"] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
'''
"""A supervisor that waits to be killed, and does what it is told on SIGUSR1."""


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
    argv: tuple[str, ...], *, ranks: int = 1, stop: dict[str, Any] | None = None, **told: str | bool
) -> AsyncIterator[Supervisor]:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *host(argv, ranks=ranks, stop=stop, **told), stdout=writing, cwd=Path(__file__).parents[2]
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


def host(
    argv: tuple[str, ...], *, ranks: int = 1, stop: dict[str, Any] | None = None, **told: str | bool
) -> tuple[str, ...]:
    """The command of a supervisor."""
    loop = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
    known = {"logs": "", "then": "", "ends": False, "blocks": False, "loop": loop}
    stop = {"orphan_grace": GRACE} | (stop or {})
    return (sys.executable, "-c", SUPERVISOR, json.dumps(known | {"argv": argv, "ranks": ranks, "stop": stop} | told))


def guards() -> dict[int, int]:
    """The guards that descend from this session: pid, and the supervisor that each watches."""
    found = {}
    for pid in procfs.pids():
        words = procfs.command_of(pid).split(" ")
        if GUARD in words[:4] and leaks.OURS in procfs.read_variable(pid, procfs.LINEAGE):
            found[pid] = int(words[words.index(GUARD) + 1])
    return found


async def guard_of(supervisor_pid: int, *, other_than: int = 0) -> int:
    """The guard of a supervisor; it is seen a moment after its start, when it has been exec'd."""
    async with asyncio.timeout(NET):
        while True:
            for guard, supervised in guards().items():
                if supervised == supervisor_pid and guard != other_than:
                    return guard
            await asyncio.sleep(0.002)


async def guards_gone(supervisor_pid: int) -> None:
    while supervisor_pid in guards().values():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 10, 20, 40, 80, 160])
async def test_a_supervisor_killed_while_it_starts_leaves_nothing(milliseconds: int) -> None:
    """Whatever stands by then: the guard may be booting, and a worker not told to it yet."""
    async with supervisor(DEAF_CHILD.argv, ranks=8) as zoo:
        await zoo.said("starting")
        await asyncio.sleep(milliseconds / 1000)  # any moment will do
        assert await zoo.gone() < GRACE + BOUND


async def test_a_supervisor_killed_while_its_host_blocks_the_loop_leaves_nothing() -> None:
    """The guard knows every worker when the start returns: no turn of the loop is needed after it."""
    async with supervisor(("env", "-i", *OBEDIENT.argv), ranks=2, blocks=True) as zoo:
        await zoo.said("alive", 2 * OBEDIENT.lines)
        assert await zoo.gone() < GRACE + BOUND


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
    async with supervisor(host(DEAF_CHILD.argv, ranks=2), stop={"orphan_grace": 1.5}) as zoo:
        await zoo.said("alive", 4)
        assert len(guards()) == 2
        assert await zoo.gone() < 1.5 + BOUND
        while guards():
            await asyncio.sleep(0.005)


async def test_a_nested_supervisor_that_is_killed_leaves_nothing() -> None:
    """Its own guard acts, long before the outer run's patience is at its end."""
    async with supervisor(host(OWN_SESSION.argv), stop={"orphan_grace": 30.0}, ends=True) as zoo:
        await zoo.said("alive", OWN_SESSION.lines)
        (worker,) = [pid for pid in procfs.pids() if parent_of(pid) == zoo.process.pid and pid not in guards()]
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        await zoo.reader.read()
        assert time.monotonic() - began < 15.0  # the outer supervisor's own end included; its SIGKILL comes at 30


def parent_of(pid: int) -> int:
    member = procfs.read_member(pid, lineage=False)
    return 0 if member is None else member.parent


async def test_keep_leaves_the_workers_alone() -> None:
    """With `on_supervisor_death="keep"` they go on."""
    source = "import os; os.write(1, b'alive\\n'); os.read(0, 1); os.write(1, b'went on\\n')"
    held, hold = os.pipe()
    argv = ("sh", "-c", 'exec "$@" <"$0"', f"/proc/{os.getpid()}/fd/{held}", *PYTHON, source)
    async with supervisor(argv, stop={"on_supervisor_death": "keep"}) as zoo:
        await zoo.said("alive")
        zoo.process.kill()
        await zoo.process.wait()
        await guards_gone(zoo.process.pid)
        os.close(hold)
        os.close(held)
        await zoo.said("went on")
        await zoo.reader.read()


async def test_a_host_that_forked_is_seen_to_die() -> None:
    """Its child, forked by something that isn't Python, holds a copy of everything: the pidfd tells."""
    then = "ctypes.CDLL(None).fork() or (os.write(1, b'forked %d\\n' % os.getpid()), let_go(), signal.pause())"
    async with supervisor(OWN_SESSION.argv, then=then) as zoo:
        await zoo.said("alive", OWN_SESSION.lines)
        zoo.process.send_signal(signal.SIGUSR1)
        forked = int((await zoo.reader.readline()).split()[1])
        try:
            assert await zoo.gone() < GRACE + BOUND
        finally:
            os.kill(forked, signal.SIGKILL)


async def test_a_host_that_becomes_another_program_counts_as_dead() -> None:
    """Its pid lives on: the end of the lifeline tells."""
    then = "let_go(); os.execvp('sleep', ['sleep', '600'])"
    async with supervisor(OWN_SESSION.argv, then=then) as zoo:
        await zoo.said("alive", OWN_SESSION.lines)
        began = time.monotonic()
        zoo.process.send_signal(signal.SIGUSR1)
        await zoo.reader.read()
        assert time.monotonic() - began < GRACE + BOUND


async def test_the_journal_tells_what_the_guard_did(tmp_path: Path) -> None:
    """Who was sent which signal, in lines shaped like the events before them."""
    async with supervisor(DEAF_CHILD.argv, logs=str(tmp_path)) as zoo:
        await zoo.said("alive", DEAF_CHILD.lines)
        await zoo.gone()
    (journal,) = tmp_path.rglob("events.jsonl")
    told = [json.loads(line) for line in journal.read_text().splitlines()]
    told = told[[each["event"] for each in told].index("SupervisorDied") :]
    assert told[0]["pid"] == zoo.process.pid
    assert told[-1]["event"] == "OrphansGone"
    assert {each["run_id"] for each in told} == {told[0]["run_id"]}
    signaled = [each for each in told if each["event"] == "WorkerSignaled"]
    assert {each["rank"] for each in signaled} == {0}
    assert [each["signal"] for each in signaled] == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]


async def test_a_dead_guard_is_announced_and_replaced() -> None:
    """The next one is told everything again: it protects the workers of before."""
    async with start_processes("zoo", "sleep", {0: ("600",), 1: ("600",)}) as ctx:
        first = await guard_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(NET):
            lost = await anext(event async for event in ctx.events() if isinstance(event, GuardLost))
            assert (lost.pid, lost.reason) == (first, "killed by SIGKILL")
            assert await guard_of(os.getpid(), other_than=first) != first
    assert os.getpid() not in guards().values()


async def test_the_guard_that_replaced_a_dead_one_acts() -> None:
    """It knows the workers of before: they are found without any lineage."""
    argv = ("env", "-i", *DEAF_CHILD.argv)
    async with supervisor(argv) as zoo:
        await zoo.said("alive", DEAF_CHILD.lines)
        first = await guard_of(zoo.process.pid)
        os.kill(first, signal.SIGKILL)
        await booted(await guard_of(zoo.process.pid, other_than=first))
        assert await zoo.gone() < GRACE + BOUND


async def booted(guard: int) -> None:
    """Wait until a guard has come to rest."""
    while "poll" not in procfs.wait_channel(guard):
        await asyncio.sleep(0.005)


async def test_the_guard_holds_nothing_and_is_hard_to_disturb() -> None:
    """Session of its own, no directory, no terminal, no output; SIGTERM, SIGINT and SIGHUP are ignored."""
    async with supervisor(OBEDIENT.argv) as zoo:
        await zoo.said("alive", OBEDIENT.lines)
        guard = await guard_of(zoo.process.pid)
        await booted(guard)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guard, number)
        member = procfs.read_member(guard)
        assert member is not None
        assert (member.session, member.group) == (guard, guard)
        assert os.readlink(f"/proc/{guard}/cwd") == "/"
        held = [os.readlink(f"/proc/{guard}/fd/{fd}") for fd in (0, 1, 2)]
        assert held == ["/dev/null"] * 3
        assert len([what for what in holds(guard) if what.startswith("pipe:")]) == 1  # its lifeline
        assert await zoo.gone() < GRACE + BOUND


async def test_the_guard_is_small_and_idle() -> None:
    """At most 12 MiB and 60 ms of CPU once, and nothing while it waits."""
    async with supervisor(OBEDIENT.argv, ranks=4) as zoo:
        await zoo.said("alive", 4 * OBEDIENT.lines)
        guard = await guard_of(zoo.process.pid)
        await booted(guard)
        before = await steady_cpu_seconds(guard)
        await asyncio.sleep(0.3)  # the fact is that nothing happens
        status = procfs.read(f"/proc/{guard}/status").decode()
        (resident,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        assert resident <= 12 * 1024
        assert before <= 0.060
        assert cpu_seconds(guard) == before


async def steady_cpu_seconds(pid: int) -> float:
    """What it has used once it has read what it was told last: between two reads it rests for a moment."""
    before = -1.0
    while (now := cpu_seconds(pid)) != before:
        before = now
        await asyncio.sleep(0.1)
    return now


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
        guard = await guard_of(os.getpid())
        two = await watched("two", executor)
        assert await guard_of(os.getpid()) == guard
        await one.release()
        assert await guard_of(os.getpid()) == guard
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
            os.kill(await guard_of(os.getpid()), signal.SIGKILL)
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


async def test_a_forked_host_doesnt_hold_the_lifeline() -> None:
    """The child begins anew, without its parent's guard."""
    with threads() as executor:
        mine = await watched("mine", executor)
        guard = await guard_of(os.getpid())
        (lifeline,) = [what for what in holds(guard) if what.startswith("pipe:")]
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, b"holds it" if lifeline in holds(os.getpid()) else b"free")
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        assert os.read(reading, 100) == b"free"
        os.close(reading)
        await mine.release()


def holds(pid: int) -> list[str]:
    """What a process has open."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return links


async def test_a_stopped_guard_is_replaced_when_it_reads_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling never waits: what the pipe can't take is kept, and a guard that takes nothing is replaced."""
    monkeypatch.setattr("aelastic._guard.BACKLOG_BYTES", 4096)
    with threads() as executor:
        lost: list[str] = []
        mine = await watched("mine", executor, lost)
        os.kill(await guard_of(os.getpid()), signal.SIGSTOP)
        async with asyncio.timeout(NET):
            while not lost:
                for _ in range(100):
                    mine.worker(0, os.getpid(), None, procfs.now_ticks())
                await asyncio.sleep(0)
        await mine.release()
    assert os.getpid() not in guards().values()


async def test_a_supervisor_killed_in_the_turn_of_a_spawn_leaves_nothing() -> None:
    """The line of a worker is in the pipe before anything else happens."""
    source = (
        "import asyncio, os, subprocess\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from aelastic._child import procfs\n"
        "from aelastic._guard import watch\n"
        "from aelastic._policies import StopPolicy\n"
        "async def main():\n"
        "    watched = await watch('odd', stop=StopPolicy(on_supervisor_death='kill'), journal='',\n"
        "                          on_lost=print, executor=ThreadPoolExecutor(1))\n"
        "    child = subprocess.Popen(['env', '-i', 'sleep', '600'], start_new_session=True)\n"
        "    watched.worker(0, child.pid, os.pidfd_open(child.pid), procfs.now_ticks())\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    host = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE
    )
    assert host.stdout is not None
    async with asyncio.timeout(10):
        assert await host.stdout.read() == b""  # the worker held it
    await host.wait()
    await guards_gone(host.pid)


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
        f"    watched.worker(0, {stranger.pid}, None, {started - 500})\n"
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


@pytest.mark.parametrize("policy", ["stop", "kill"])
async def test_a_stranger_that_got_the_number_of_a_worker_lives(policy: str) -> None:
    """A pid that is reused for real, by the leader of a session and group of that number; the others are ended."""
    source = '[ "$AELASTIC_RANK" = 1 ] && { echo alive; exec sleep 600; }; echo $$'
    async with supervisor(("sh", "-c", source), ranks=2, stop={"on_supervisor_death": policy}) as zoo:
        await zoo.said("starting")
        said = [(await zoo.reader.readline()).decode().strip() for _ in range(2)]
        (freed,) = [int(line) for line in said if line.isdecimal()]
        while os.path.exists(f"/proc/{freed}"):
            await asyncio.sleep(0.002)
        with process_of_pid(freed) as stranger:
            assert os.getsid(stranger) == freed
            assert await zoo.gone() < GRACE + BOUND
            await guards_gone(zoo.process.pid)
            assert os.waitpid(stranger, os.WNOHANG) == (0, 0)


@pytest.mark.parametrize("policy", ["stop", "kill"])
async def test_a_stranger_lives_also_when_the_guard_hears_late_that_the_number_is_free(policy: str) -> None:
    """On a busy machine a number is used again before the guard has seen the end of the worker that had it."""
    source = "signal.pthread_sigmask(signal.SIG_BLOCK, {10}); print(os.getpid(), flush=True); signal.sigwait({10})"
    async with supervisor(python(source), ranks=2, stop={"on_supervisor_death": policy}) as zoo:
        await zoo.said("starting")
        freed, _ = [int(await zoo.reader.readline()) for _ in range(2)]
        guard = await guard_of(zoo.process.pid)
        while sum("pidfd" in link for link in holds(guard)) < 3:  # the supervisor's, and a worker's each
            await asyncio.sleep(0.002)
        began = procfs.started_ticks(freed)
        os.kill(guard, signal.SIGSTOP)
        try:
            os.kill(freed, signal.SIGUSR1)
            while procfs.started_ticks(freed) == began:
                await asyncio.sleep(0.002)
            with process_of_pid(freed) as stranger:
                await asyncio.sleep(2 / procfs.TICKS_A_SECOND)  # the guard's clock shall be past the stranger's birth
                os.kill(guard, signal.SIGCONT)
                assert await zoo.gone() < GRACE + BOUND
                await guards_gone(zoo.process.pid)
                assert os.waitpid(stranger, os.WNOHANG) == (0, 0)
        finally:
            with suppress(ProcessLookupError):  # also where the number was not to be had
                os.kill(guard, signal.SIGCONT)


async def test_a_number_used_again_in_the_same_tick_is_known_by_its_pidfd() -> None:
    """Two processes of one number may show one start time, ten milliseconds wide."""
    first, second = [await asyncio.create_subprocess_exec("sleep", "600") for _ in range(2)]
    fds = [os.pidfd_open(child.pid) for child in (first, second)]
    inodes = [procfs.inode_of(fd) for fd in fds]
    if not inodes[0]:
        pytest.skip("pidfds have no numbers of their own before Linux 6.9")
    for child, inode, meant in [(first, inodes[0], True), (first, inodes[1], False), (second, inodes[1], True)]:
        leader = ledger.Leader(0, child.pid, procfs.now_ticks(), inode)
        assert (leader.fd >= 0) is meant
        leader.close()
    for child, fd in zip((first, second), fds, strict=True):
        os.close(fd)
        child.kill()
        await child.wait()
