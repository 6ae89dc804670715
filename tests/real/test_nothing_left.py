"""Whatever a tree is like, however it was started and however its run ends: nothing of it is left (DESIGN 4.1).

One run holds the whole zoo, a tree on each rank. The summary of the suite prints the table.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aelastic import PContext, Starting, WorkerExited, WorkerOptions, start_processes
from tests import matrix
from tests.conftest import LOOPS
from tests.real.zookeeper import GRACE, LEAVING, METHODS, POLICY, Method, Zoo, start
from tests.zoo import TREES, Tree

LONG = bool(os.environ.get("AELASTIC_TEST_LONG"))
BOUND = POLICY.bound + POLICY.drain
AFTER_DEATH = GRACE + 1.0
"""What DESIGN allows after the supervisor's own death."""


async def standing(method: Method, zoo: Zoo, **policy: Any) -> PContext:
    """A run of which every process is in its place."""
    ctx = await start(method, zoo.pipe, zoo.gate, **policy)
    zoo.handed_over()
    await asyncio.to_thread(zoo.stands)
    return ctx


async def left_behind(method: Method, zoo: Zoo) -> PContext:
    """The same, when those leaders have left that do."""
    ctx = await standing(method, zoo)
    zoo.let_leave()
    exits = 0
    async for event in ctx.events():
        exits += isinstance(event, WorkerExited)
        if exits == LEAVING:
            break
    return ctx


async def begun(starting: Starting) -> PContext:
    return await starting


async def result(method: Method, zoo: Zoo) -> None:
    ctx = await standing(method, zoo, on_failure="stop")
    zoo.let_leave()
    ended = await ctx.wait()
    assert zoo.is_gone()
    assert (ended.outcome, ended.survivors) == ("failed", ())


async def close(method: Method, zoo: Zoo) -> None:
    ctx = await left_behind(method, zoo)
    began = time.monotonic()
    await ctx.close()
    assert zoo.is_gone()
    assert time.monotonic() - began < BOUND


async def cancelled_start(method: Method, zoo: Zoo) -> None:
    starting = asyncio.ensure_future(begun(start(method, zoo.pipe, zoo.gate, slowly=True)))
    await (some_children() if method == "spawn" else asyncio.to_thread(zoo.stands, 1))
    assert not starting.done()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    zoo.handed_over()
    assert zoo.is_gone()


async def some_children() -> None:
    """Wait for some workers, where a first line comes long after all have been started."""
    while sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")) < 4:
        await asyncio.sleep(0.001)


async def cancelled_run(method: Method, zoo: Zoo) -> None:
    async def body() -> None:
        async with start(method, zoo.pipe, zoo.gate) as ctx:
            zoo.handed_over()
            await ctx.wait()

    running = asyncio.ensure_future(body())
    await asyncio.to_thread(zoo.stands)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert zoo.is_gone()


async def cancelled_close(method: Method, zoo: Zoo) -> None:
    ctx = await left_behind(method, zoo)
    closing = asyncio.ensure_future(ctx.close())
    await asyncio.sleep(0)
    while not closing.done():
        closing.cancel()
        await asyncio.wait({closing}, timeout=0.001)
    assert closing.cancelled()
    assert zoo.is_gone()


async def exception(method: Method, zoo: Zoo) -> None:
    async def body() -> None:
        async with start(method, zoo.pipe, zoo.gate) as ctx:
            zoo.handed_over()
            await asyncio.to_thread(zoo.stands)
            assert ctx.nprocs / 0

    with pytest.raises(ZeroDivisionError):
        await body()
    assert zoo.is_gone()


async def forgotten(method: Method, zoo: Zoo) -> None:
    await left_behind(method, zoo)


def killed_by(number: int, method: Method, zoo: Zoo, loop: str, **policy: Any) -> None:
    keeper = zoo.keeper(method, loop, **policy)
    try:
        zoo.stands()
        zoo.let_leave()
    finally:
        keeper.send_signal(number)
        keeper.wait()
    assert zoo.is_gone(AFTER_DEATH)


