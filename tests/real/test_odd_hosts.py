"""Hosts that do odd things with children, signals and threads: no exit is lost and no status invented."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from aelastic import PContext, RunProcsResult, start_processes
from aelastic._function.forking import ForkedChild
from tests.conftest import LOOPS
from tests.real.children import process_of_pid
from tests.real.jobs import evaluate
from tests.real.runs import QUICK
from tests.real.zookeeper import METHODS, Method

CODES = (0, 3)
"""What the ranks exit with; the last one runs until it is stopped as a victim."""


async def ended(method: Method) -> RunProcsResult:
    """How two ranks end that exit, and one that waits to be stopped."""
    command = method == "command"
    sources = [*(f"exit {code}" if command else f"import os; os._exit({code})" for code in CODES)]
    sources.append("exec sleep 600" if command else "import time; time.sleep(600)")
    ctx = await start_processes(
        "odd",
        "sh" if command else evaluate,
        {rank: ("-c", source) if command else (source,) for rank, source in enumerate(sources)},
        start_method="spawn" if method == "command" else method,
        stop=QUICK,
    )
    async with asyncio.timeout(30):
        return await ctx.wait()


def check(result: RunProcsResult) -> None:
    """Each rank has one status: the kernel's, or none that anybody knows."""
    assert set(result.exits) == {0, 1, 2}
    assert result.survivors == ()
    for rank, code in enumerate(CODES):
        status = result.exits[rank]
        assert (status.code, status.signal) in [(code, None), (None, signal.SIGTERM), (None, None)]
    assert (result.exits[2].code, result.exits[2].signal) in [(None, signal.SIGTERM), (None, None)]
    assert result.is_failed()


@contextmanager
def reaper() -> Iterator[None]:
    """A thread of the host that collects every child there is."""
    over = threading.Event()

    def reap() -> None:
        while not over.wait(0.001):
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# Not on uvloop: its loop.close() can hang after that, with a bare create_subprocess_exec too.
@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept by the kernel", "kept by nobody"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_host_that_collects_every_child_is_told_of_every_exit(
    method: Method, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's `waitpid(-1)` in a thread; before Linux 6.15 what it took is known to nobody else."""
    if not kept:
        monkeypatch.setattr("aelastic._process.platform.collected_status", lambda _: None)
    with reaper():
        check(await ended(method))


@pytest.mark.parametrize("method", METHODS)
async def test_a_host_that_ignores_sigchld_is_told_of_every_exit(method: Method) -> None:
    """The kernel collects its children then."""
    if method != "command" and not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        pytest.skip("once is enough for a loop that has its own handler")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        check(await ended(method))
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_a_child_that_got_the_number_of_a_collected_worker_is_neither_waited_for_nor_collected() -> None:
    """Where the kernel or the host collects our children, a number may be another child's before we come to it."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    worker = ForkedChild(pid)
    assert worker.pidfd is not None
    os.waitpid(pid, 0)
    try:
        with process_of_pid(pid) as other:
            worker.collect(worker.pidfd)  # by number it would wait for the other one's end
            assert worker.done.done()
            assert os.waitpid(other, os.WNOHANG) == (0, 0)
    finally:
        os.close(worker.pidfd)


STARTS = ("aelastic._process.launch", None, "start_collected")
CLOSES = ("aelastic._function.function", "Function", "close")


@pytest.mark.parametrize(("where", "method"), [(STARTS, "command"), (CLOSES, "fork")])
def test_a_loop_may_end_in_any_turn_of_a_run(where: Any, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the making of a task and its first turn, in which a cancelled one would be heard of no more."""
    module, owner, step = where
    place = sys.modules[module] if owner is None else getattr(sys.modules[module], owner)
    real = getattr(place, step)
    started: list[PContext] = []

    async def go() -> None:
        args = ("-c", "exit 0") if method == "command" else ("0",)
        run = start_processes("odd", "sh" if method == "command" else evaluate, {0: args}, start_method="fork")
        started.append(await run)
        await started[0].wait()

    async def main() -> None:
        over = asyncio.get_running_loop().create_future()

        async def in_the_last_turn(*args: Any, **settings: Any) -> Any:
            if not over.done():
                over.set_result(None)
                for _ in range(2):  # `main` ends in the next turn; in the one after it the loop is told to
                    await asyncio.sleep(0)
            return await real(*args, **settings)

        monkeypatch.setattr(place, step, in_the_last_turn)
        going = asyncio.create_task(go())
        await over
        assert not going.done()

    with asyncio.Runner(loop_factory=LOOPS["asyncio"]) as runner:
        runner.run(main())
    assert [ctx.result is not None for ctx in started] == [True] * (where == CLOSES)


@pytest.mark.parametrize("loop", LOOPS)
def test_runs_work_in_a_loop_of_another_thread(loop: str) -> None:
    """By every start method, beside a run of the main thread's."""
    results: list[RunProcsResult] = []

    async def there() -> None:
        results.extend([await ended(method) for method in METHODS])

    def in_thread() -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(there())

    async def here() -> Any:
        thread = threading.Thread(target=in_thread)
        thread.start()
        result = await ended("command")
        while thread.is_alive():
            await asyncio.sleep(0.01)
        thread.join()
        return result

    with asyncio.Runner(loop_factory=LOOPS["asyncio"]) as runner:
        check(runner.run(here()))
    assert len(results) == len(METHODS)
    for result in results:
        check(result)
