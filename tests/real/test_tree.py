"""Everything that came from a worker is found, signalled and seen gone; nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aelastic._child import procfs
from aelastic._process import Tree
from aelastic._process.signals import Groups, signal_members
from tests.real import children
from tests.real.children import NET, RUN_ID, Child, child, python

SLEEP = "time.sleep(60)"
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
CLEAN = "os.execve(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)'], {})"

ZOO = {
    "one that obeys": "print('ready', flush=True); time.sleep(60)",
    "ignores TERM": f"{IGNORE}; print('ready', flush=True); {SLEEP}",
    "leader exits first": f"""
if os.fork() == 0:
    {IGNORE}; print('ready', flush=True); {SLEEP}
""",
    "leader crashes": f"""
if os.fork() == 0:
    {IGNORE}; print('ready', flush=True); {SLEEP}
os.kill(os.getpid(), signal.SIGSEGV)
""",
    "own group": f"""
if os.fork() == 0:
    os.setpgid(0, 0); {IGNORE}; print('ready', flush=True); {SLEEP}
os.wait()
""",
    "own session": f"""
if os.fork() == 0:
    os.setsid(); {IGNORE}; print('ready', flush=True); {SLEEP}
os.wait()
""",
    "double fork": f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {IGNORE}; print('ready', flush=True); {SLEEP}
    os._exit(0)
os.wait()
""",
    "double fork, clean environment, same session": f"""
if os.fork() == 0:
    os.setpgid(0, 0)
    if os.fork() == 0:
        print('ready', flush=True); {CLEAN}
    os._exit(0)
os.wait(); time.sleep(0.1)
""",
    "own session and clean environment, parent alive": f"""
if os.fork() == 0:
    os.setsid(); print('ready', flush=True); {CLEAN}
{IGNORE}
time.sleep(60)
""",
    "stopped": "print('ready', flush=True); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    "zombie grandchildren": """
for _ in range(3):
    if os.fork() == 0:
        os._exit(0)
print('ready', flush=True); time.sleep(60)
""",
    "fork storm": f"""
{IGNORE}
for _ in range(3):
    if os.fork() == 0:
        break
print('ready', flush=True)
while True:
    if os.fork() == 0:
        os.setpgid(0, 0) if os.getpid() % 2 else None
    else:
        time.sleep(0.02)
    if len(os.listdir('/proc')) > 400: time.sleep(60)
""",
    "hops from pid to pid": """
os.setpgid(0, 0) if os.fork() == 0 else os._exit(0)
print('ready', flush=True)
tired = time.monotonic() + 60  # a test that was killed leaves no endless hopper
while time.monotonic() < tired:
    time.sleep(0.02)  # init collects a hundred a second, not more
    if os.fork(): os._exit(0)
""",
}


@contextlib.asynccontextmanager
async def worker(tree: Tree, code: str, rank: int = 0) -> AsyncIterator[Child]:
    """A worker that has printed `ready`; whatever is left of it is killed at the end."""
    async with child(*python(code), rank=rank) as started:
        tree.add(rank, started.process)
        assert await started.line() == "ready"
        yield started


@contextlib.asynccontextmanager
async def swept() -> AsyncIterator[Tree]:
    """A tree of which nothing is left at the end, whatever the test did."""
    async with children.tree() as tree:
        try:
            yield tree
        finally:
            for member in await tree.members():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)


async def press(tree: Tree, sig: int, seconds: float, rank: int = 0) -> tuple[bool, list[tuple[int, int]]]:
    loop = asyncio.get_running_loop()
    hits: list[tuple[int, int]] = []
    gone = await tree.press(
        rank,
        sig,
        loop.time() + seconds,
        hurry=loop.create_future(),
        on_hit=lambda pids, number: hits.extend((pid, number) for pid in pids),
    )
    return gone, hits


def carriers() -> list[int]:
    """Live processes that carry the run's lineage, found without the code under test."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{entry}/stat").read_text().rpartition(") ")[2][0]
            if f":{RUN_ID}:".encode() in Path(f"/proc/{entry}/environ").read_bytes() and state not in "ZX":
                found.append(int(entry))
    return found


@pytest.mark.parametrize("code", ZOO.values(), ids=ZOO)
async def test_nothing_of_a_tree_outlives_its_steps(code: str) -> None:
    async with swept() as tree, worker(tree, code) as started:
        gone, _ = await press(tree, signal.SIGTERM, 0.2)
        if not gone:
            gone, _ = await press(tree, signal.SIGKILL, NET)
        assert gone
        assert await tree.members() == ()
        assert await tree.survivors(0) == ()
        assert carriers() == []
        assert started.process.has_ended()


