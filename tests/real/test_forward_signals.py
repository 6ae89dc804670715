"""Signals of the host in the care of a run: `forward_signals` (issue 5, point 4)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    DefaultLogsSpecs,
    PContext,
    SignalException,
    Std,
    WorkerSignaled,
    forward_signals,
    start_processes,
)
from aelastic._signals import Closable
from tests.ways_to_die import DEAF_TO_TERM

NET = 30.0
"""Seconds after which a test is taken to hang."""


class Stub:
    """Something to be stopped, and with what it was."""

    name = "stub"

    def __init__(self) -> None:
        self.closed: list[int | None] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
        self.closed.append(death_sig)
        await self.may_end.wait()


def send(number: int) -> None:
    """Signal ourselves, as the terminal or a service manager would."""
    os.kill(os.getpid(), number)


async def interrupted(ctx: Closable, *numbers: int) -> None:
    """A block that is sent signals and would last for ever."""
    async with forward_signals(ctx):
        for number in numbers:
            send(number)
        await asyncio.Event().wait()


@contextmanager
def action(number: int, what: Any) -> Iterator[None]:
    """Another action of a signal, for a while."""
    before = signal.signal(number, what)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_the_gang_is_stopped_with_the_signal(number: signal.Signals) -> None:
    """The block is left when the run has ended, with a `SignalException` that names the signal."""
    async with asyncio.timeout(NET), start_processes("nap", "sleep", {0: ("600",), 1: ("600",)}) as ctx:
        with pytest.raises(SignalException, match=f"nap was stopped by {number.name}") as caught:
            await interrupted(ctx, number)
        assert caught.value.sigval == number
        assert ctx.result is not None
        assert ctx.result.outcome == "stopped"
        assert [status.signal for status in ctx.result.exits.values()] == [number, number]


async def test_a_second_signal_shortens_the_stop(tmp_path: Path) -> None:
    """A worker that ignores SIGTERM is killed then, and its end is still awaited."""
    logs = DefaultLogsSpecs(tmp_path, capture=Std.OUT)
    async with (
        asyncio.timeout(NET),
        start_processes("deaf", DEAF_TO_TERM.program, {0: DEAF_TO_TERM.args}, None, logs) as ctx,
    ):
        await ctx.wait_for_line("ready")
        impatient = asyncio.create_task(send_after_the_first(ctx, signal.SIGINT))
        with pytest.raises(SignalException) as caught:
            await interrupted(ctx, signal.SIGTERM)
        await impatient
        assert caught.value.sigval == signal.SIGTERM
        assert ctx.result is not None
        assert ctx.result.exits[0].signal == signal.SIGKILL


async def send_after_the_first(ctx: PContext, number: int) -> None:
    async for event in ctx.events():
        if isinstance(event, WorkerSignaled):
            send(number)
            return


async def test_without_a_signal_nothing_is_stopped() -> None:
    """Leaving the block leaves the run alone."""
    stub = Stub()
    async with forward_signals(stub):
        await asyncio.sleep(0)
    assert stub.closed == []


async def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    stub = Stub()
    with action(signal.SIGHUP, signal.SIG_IGN):
        async with forward_signals(stub):
            send(signal.SIGHUP)
            await asyncio.sleep(0)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert stub.closed == []


async def test_a_former_action_is_back_afterwards() -> None:
    """One set with `signal.signal`; it is not called in the block."""
    called: list[int] = []
    with action(signal.SIGTERM, lambda number, frame: called.append(number)):
        with pytest.raises(SignalException):
            await interrupted(Stub(), signal.SIGTERM)
        assert called == []
        send(signal.SIGTERM)
        await asyncio.sleep(0)
        assert called == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_loops_own_action_is_called_as_well_and_stays(number: int) -> None:
    """A host's `loop.add_signal_handler` works in the block and after it."""
    loop = asyncio.get_running_loop()
    called = asyncio.Queue[int]()
    loop.add_signal_handler(number, called.put_nowait, number)
    try:
        async with asyncio.timeout(NET):
            with pytest.raises(SignalException):
                await interrupted(Stub(), number)
            assert await called.get() == number
            send(number)
            assert await called.get() == number
    finally:
        loop.remove_signal_handler(number)


