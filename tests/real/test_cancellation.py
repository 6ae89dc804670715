"""Whenever its caller is cancelled, a run takes down all that it has started before the cancellation arrives.

Not at some moments, but at each: the steps of all services of a run are counted (a step is what a task does between
two awaits), and the caller is cancelled at the first, at the second, and so on, until the run is over before.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, final

import pytest

from aelastic import Starting, WorkerOptions, start_processes
from aelastic import _tasks as tasks
from tests.real.jobs import evaluate
from tests.real.runs import QUICK
from tests.real.zookeeper import METHODS, Method, Zoo

LONG = bool(os.environ.get("AELASTIC_TEST_LONG"))
RANKS = 2


@final
class Steps:
    """Counts the steps of services, and does something at one of them.

    Args:
        at: the number of the step, from 0.
    """

    def __init__(self, at: int, act: Callable[[], object]) -> None:
        self.reached = False
        self._left = at
        self._act = act

    def step(self) -> None:
        if self._left == 0:
            self.reached = True
            self._act()
        self._left -= 1


@final
class Stepped(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are counted."""

    def __init__(self, coro: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._coro = coro
        self._steps = steps

    def send(self, value: Any) -> Any:
        self._steps.step()
        return self._coro.send(value)

    def throw(self, *error: Any) -> Any:
        self._steps.step()
        return self._coro.throw(*error)

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Iterator[Any]:  # type: ignore[override]  # never awaited: a task steps it
        raise NotImplementedError


def count(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    """Count the steps of every service that begins from now on."""
    real = tasks.ServiceTask

    def counted(coro: Coroutine[Any, Any, Any], **settings: Any) -> tasks.ServiceTask[Any]:
        return real(Stepped(coro, steps), **settings)

    monkeypatch.setattr(tasks, "ServiceTask", counted)


def launched(method: Method, zoo: Zoo, *, lasting: bool) -> Starting:
    """Ranks that hold the pipe; they end by themselves, or have to be stopped."""
    command = method == "command"
    source = "import time; time.sleep(600)" if lasting else "value = 1"
    argv = ("600" if lasting else "0",)
    return start_processes(
        "cut",
        "sleep" if command else evaluate,
        dict.fromkeys(range(RANKS), argv if command else (source,)),
        start_method="spawn" if method == "command" else method,
        options=WorkerOptions(pass_fds=(zoo.pipe,)),
        stop=QUICK,
    )


async def whole_run(starting: Starting) -> None:
    async with starting as ctx:
        await ctx.wait()


async def closed_at_once(starting: Starting) -> None:
    async with starting:
        pass


@asynccontextmanager
async def a_guard() -> Any:
    """A run beside, so that each doesn't start a guard of its own."""
    async with start_processes("beside", "sleep", {0: ("600",)}):
        yield


@pytest.mark.parametrize("body", [whole_run, closed_at_once], ids=["run", "close"])
@pytest.mark.parametrize("method", METHODS)
async def test_a_caller_cancelled_at_any_step_leaves_nothing(
    method: Method, body: Callable[[Starting], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of start, run and close; the cancellation is raised when nothing of the run is alive."""
    stride = 1 if LONG else 4 if method == "command" else 8
    first = 0 if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop) else stride // 2
    cut = 0
    async with asyncio.timeout(120), a_guard():
        for at in range(first, 10_000, stride):
            zoo = Zoo()
            running = asyncio.ensure_future(body(launched(method, zoo, lasting=body is closed_at_once)))
            with monkeypatch.context() as patch:
                steps = Steps(at, running.cancel)
                count(patch, steps)
                await asyncio.wait({running})
            zoo.handed_over()
            assert zoo.is_gone()
            zoo.close()
            cut += running.cancelled()
            if not steps.reached:
                break
            assert running.cancelled() or running.exception() is None
    assert cut >= 3
    assert not running.cancelled()
