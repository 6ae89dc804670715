"""Several runs under one roof: started in order, restarted together, ended in reverse."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from aelastic import (
    AttemptStarted,
    Backoff,
    ChildFailedError,
    Event,
    HealthPolicy,
    LinePattern,
    PContext,
    RestartPolicy,
    RestartScheduled,
    RunFinished,
    Supervisor,
    SupervisorFailed,
    WorkerStarted,
)
from tests.real.runs import QUICK, capture

SLEEPS = "exec sleep 600"
SAYS_READY = "sleep 0.05; echo ready; exec sleep 600"
READY = HealthPolicy(ready=LinePattern("ready"))


async def start(sup: Supervisor, name: str, script: str = SLEEPS, **options: Any) -> PContext:
    """One shell, kept."""
    return await sup.start(name, "sh", {0: ("-c", script)}, stop=QUICK, **options)


async def ready(sup: Supervisor, name: str, **options: Any) -> PContext:
    """One shell that is ready a moment after its start, kept."""
    return await start(sup, name, SAYS_READY, health=READY, logs_specs=capture(), **options)


def kill(ctx: PContext) -> None:
    os.kill(ctx.pids()[0], signal.SIGKILL)


async def started(sup: Supervisor, *, attempts: dict[str, int]) -> list[Event]:
    """The events until each of these runs has started so many attempts."""
    events: list[Event] = []
    left = dict(attempts)
    async for event in sup.events():
        events.append(event)
        if isinstance(event, WorkerStarted) and event.name in left:
            left[event.name] -= 1
        if not any(count > 0 for count in left.values()):
            return events
    raise AssertionError(f"the supervisor ended before {left}")


def told(events: list[Event], *kinds: type[Event]) -> list[tuple[str, str, int]]:
    return [(type(event).__name__, event.name, event.attempt) for event in events if isinstance(event, kinds)]


@pytest.mark.parametrize(
    ("strategy", "restarted"),
    [("one_for_one", ["b"]), ("one_for_all", ["a", "b", "c"]), ("rest_for_one", ["b", "c"])],
)
async def test_a_strategy_says_who_restarts(strategy: Any, restarted: list[str]) -> None:
    """In the order of the starts, as a further attempt of the same run; the others keep their processes."""
    async with Supervisor(strategy=strategy) as sup:
        contexts = {name: await start(sup, name) for name in "abc"}
        before = {name: ctx.pids() for name, ctx in contexts.items()}
        kill(contexts["b"])
        events = await started(sup, attempts={name: 1 + (name in restarted) for name in "abc"})
        assert [name for _, name, attempt in told(events, AttemptStarted) if attempt == 1] == restarted
        assert [name for name in "abc" if contexts[name].pids() != before[name]] == restarted
        assert [name for name in "abc" if contexts[name].attempt == 1] == restarted
    results = {name: await ctx.wait() for name, ctx in contexts.items()}
    assert {result.outcome for result in results.values()} == {"stopped"}
    assert list(results["b"].history[0]) == [0]
    assert not results["a"].history[0]


async def test_ends_come_in_reverse() -> None:
    """The one that was started last ends first, and each is over before the next is stopped."""
    async with Supervisor() as sup:
        for name in "abc":
            await start(sup, name)
        events = sup.events()
    assert [name for _, name, _ in told([event async for event in events], RunFinished)] == ["c", "b", "a"]


async def test_a_start_waits_for_those_it_comes_after() -> None:
    """Until they are ready, restarts of theirs included."""
    async with Supervisor(strategy="rest_for_one") as sup:
        db = await ready(sup, "db")
        await start(sup, "web", after=db)
        await start(sup, "cache", after=[db])
        kill(db)
        events = await started(sup, attempts={"db": 2, "web": 2, "cache": 2})
    names = [
        f"{event.name} {type(event).__name__}"
        for event in events
        if type(event).__name__ in ("WorkerStarted", "WorkerReady")
    ]
    first = ["db WorkerStarted", "db WorkerReady", "web WorkerStarted", "cache WorkerStarted"]
    assert names == first * 2


async def test_one_that_falls_while_others_wait_for_it_is_tried_again() -> None:
    """Those after it wait on, and come up when it does."""
    flaky = "[ $AELASTIC_ATTEMPT = 1 ] && exit 3; echo ready; exec sleep 600"
    async with Supervisor(strategy="one_for_all") as sup:
        db = await start(sup, "db", flaky, health=READY, logs_specs=capture())
        await start(sup, "web", after=db)
        kill(db)
        events = await started(sup, attempts={"db": 3, "web": 2})
    assert told(events, WorkerStarted) == [
        ("WorkerStarted", "db", 0), ("WorkerStarted", "web", 0), ("WorkerStarted", "db", 1),
        ("WorkerStarted", "db", 2), ("WorkerStarted", "web", 1),
    ]  # fmt: skip


async def test_a_spent_intensity_ends_the_block() -> None:
    """Everything is ended, the body is cancelled, and the error tells who fell last and why."""
    with pytest.raises(SupervisorFailed, match=r"loop: rank 0 .* code 3 .*2 restarts within 60 s") as caught:  # noqa: PT012  # the end of the block is what raises
        async with Supervisor(intensity=2) as sup:
            other = await start(sup, "other")
            loop = await start(sup, "loop", "exit 3")
            await asyncio.sleep(3600)
    assert caught.value.fallen == "loop"
    assert isinstance(caught.value.__cause__, ChildFailedError)
    assert loop.result is not None
    assert (loop.result.outcome, loop.result.attempts) == ("failed", 3)
    assert "2 restarts within 60 s of its supervisor were not enough" in loop.result.gave_up
    assert other.result is not None
    assert other.result.outcome == "stopped"


async def test_a_spent_intensity_lets_another_error_pass() -> None:
    """What the body raises is told, with a note."""
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012  # the end of the block is what raises
        async with Supervisor(intensity=0) as sup:
            loop = await start(sup, "loop", "exit 3")
            try:
                await loop.wait()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                raise ZeroDivisionError from None
    assert "the supervisor gave up" in caught.value.__notes__[0]


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Everything is ended first."""
    entered: list[PContext] = []

    async def body() -> None:
        async with Supervisor() as sup:
            entered.append(await start(sup, "one"))
            await sup.wait()

    task = asyncio.ensure_future(body())
    while not entered:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert entered[0].result is not None