INSIDE: dict[str, Callable[[Method, Zoo], Awaitable[None]]] = {
    "result": result,
    "close": close,
    "cancelled start": cancelled_start,
    "cancelled run": cancelled_run,
    "cancelled close": cancelled_close,
    "exception": exception,
    "asyncio.run": forgotten,
}
OUTSIDE = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
"""Those after which the guard has to do it."""
CELLS = [
    (way, method, loop)
    for turn, (way, method) in enumerate(itertools.product((*INSIDE, *OUTSIDE), METHODS))
    for loop in (LOOPS if LONG else [list(LOOPS)[turn % 2 ^ turn // 4 % 2]])
]


@pytest.mark.parametrize(("way", "method", "loop"), CELLS)
def test_nothing_of_the_zoo_is_left(way: str, method: Method, loop: str) -> None:
    """When the run is over no process of it is alive; within the grace and a second if its supervisor was killed."""
    zoo = Zoo()
    try:
        if way in OUTSIDE:
            killed_by(OUTSIDE[way], method, zoo, loop)
        else:
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                runner.run(INSIDE[way](method, zoo))  # type: ignore[arg-type]  # they are coroutines
            assert zoo.is_gone()
        matrix.record(way, method, ())
    except BaseException:
        matrix.record(way, method, blamed(zoo))
        raise
    finally:
        zoo.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_kill_asks_nobody(loop: str) -> None:
    """With `on_supervisor_death="kill"` there is no grace."""
    zoo = Zoo()
    try:
        killed_by(signal.SIGKILL, "command", zoo, loop, on_supervisor_death="kill", orphan_grace=60.0)
    finally:
        zoo.close()


STUCK = "import os, time; os.write(int(os.environ['ZOO_PIPE']), b'alive\\n'); time.sleep(600)\n"
"""A module whose import never ends."""
ASKS_THE_STUCK = """
import asyncio, sys
from aelastic import StopPolicy, WorkerOptions, start_processes
folder, pipe, grace = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sys.path.insert(0, folder)
async def main():
    options = WorkerOptions(pass_fds=(pipe,), forkserver_preload=("stuck_module",))
    stop, envs = StopPolicy(orphan_grace=grace), {0: {"ZOO_PIPE": str(pipe)}}
    await start_processes("stuck", print, {0: ()}, envs, start_method="forkserver", options=options, stop=stop)
asyncio.run(main())
"""


async def test_a_start_that_waits_for_a_stuck_fork_server_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed when it doesn't answer; regression: the start waited for it for ever."""
    (tmp_path / "stuck_module.py").write_text(STUCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("aelastic._function.server.CLOSE_SECONDS", 0.2)
    zoo = Zoo()
    try:
        options = WorkerOptions(pass_fds=(zoo.pipe,), forkserver_preload=("stuck_module",))
        envs = {0: {"ZOO_PIPE": str(zoo.pipe)}}
        starting = asyncio.ensure_future(
            begun(start_processes("stuck", print, {0: ()}, envs, start_method="forkserver", options=options))
        )
        await asyncio.to_thread(zoo.stands, 1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(starting, 20)
        zoo.handed_over()
        assert zoo.is_gone()
    finally:
        zoo.close()


def test_a_stuck_fork_server_goes_with_its_supervisor(tmp_path: Path) -> None:
    """It doesn't see the end of its socket; regression: the guard didn't know of it."""
    (tmp_path / "stuck_module.py").write_text(STUCK)
    zoo = Zoo()
    try:
        words = (str(tmp_path), str(zoo.pipe), str(GRACE))
        keeper = subprocess.Popen(
            [sys.executable, "-c", ASKS_THE_STUCK, *words], pass_fds=(zoo.pipe,), cwd=Path(__file__).parents[2]
        )
        zoo.handed_over()
        zoo.stands(1)
        keeper.kill()
        keeper.wait()
        assert zoo.is_gone(AFTER_DEATH)
    finally:
        zoo.close()


def test_a_fork_server_ends_without_a_word_when_its_supervisor_has_died() -> None:
    """Also when an answer of its was not read any more."""
    code = (
        "import socket\n"
        "from aelastic._child.forkserver import Server\n"
        "supervisors, own = socket.socketpair()\n"
        "own.send(b'.')\n"
        "supervisors.close()\n"
        "Server(own).run()\n"
    )
    server = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, timeout=30)
    assert (server.returncode, server.stderr) == (0, b"")


def blamed(zoo: Zoo) -> list[Tree]:
    """The trees of which somebody is left; all of them where that can't be told."""
    left = [TREES[rank] for pid in zoo.holders() if (rank := rank_of(pid)) is not None]
    return left or list(TREES)


def rank_of(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [int(each.partition(b"=")[2]) for each in variables if each.startswith(b"AELASTIC_RANK=")]
    return ranks[0] if ranks and ranks[0] < len(TREES) else None