async def test_every_process_is_told_a_step_once() -> None:
    code = """
def say(number, frame): print('told', flush=True)
signal.signal(signal.SIGTERM, say)
if os.fork() == 0:
    os.setsid()
print('ready', flush=True)
while True: time.sleep(60)
"""
    async with swept() as tree, worker(tree, code) as started:
        assert await started.line() == "ready"
        members = await tree.members(0)
        gone, hits = await press(tree, signal.SIGTERM, 0.7)
        assert not gone
        assert sorted(hits) == sorted((member.pid, signal.SIGTERM) for member in members)
        assert len(hits) == 2
        assert (await press(tree, signal.SIGKILL, NET))[0]
        assert await started.rest() == ["told", "told"]


async def test_a_tree_that_ends_is_seen_without_waiting_for_a_deadline() -> None:
    async with swept() as tree, worker(tree, ZOO["one that obeys"]) as started:
        began = time.monotonic()
        gone, hits = await press(tree, signal.SIGTERM, NET)
        assert gone
        assert hits == [(started.process.pid, signal.SIGTERM)]
        assert time.monotonic() - began < NET / 4


async def test_another_step_can_be_hurried() -> None:
    async with swept() as tree, worker(tree, ZOO["ignores TERM"]):
        loop = asyncio.get_running_loop()
        hurry = loop.create_future()
        pressing = asyncio.ensure_future(
            tree.press(0, signal.SIGTERM, loop.time() + NET, hurry=hurry, on_hit=lambda _pids, _sig: None)
        )
        await tree.members()
        hurry.set_result(None)
        assert await asyncio.wait_for(pressing, NET) is False
        assert (await press(tree, signal.SIGKILL, 0))[0]  # SIGKILL gets the moment that it needs


async def test_ranks_are_told_apart() -> None:
    async with swept() as tree, worker(tree, ZOO["double fork"]), worker(tree, ZOO["own session"], rank=1):
        first, second = await tree.members(0), await tree.members(1)
        assert {member.pid for member in first}.isdisjoint(member.pid for member in second)
        async with asyncio.timeout(60):
            while len(first) > 1:  # who forked may be on its way out yet when the grandchild says that it is ready
                first = await tree.members(0)
        assert (len(first), len(second)) == (1, 2)
        assert (await press(tree, signal.SIGKILL, NET, rank=1))[0]
        assert {member.pid for member in await tree.members()} == {member.pid for member in first}


async def test_many_who_ask_at_once_share_one_look() -> None:
    async with swept() as tree, worker(tree, ZOO["one that obeys"]):
        looks = 0
        look = tree._census.look

        def counted(leaders: object) -> object:
            nonlocal looks
            looks += 1
            return look(leaders)  # type: ignore[arg-type]

        tree._census.look = counted  # type: ignore[method-assign, assignment]
        found = await asyncio.gather(*(tree.members(0) for _ in range(64)))
        assert looks == 1
        assert len(set(found)) == 1


NESTED = """
env = dict(os.environ, AELASTIC_RUN_ID='inner', AELASTIC_RANK='0')
env['AELASTIC_LINEAGE'] += 'inner:'
code = "import os, time; os.setsid(); print('ready', flush=True); time.sleep(60)"
if os.fork() == 0:
    os.execve(sys.executable, [sys.executable, '-I', '-S', '-c', code], env)
"""


async def test_the_workers_of_a_nested_run_belong_to_the_rank_it_runs_in() -> None:
    async with swept() as tree, worker(tree, ZOO["one that obeys"]), worker(tree, NESTED + SLEEP, rank=1) as outer:
        assert len(await tree.members(1)) == 2
        outer.process.signal_group(signal.SIGKILL)
        await asyncio.wait_for(outer.process.exited, NET)
        assert len(await tree.members(1)) == 1
        assert len(await tree.members(0)) == 1
        assert (await press(tree, signal.SIGKILL, NET, rank=1))[0]


async def test_what_nobody_can_claim_goes_with_a_rank_that_has_ended() -> None:
    async with swept() as tree, worker(tree, ZOO["one that obeys"]), worker(tree, NESTED, rank=1) as outer:
        await asyncio.wait_for(outer.process.exited, NET)  # no look was taken while it lived
        assert len(await tree.members(0)) == 1
        assert len(await tree.members(1)) == 1
        assert len(await tree.members()) == 2
        assert (await press(tree, signal.SIGKILL, NET, rank=1))[0]