async def test_a_run_spends_its_own_budget_first() -> None:
    """A fall is what its own policy has given up; its budget then begins anew."""
    policy = RestartPolicy(max_restarts=1, backoff=Backoff(initial=0.0))
    with pytest.raises(SupervisorFailed):  # noqa: PT012  # the end of the block is what raises
        async with Supervisor(intensity=1) as sup:
            loop = await start(sup, "loop", "exit 3", restart=policy)
            events = sup.events()
            await sup.wait()
    assert loop.result is not None
    assert loop.result.attempts == 4
    scheduled = [event.attempt for event in [event async for event in events] if isinstance(event, RestartScheduled)]
    assert scheduled == [0, 1, 2]


async def test_what_succeeds_or_is_closed_is_left_alone() -> None:
    """It is over, and no restart of others brings it back."""
    async with Supervisor(strategy="one_for_all") as sup:
        job = await start(sup, "job", "exit 0")
        closed = await start(sup, "closed")
        serves = await start(sup, "serves")
        await job.wait()
        await closed.close()
        kill(serves)
        await started(sup, attempts={"serves": 2})
        assert job.result is not None
        assert (job.result.outcome, job.result.attempts) == ("succeeded", 1)
        assert closed.result is not None
        assert closed.result.outcome == "stopped"


async def test_a_daemon_falls_when_it_ends_well() -> None:
    """`when="always"` holds under a supervisor without a budget of its own."""
    async with Supervisor() as sup:
        await start(sup, "daemon", "[ $AELASTIC_ATTEMPT = 2 ] && exec sleep 600", restart=RestartPolicy(when="always"))
        await started(sup, attempts={"daemon": 3})


async def test_wait_returns_when_all_are_over() -> None:
    """And the block then has nothing left to end."""
    async with Supervisor() as sup:
        first, second = await start(sup, "first", "exit 0"), await start(sup, "second", "sleep 0.05")
        await sup.wait()
        assert first.result is not None
        assert second.result is not None


