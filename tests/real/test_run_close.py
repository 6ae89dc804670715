"""Closing is idempotent, bounded, and lets nobody out before all is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from aelastic import PContext, StopPolicy, StopRequested, WorkerSignaled, start_processes
from tests.leaks import lives
from tests.real.runs import PATIENT, all_events, capture, ready, start
from tests.ways_to_die import (
    DEAF_TO_TERM,
    EXIT_0,
    EXITS_0_ON_TERM,
    GRANDCHILD_KEEPS_PIPE,
    READY,
    RUNS_ON,
    WAYS,
    Way,
    python,
)

TURNS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)
SHORT = StopPolicy(steps=((signal.SIGTERM, 0.1), (signal.SIGKILL, 10.0)), drain=0.1)


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_close_ends_whatever_it_is(way: Way) -> None:
    """And returns when no process of the run is left."""
    ctx = await start({0: way, 1: way})
    pids = ctx.pids()
    await ctx.close()
    assert not [pid for pid in pids.values() if lives(pid)]
    assert ctx.result is not None


async def test_close_of_a_run_that_is_over_changes_nothing() -> None:
    """The outcome stays what it was."""
    ctx = await start(EXIT_0)
    result = await ctx.wait()
    await ctx.close()
    await ctx.close(signal.SIGKILL, 0)
    assert ctx.result is result
    assert result.outcome == "succeeded"


async def test_two_tasks_close_at_once() -> None:
    """Both return when it is over; the steps are taken once."""
    ctx = await start(RUNS_ON, logs_specs=capture(), stop=PATIENT)
    await ready(ctx)
    await asyncio.gather(ctx.close(), ctx.close(), ctx.close())
    events = await all_events(ctx)
    assert len([event for event in events if isinstance(event, StopRequested)]) == 1
    assert {event.signal for event in events if isinstance(event, WorkerSignaled)} == {signal.SIGTERM}


@pytest.mark.parametrize("turns", TURNS)
async def test_a_close_cancelled_at_any_turn_ends_the_run_first(turns: int) -> None:
    """The cancellation is raised when everything is gone."""
    ctx = await start({0: RUNS_ON, 1: DEAF_TO_TERM}, logs_specs=capture(), stop=SHORT)
    await ready(ctx)
    pids = ctx.pids()
    task = asyncio.ensure_future(ctx.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    begun = turns > 0 and task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        assert begun
    assert not [pid for pid in pids.values() if lives(pid)]
    assert ctx.result is not None


async def test_a_close_cancelled_again_and_again_ends_the_run_first() -> None:
    """However often: nobody gets out before the last process is gone."""
    ctx = await start({0: DEAF_TO_TERM, 1: RUNS_ON}, logs_specs=capture(), stop=SHORT)
    await ready(ctx)
    pids = ctx.pids()
    task = asyncio.ensure_future(ctx.close())
    await asyncio.sleep(0)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [pid for pid in pids.values() if lives(pid)]


async def test_a_signal_in_place_of_the_first() -> None:
    """`death_sig` is what the worker gets first."""
    way = Way(
        "counts",
        python(f"import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(4)); {READY}; signal.pause()"),
    )
    ctx = await start(way, logs_specs=capture(), stop=PATIENT)
    await ready(ctx)
    await ctx.close(signal.SIGINT)
    assert ctx.result is not None
    assert ctx.result.exits[0].code == 4
    assert ctx.result.outcome == "stopped"


async def test_a_later_close_with_arguments_replaces_the_steps_that_are_left() -> None:
    """SIGKILL cuts a long wait short."""
    ctx = await start(DEAF_TO_TERM, logs_specs=capture(), stop=PATIENT)
    await ready(ctx)
    patient = asyncio.ensure_future(ctx.close())
    async for event in ctx.events():
        if isinstance(event, WorkerSignaled):
            break
    await ctx.close(signal.SIGKILL)
    await patient
    assert ctx.result is not None
    assert ctx.result.exits[0].signal == signal.SIGKILL


async def test_a_timeout_in_place_of_the_first_steps() -> None:
    """Zero seconds after SIGTERM comes SIGKILL."""
    ctx = await start(DEAF_TO_TERM, logs_specs=capture(), stop=PATIENT)
    await ready(ctx)
    await ctx.close(timeout=0)
    assert ctx.result is not None
    assert ctx.result.exits[0].signal == signal.SIGKILL


async def test_all_ranks_share_one_deadline() -> None:
    """Each step goes to all of them before the next begins, so that eight take no longer than one."""
    ctx = await start(dict.fromkeys(range(8), DEAF_TO_TERM), logs_specs=capture(), stop=SHORT)
    await ready(ctx)
    await ctx.close()
    steps = [(event.signal, event.rank) for event in await all_events(ctx) if isinstance(event, WorkerSignaled)]
    assert sorted(steps[:8]) == [(signal.SIGTERM, rank) for rank in range(8)]
    assert {number for number, _ in steps[8:]} == {signal.SIGKILL}


async def test_what_a_stopped_rank_does_is_no_failure() -> None:
    """A stop that its caller asked for is neither failure nor success."""
    ctx = await start({0: EXITS_0_ON_TERM, 1: RUNS_ON}, logs_specs=capture(), stop=PATIENT)
    await ready(ctx)
    await ctx.close()
    result = await ctx.wait()
    assert (result.outcome, result.failures, result.victims) == ("stopped", {}, {})
    assert (result.exits[0].code, result.exits[1].signal) == (0, signal.SIGTERM)


async def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_exit() -> None:
    """The exit is told before the drain is over; the drain is bounded; the holder is named."""
    async with start(GRANDCHILD_KEEPS_PIPE, logs_specs=capture()) as ctx:
        result = await ctx.wait()
        told = [type(event).__name__ for event in await all_events(ctx)]
    assert result.outcome == "succeeded"
    assert told.index("WorkerExited") < told.index("OutputHeld")


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, None], ids=["asyncio", "uvloop"])
def test_a_forgotten_context_ends_with_the_loop(loop: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
    """`asyncio.run` returns after everything of the run is gone."""
    pids: list[int] = []

    async def forgetful() -> None:
        ctx: PContext = await start({0: RUNS_ON, 1: DEAF_TO_TERM}, logs_specs=capture(), stop=SHORT)
        await ready(ctx)
        pids.extend(ctx.pids().values())

    factory = loop or pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(forgetful())
    assert len(pids) == 2
    assert not [pid for pid in pids if lives(pid)]


# Not on uvloop: its loop.close() can hang after that, with a bare create_subprocess_exec too.
@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_foreign_waiter_does_not_lose_the_end() -> None:
    """Somebody else's `waitpid(-1)` may take the status; the exit is seen all the same."""
    ctx = await start_processes("test", "sleep", args={0: ("60",)}, stop=SHORT)
    pid = ctx.pids()[0]
    os.kill(pid, signal.SIGKILL)
    while True:  # takes it before the loop can turn
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
        except ChildProcessError:  # asyncio was quicker
            break
    result = await ctx.wait()
    assert result.exits[0].signal == signal.SIGKILL or not result.exits[0].known
