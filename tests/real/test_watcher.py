"""Who collects our children for asyncio: no thread of its own for each, and whoever the host chose stays chosen."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from aelastic._exit import ExitStatus
from aelastic._process import platform
from tests.real.children import NET, child

WATCHERS = sys.version_info < (3, 12)
"""Whether asyncio asks the policy for a watcher by default."""
needs_watchers = pytest.mark.skipif(not WATCHERS, reason="from 3.12 on asyncio waits by pidfd itself")


def is_asyncio() -> bool:
    """Whether the running loop is asyncio's own."""
    return isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)


def waiters() -> list[str]:
    """Threads in which asyncio waits for children."""
    return [thread.name for thread in threading.enumerate() if "waitpid" in thread.name]


@pytest.fixture
def untouched() -> Iterator[object]:
    """The watcher of the host's policy, which is there after the test as before."""
    before = asyncio.get_event_loop_policy().get_child_watcher() if WATCHERS else None
    yield before
    if WATCHERS:
        assert asyncio.get_event_loop_policy().get_child_watcher() is before


async def test_no_thread_waits_for_a_child(untouched: object) -> None:
    async with child("sh", "-c", "echo ready; exec sleep 60") as first, child("sleep", "60"):
        await first.line()
        assert waiters() == []


@needs_watchers
async def test_neither_policy_nor_loop_is_another_after_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is everybody's: who chooses a watcher, or spawns, in another thread meanwhile meets nothing of us."""

    def nobody_sets(watcher: object) -> None:
        raise AssertionError("a watcher was set")

    monkeypatch.setattr(asyncio.get_event_loop_policy(), "set_child_watcher", nobody_sets)
    before = dict(vars(asyncio.get_running_loop())) if is_asyncio() else {}
    async with child("sleep", "60"):
        pass
    with pytest.raises(FileNotFoundError, match="no such program was found"):
        async with child("no-such-program"):
            pass
    if is_asyncio():
        assert vars(asyncio.get_running_loop()).keys() == before.keys()


@needs_watchers
@pytest.mark.parametrize("python_knows", [True, False], ids=["refused by the kernel", "as on macOS"])
async def test_a_child_is_waited_for_in_a_thread_where_there_are_no_pidfds(
    untouched: object, python_knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_asyncio():
        pytest.skip("uvloop watches by SIGCHLD")

    def no_pidfds(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if python_knows:
        monkeypatch.setattr(os, "pidfd_open", no_pidfds)
    else:
        monkeypatch.setattr("aelastic._process.platform.LINUX", False)
        monkeypatch.delattr(os, "pidfd_open")
    async with child("sh", "-c", "read line; exit 3") as started:
        assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(3, None)


def test_who_was_collected_by_another_is_not_waited_for() -> None:
    """Its number may be another child's by now."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = os.pidfd_open(pid)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert platform.collect(pidfd) == ExitStatus(None, None)
    os.close(pidfd)


@needs_watchers
async def test_the_watcher_that_the_host_chose_collects() -> None:
    if not is_asyncio():
        pytest.skip("uvloop watches by SIGCHLD")
    policy = asyncio.get_event_loop_policy()
    before, asked = policy.get_child_watcher(), list[int]()

    class Chosen(asyncio.ThreadedChildWatcher):
        def add_child_handler(self, pid: int, callback: object, *args: object) -> None:
            asked.append(pid)
            super().add_child_handler(pid, callback, *args)  # type: ignore[arg-type]

    policy.set_child_watcher(chosen := Chosen())
    try:
        async with child("sh", "-c", "exit 4") as started:
            assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(4, None)
            assert asked == [started.process.pid]
        assert policy.get_child_watcher() is chosen
    finally:
        policy.set_child_watcher(before)


async def test_loops_of_several_threads_start_ours_and_their_own_at_once(untouched: object) -> None:
    """Whoever spawns, in whatever loop, learns the true return code."""

    async def ours() -> list[int | None]:
        codes: list[int | None] = []
        for code in range(25):
            async with child("sh", "-c", f"exit {code}") as started:
                codes.append((await asyncio.wait_for(started.process.exited, NET)).code)
        return codes

    async def theirs() -> list[int | None]:
        codes: list[int | None] = []
        for code in range(25):
            process = await asyncio.create_subprocess_exec("sh", "-c", f"exit {code}")
            codes.append(await asyncio.wait_for(process.wait(), NET))
        return codes

    with ThreadPoolExecutor(4) as threads:
        told = [threads.submit(asyncio.run, each()) for each in (ours, theirs, ours, theirs)]
        while not all(each.done() for each in told):
            await asyncio.sleep(0.01)
    assert [each.result() for each in told] == [list(range(25))] * 4