async def test_a_run_that_can_not_be_started_is_not_kept() -> None:
    """Its error is the caller's, and the others live on."""
    async with Supervisor() as sup:
        one = await start(sup, "one")
        with pytest.raises(FileNotFoundError):
            await sup.start("two", "no-such-command", {0: ()})
        assert one.pids()


async def test_a_restart_that_can_not_be_started_is_another_fall(tmp_path: Any) -> None:
    """The command is gone: the intensity is spent on it."""
    command = tmp_path / "once"
    command.write_text("#!/bin/sh\nrm $0\nexit 3\n")
    command.chmod(0o755)
    with pytest.raises(SupervisorFailed, match="could not be started"):  # noqa: PT012  # the end of the block is what raises
        async with Supervisor(intensity=2) as sup:
            once = await sup.start("once", str(command), {0: ()})
            await sup.wait()
    assert once.result is not None
    assert [failures[0].reason for failures in once.result.history] == ["exited", "start_failed", "start_failed"]


async def test_supervisors_nest() -> None:
    """The one below is restarted as one child when its intensity is spent; its events go into both streams."""
    async with Supervisor(intensity=1) as sup:
        outside = await start(sup, "outside")
        below = await sup.nest(strategy="one_for_all", intensity=0)
        a, b = await start(below, "a"), await start(below, "b")
        before = outside.pids()
        kill(a)
        events = await started(sup, attempts={"a": 2, "b": 2})
        assert outside.pids() == before
        assert (a.attempt, b.attempt) == (1, 1)
        own = below.events()
    assert told(events, RestartScheduled) == [("RestartScheduled", "a", 0), ("RestartScheduled", "b", 0)]
    assert {event.name async for event in own} == {"a", "b"}


async def test_a_nest_that_falls_too_often_takes_all_with_it() -> None:
    """Its fall is the last one the supervisor above can bear."""
    with pytest.raises(SupervisorFailed, match=r"a supervisor below gave up: loop: rank 0"):  # noqa: PT012  # the end of the block is what raises
        async with Supervisor(intensity=1) as sup:
            outside = await start(sup, "outside")
            below = await sup.nest(intensity=1)
            loop = await start(below, "loop", "exit 3")
            await sup.wait()
    assert loop.result is not None
    assert (loop.result.outcome, loop.result.attempts) == ("failed", 4)
    assert outside.result is not None


@pytest.mark.parametrize("turns", [0, 1, 3, 8, 21, 55, 144, 377])
async def test_an_end_at_any_turn_of_a_restart_leaves_nothing(turns: int) -> None:
    """Whatever is being brought down or up as the block ends."""
    async with Supervisor(strategy="one_for_all", intensity=100) as sup:
        db = await ready(sup, "db")
        web = await start(sup, "web", after=db)
        kill(db)
        for _ in range(turns):
            await asyncio.sleep(0)
    assert db.result is not None
    assert web.result is not None


async def test_it_must_be_entered_and_starts_nothing_at_its_end() -> None:
    """With a sentence each."""
    sup = Supervisor()
    with pytest.raises(RuntimeError, match="not entered"):
        await sup.start("one", "true", {0: ()})
    async with sup:
        pass
    with pytest.raises(RuntimeError, match="ending"):
        await sup.start("one", "true", {0: ()})
    with pytest.raises(RuntimeError, match="entered already"):
        await sup.__aenter__()


@pytest.mark.parametrize("fields", [{"strategy": "all"}, {"intensity": -1}, {"intensity": 1.5}, {"period": 0}], ids=str)
async def test_it_checks_what_it_is_given(fields: Any) -> None:
    """With a sentence that names the field."""
    with pytest.raises((TypeError, ValueError), match=f"Supervisor: {next(iter(fields))}"):
        Supervisor(**fields)


def test_a_forgotten_supervisor_ends_with_the_loop() -> None:
    """`asyncio.run` returns, and nothing is left."""

    async def forgetful() -> None:
        sup = await Supervisor().__aenter__()
        await start(sup, "one")

    asyncio.run(forgetful())