async def test_a_host_that_is_a_worker_itself_is_not_of_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swept() as tree, worker(tree, ZOO["one that obeys"]) as started:
        assert os.getpid() not in {member.pid for member in await tree.members()}
        assert {member.pid for member in await tree.members()} == {started.process.pid}


async def test_a_stranger_with_the_pid_group_and_session_of_a_worker_lives() -> None:
    async with children.tree() as tree, child("true") as started:
        tree.add(0, started.process)
        await asyncio.wait_for(started.process.exited, NET)
        await started.process.reaped(NET)
        assert await tree.members(0) == ()
        with children.process_of_pid(started.process.pid) as stranger:
            assert os.getsid(stranger) == started.process.pid
            assert await tree.members() == ()
            gone, hits = await press(tree, signal.SIGKILL, 1)
            assert gone
            assert hits == []
            assert os.waitpid(stranger, os.WNOHANG) == (0, 0)


async def test_a_stranger_that_got_a_found_members_pid_lives() -> None:
    async with swept() as tree, worker(tree, ZOO["own session"]) as started:
        found = next(member for member in await tree.members(0) if member.pid != started.process.pid)
        os.kill(found.pid, signal.SIGKILL)
        started.process.signal_group(signal.SIGKILL)
        await asyncio.wait_for(started.process.exited, NET)
        await asyncio.to_thread(_wait_until_free, found.pid)
        with children.process_of_pid(found.pid) as stranger:
            for groups in Groups:
                assert signal_members([found], signal.SIGKILL, groups, {found.group}, RUN_ID) == ()
            assert os.waitpid(stranger, os.WNOHANG) == (0, 0)


def _wait_until_free(pid: int) -> None:
    deadline = time.monotonic() + NET
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)


async def test_an_unkillable_process_is_reported_in_time_with_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aelastic._process.tree.KILL_GRACE", 0.2)
    async with swept() as tree, worker(tree, ZOO["one that obeys"]) as started:
        with children.frozen(started.process.pid):
            began = time.monotonic()
            gone, _ = await press(tree, signal.SIGKILL, 0.3)
            assert not gone
            assert time.monotonic() - began < 5
            (survivor,) = await tree.survivors(0)
            assert (survivor.rank, survivor.pid) == (0, started.process.pid)
            assert survivor.state.startswith("D (disk sleep)")
            assert " in " in survivor.state  # the wait channel
            assert "SIGKILL waits" in survivor.why
            assert not started.process.exited.done()
        await asyncio.wait_for(started.process.exited, NET)


async def test_who_holds_a_pipe_is_found() -> None:
    code = "if os.fork() == 0: os.setsid(); print('ready', flush=True); time.sleep(60)"
    async with swept() as tree, worker(tree, code) as started:
        await asyncio.wait_for(started.process.exited, NET)
        (orphan,) = await tree.members(0)
        assert await tree.holders(0, {started.pipe_inode}) == (orphan.pid,)
        assert await tree.holders(0, {started.pipe_inode + 1}) == ()
        assert (await press(tree, signal.SIGKILL, NET))[0]


async def test_a_look_that_proc_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swept() as tree, worker(tree, ZOO["ignores TERM"]):
        await tree.members()
        stuck = asyncio.get_running_loop().create_future()
        with monkeypatch.context() as patch:
            patch.setattr(tree, "_begin_look", lambda: None)
            gone, hits = await press(tree, signal.SIGTERM, 0.3)
            assert not gone
            assert len(hits) == 1
        tree._next_look = None
        stuck.cancel()
        assert (await press(tree, signal.SIGKILL, NET))[0]


async def test_one_that_is_just_being_executed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of execve(2) it shows no environment, and with its parent gone and its session left nothing else."""
    code = f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True); {SLEEP}
    os._exit(0)
os.wait()
"""
    async with children.tree() as tree, child(*python(code)) as started:
        pid = int(await started.line())
        tree.add(0, started.process)
        await started.process.exited
        real, hidden = procfs.read, 6

        def read(path: str) -> bytes:
            nonlocal hidden
            if path in (f"/proc/{pid}/environ", f"/proc/{pid}/cmdline") and hidden:
                hidden -= 1
                return b""
            return real(path)

        monkeypatch.setattr(procfs, "read", read)
        assert [member.pid for member in await tree.members(0)] == [pid]
        os.kill(pid, signal.SIGKILL)