async def test_another_signal_of_the_host_is_not_touched() -> None:
    """What the block wasn't given goes where it went."""
    loop = asyncio.get_running_loop()
    called = asyncio.Queue[int]()
    loop.add_signal_handler(signal.SIGUSR1, called.put_nowait, 1)
    try:
        async with asyncio.timeout(NET), forward_signals(Stub()):
            send(signal.SIGUSR1)
            assert await called.get() == 1
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def test_an_action_that_the_host_sets_in_the_block_stays() -> None:
    """Only what is ours is taken away."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        async with forward_signals(Stub()):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_signal_reaches_the_runs_of_all_blocks() -> None:
    """Nested ones, and ones that overlap in two tasks."""
    outer, inner, other = Stub(), Stub(), Stub()
    inside = asyncio.Event()

    async def overlap() -> None:
        async with forward_signals(other):
            inside.set()
            await asyncio.Event().wait()

    async def nest() -> None:
        async with forward_signals(outer):
            await interrupted(inner, signal.SIGTERM)

    async with asyncio.timeout(NET):
        task = asyncio.create_task(overlap())
        await inside.wait()
        with pytest.raises(SignalException):
            await nest()
        with pytest.raises(SignalException):
            await task
    assert [each.closed for each in (outer, inner, other)] == [[signal.SIGTERM]] * 3


async def test_blocks_may_be_left_in_any_order() -> None:
    """The first one left takes nothing from the second, and the last one puts everything back."""
    before = signal.getsignal(signal.SIGTERM)
    first, second = Stub(), Stub()
    one, two = forward_signals(first), forward_signals(second)
    await one.__aenter__()
    await two.__aenter__()
    await one.__aexit__(None, None, None)
    async with asyncio.timeout(NET):
        send(signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        with pytest.raises(SignalException):
            await two.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)
    assert (first.closed, second.closed) == ([], [signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) == before


async def test_the_bodys_own_exception_passes() -> None:
    """Without a signal it is raised; with one it is the cause."""
    with pytest.raises(LookupError, match="mine"):
        async with forward_signals(Stub()):
            raise LookupError("mine")
    with pytest.raises(SignalException) as caught:  # noqa: PT012
        async with forward_signals(Stub()):
            send(signal.SIGTERM)
            raise LookupError("mine")
    assert isinstance(caught.value.__cause__, LookupError)


async def test_a_signal_at_the_very_end_of_the_body_counts() -> None:
    """Nothing awaited it any more, and it is not lost."""
    stub = Stub()
    with pytest.raises(SignalException):
        async with forward_signals(stub):
            send(signal.SIGTERM)
    assert stub.closed == [signal.SIGTERM]


async def test_a_cancellation_from_outside_goes_before() -> None:
    """Without a signal at once, and during a stop when it has ended."""
    stub = Stub()

    async def body() -> None:
        async with forward_signals(stub):
            inside.set()
            await asyncio.Event().wait()

    for signalled in (False, True):
        inside = asyncio.Event()
        task = asyncio.create_task(body())
        await inside.wait()
        if signalled:
            stub.may_end.clear()
            send(signal.SIGTERM)
            while not stub.closed:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        stub.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_timeout_of_the_host_works_around_it() -> None:
    """A signal doesn't confuse what counts cancellations."""
    async with asyncio.timeout(NET):
        with pytest.raises(SignalException):
            await interrupted(Stub(), signal.SIGTERM)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)


async def test_a_close_that_fails_is_the_cause() -> None:
    """The signal is what ended the block."""

    class Broken(Stub):
        async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
            raise OSError("broken")

    with pytest.raises(SignalException) as caught:
        await interrupted(Broken(), signal.SIGTERM)
    assert isinstance(caught.value.__cause__, OSError)


async def test_only_the_main_thread_can() -> None:
    """A sentence says so, and what to do."""

    async def body() -> None:
        async with forward_signals(Stub()):
            pass

    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(asyncio.run, body())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, 12345])
async def test_what_no_process_can_catch_is_refused(number: int) -> None:
    """And nothing stays installed."""
    with pytest.raises(ValueError, match=r"signal|catch"):
        async with forward_signals(Stub(), signals=(signal.SIGTERM, number)):
            pass
