"""What has failed is started again, as often as was asked for, and never after a stop."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    AttemptFinished,
    AttemptStarted,
    Backoff,
    ChildFailedError,
    DefaultLogsSpecs,
    PContext,
    ProcessFailure,
    RestartPolicy,
    RestartScheduled,
    RunFinished,
    RunProcsResult,
    Starting,
    Std,
    StopRequested,
    WorkerStarted,
    start_processes,
)
from aelastic._attempt import StartAbandoned
from aelastic._gang import Gang
from aelastic._guard import Watch
from tests.real import jobs
from tests.real.runs import PATIENT, QUICK, all_events, capture, redirect

pytestmark = pytest.mark.one_loop

SCOPES = pytest.mark.parametrize("scope", ["gang", "rank"])
AT_ONCE = Backoff(initial=0.0)
NEVER = Backoff(initial=3600.0, maximum=3600.0)
SAYS_ATTEMPT = "echo $AELASTIC_RANK $AELASTIC_ATTEMPT $TORCHELASTIC_RESTART_COUNT; "
TURNS = (0, 1, 3, 8, 21, 55, 89, 144)


def restart(most: int = 3, **fields: Any) -> RestartPolicy:
    return RestartPolicy(max_restarts=most, **({"backoff": AT_ONCE} | fields))


def sh(*scripts: str, **options: Any) -> Starting:
    """One shell a rank."""
    options.setdefault("stop", QUICK)
    options.setdefault("restart", restart())
    return start_processes("test", "sh", {rank: ("-c", script) for rank, script in enumerate(scripts)}, **options)


async def result_of(starting: Starting) -> tuple[RunProcsResult, list[str]]:
    """How a run ended, and its events by name with rank and attempt."""
    async with starting as ctx:
        result = await ctx.wait()
        return result, [f"{type(event).__name__} {event.attempt}" for event in await all_events(ctx)]


async def seen(ctx: PContext, kind: type[Any], count: int = 1) -> Any:
    """Wait for the count-th event of a kind."""
    async for event in ctx.events():
        count -= isinstance(event, kind)
        if not count:
            return event
    raise AssertionError(f"the run ended without {kind.__name__}")


async def test_a_gang_restarts_together(tmp_path: Path) -> None:
    """Every rank sees the attempt, has files of its own in it, and the result is the last attempt's."""
    fails = SAYS_ATTEMPT + "[ $AELASTIC_ATTEMPT = 2 ] || exit 3"
    async with sh(fails, SAYS_ATTEMPT + "[ $AELASTIC_ATTEMPT = 2 ] || sleep 60", logs_specs=redirect(tmp_path)) as ctx:
        result = await ctx.wait()
        run = Path(ctx.log_dir)
        assert ctx.attempt == 2
        assert ctx.stdouts == result.stdouts == {rank: f"{run}/attempt_2/{rank}/stdout.log" for rank in (0, 1)}
    for attempt in range(3):
        assert (run / f"attempt_{attempt}" / "0" / "stdout.log").read_text() == f"0 {attempt} {attempt}\n"
    assert (result.outcome, result.attempts, result.gave_up) == ("succeeded", 3, "")
    assert [list(failures) for failures in result.history] == [[0], [0], []]
    assert result.history[0][0].exitcode == 3
    assert result.return_values == {0: None, 1: None}
    assert not result.victims


async def test_a_rank_restarts_alone(tmp_path: Path) -> None:
    """The others keep their processes and files; numbers are the rank's own, and the context follows the highest."""
    fails = SAYS_ATTEMPT + "[ $AELASTIC_ATTEMPT = 2 ] && exec sleep 60; exit 3"
    async with sh("exec sleep 60", fails, logs_specs=redirect(tmp_path), restart=restart(scope="rank")) as ctx:
        first = ctx.pids()[0]
        started = await seen(ctx, WorkerStarted, 4)
        run = Path(ctx.log_dir)
        assert (started.rank, started.attempt, ctx.attempt) == (1, 2, 2)
        assert ctx.pids() == {0: first, 1: started.pid}
        assert ctx.stdouts == {0: f"{run}/attempt_0/0/stdout.log", 1: f"{run}/attempt_2/1/stdout.log"}
        assert ctx.error_files[1] == f"{run}/attempt_2/1/error.json"
        assert (run / "attempt_1" / "1" / "stdout.log").read_text() == "1 1 1\n"
        await ctx.close()
        result = await ctx.wait()
    assert (result.outcome, result.attempts) == ("stopped", 3)
    assert [list(failures) for failures in result.history] == [[1], [1], []]


@SCOPES
async def test_a_crash_loop_ends_with_a_sentence(scope: str) -> None:
    """The budget is spent, and error text, result and last event say so."""
    result, events = await result_of(sh("exit 3", restart=restart(2, scope=scope)))
    assert (result.outcome, result.attempts, len(result.history)) == ("failed", 3, 3)
    assert "budget of 2 restarts is spent" in result.gave_up
    assert [event for event in events if event.startswith(("RestartS", "WorkerS", "AttemptF"))] == [
        "WorkerStarted 0", "AttemptFinished 0", "RestartScheduled 0",
        "WorkerStarted 1", "AttemptFinished 1", "RestartScheduled 1",
        "WorkerStarted 2", "AttemptFinished 2",
    ]  # fmt: skip
    with pytest.raises(ChildFailedError, match=r"Not restarted: .*budget of 2 restarts is spent"):
        result.raise_for_failures("test")


@SCOPES
async def test_a_daemon_restarts_after_a_success_too(scope: str) -> None:
    """With `when="always"`; a gang waits for all its ranks."""
    policy = restart(2, scope=scope, when="always")
    result, events = await result_of(sh("exit 0", "exit 0", restart=policy))
    assert (result.outcome, result.attempts, result.failures) == ("succeeded", 3, {})
    assert len([event for event in events if event.startswith("WorkerStarted")]) == 6
    assert "is spent" in result.gave_up


async def test_a_rank_that_is_given_up_takes_the_others_with_it() -> None:
    """They are victims, as in a gang; one that waited for its own restart isn't started again."""
    policy = restart(1, scope="rank", backoff=Backoff(initial=0.05, maximum=3600.0, factor=3600.0, jitter=0.0))
    result, events = await result_of(sh("exec sleep 60", "exit 3", restart=policy))
    assert (result.outcome, list(result.failures), list(result.victims)) == ("failed", [1], [0])
    assert events.count("StopRequested 1") == 1
    assert result.gave_up.startswith("rank 1: ")


async def test_a_rank_that_is_given_up_may_leave_the_others_alone() -> None:
    """`on_failure="continue"` holds among ranks that restart by themselves too."""
    stop = dataclasses.replace(QUICK, on_failure="continue")
    result, _ = await result_of(sh("exit 3", "sleep 0.3", restart=restart(1, scope="rank"), stop=stop))
    assert (result.outcome, list(result.failures), result.return_values) == ("failed", [0], {1: None})


async def test_an_error_file_may_refuse_another_attempt(tmp_path: Path) -> None:
    """`"retriable": false` ends the run although the budget is not spent."""
    says = (
        """echo '{"message": {"message": "bad", "extraInfo": {"retriable": false}}}' > $AELASTIC_ERROR_FILE; exit 3"""
    )
    result, _ = await result_of(sh(says, logs_specs=redirect(tmp_path)))
    assert (result.outcome, result.attempts) == ("failed", 1)
    assert "rank 0 said itself that it is not retriable" in result.gave_up


async def test_a_failure_may_be_refused_another_attempt() -> None:
    """`retriable` is asked with the whole failure."""
    asked: list[int] = []

    def retriable(failure: ProcessFailure) -> bool:
        asked.append(failure.exitcode)
        return failure.exitcode == 3

    result, _ = await result_of(sh("exit $((3 + AELASTIC_ATTEMPT))", restart=restart(9, retriable=retriable)))
    assert (result.attempts, asked) == (2, [3, 4])


@SCOPES
async def test_a_bug_in_retriable_fails_the_run_aloud(scope: str) -> None:
    """It is raised when everything is gone, by the start where that is still under way."""
    policy = restart(scope=scope, retriable=lambda failure: bool(failure.rank / 0))
    with pytest.raises(ZeroDivisionError):
        await (await sh("exit 3", "exec sleep 60", restart=policy)).wait()


async def test_a_bug_in_retriable_is_what_a_start_raises_that_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the start was abandoned, which is only its consequence."""
    first: list[Gang] = []
    start = Gang.start

    async def held_up(self: Gang) -> None:
        first.append(self)
        await start(self)
        if len(first) == 2:  # the second rank's: the first's has ended, and its policy was asked
            while not first[0].over or self._stopped is None:
                await asyncio.sleep(0.001)
            raise StartAbandoned("stopped meanwhile")

    monkeypatch.setattr(Gang, "start", held_up)
    policy = restart(scope="rank", retriable=lambda failure: bool(failure.rank / 0))
    with pytest.raises(ZeroDivisionError):
        await sh("exit 3", "exec sleep 60", restart=policy)


@SCOPES
async def test_a_start_that_fails_is_a_failure_like_another(scope: str, tmp_path: Path) -> None:
    """The command is gone after the first attempt: the budget is spent on starts, and the result tells of the last."""
    command = tmp_path / "once"
    command.write_text("#!/bin/sh\nrm $0\nexit 3\n")
    command.chmod(0o755)
    starting = start_processes("test", str(command), {0: ()}, restart=restart(2, scope=scope))
    result, events = await result_of(starting)
    assert (result.outcome, result.attempts) == ("failed", 3)
    assert [failures[0].reason for failures in result.history] == ["exited", "start_failed", "start_failed"]
    assert isinstance(result.failures[0].exception, FileNotFoundError)
    assert [event for event in events if event.startswith("Worker")] == [
        "WorkerStarted 0",
        "WorkerExited 0",
        "WorkerFailed 0",
    ]
    with pytest.raises(ChildFailedError, match="rank 0 could not be started"):
        result.raise_for_failures("test")


@SCOPES
async def test_the_first_start_is_tried_again_too(scope: str, tmp_path: Path) -> None:
    """The await goes on until it succeeds."""
    command = tmp_path / "later"

    def make(failure: ProcessFailure) -> bool:
        if len(failures) == 1:
            command.write_text("#!/bin/sh\nexit 0\n")
            command.chmod(0o755)
        failures.append(failure)
        return True

    failures: list[ProcessFailure] = []
    async with start_processes("test", str(command), {0: ()}, restart=restart(scope=scope, retriable=make)) as ctx:
        assert ctx.attempt == 2
        result = await ctx.wait()
    assert [failure.reason for failure in failures] == ["start_failed"] * 2
    assert (result.outcome, result.attempts) == ("succeeded", 3)


@SCOPES
async def test_the_first_start_raises_when_the_budget_is_spent(scope: str) -> None:
    """The error of the last try, with a note that says why there is no other; what was started is gone."""
    with pytest.raises(FileNotFoundError, match="rank 0") as caught:
        await start_processes("test", "./no-such-command", {0: (), 1: ()}, restart=restart(2, scope=scope))
    assert "budget of 2 restarts is spent" in caught.value.__notes__[0]


@SCOPES
async def test_a_stop_ends_a_backoff_at_once(scope: str) -> None:
    """The run that waited for an hour is stopped, and nothing is started after it."""
    async with sh("exit 3", restart=restart(scope=scope, backoff=NEVER)) as ctx:
        scheduled = await seen(ctx, RestartScheduled)
        assert 3240 <= scheduled.delay <= 3600
        await ctx.close()
        result = await ctx.wait()
        events = await all_events(ctx)
    assert (result.outcome, result.attempts, len(result.history[0])) == ("stopped", 1, 1)
    result.raise_for_failures("test")
    assert [type(event) for event in events[-3:]] == [RestartScheduled, StopRequested, RunFinished]


@SCOPES
@pytest.mark.parametrize("turns", TURNS)
async def test_a_stop_at_any_turn_of_a_crash_loop_is_the_end(turns: int, scope: str) -> None:
    """However it falls, between exit and next start or during it: nothing begins after it, nothing is left."""
    ctx = await sh("exit 3", "exit 0", restart=restart(1000, scope=scope, when="always"), logs_specs=capture())
    for _ in range(turns):
        await asyncio.sleep(0)
    await ctx.close()
    assert ctx.pids() == {}
    events = await all_events(ctx)
    closed = next(i for i, event in enumerate(events) if isinstance(event, StopRequested) and "closed" in event.reason)
    assert not [event for event in events[closed:] if isinstance(event, (AttemptStarted, RestartScheduled))]
    assert (await ctx.wait()).outcome == "stopped"


@SCOPES
@pytest.mark.parametrize("turns", TURNS)
async def test_a_start_cancelled_at_any_turn_of_its_retries_leaves_nothing(turns: int, scope: str) -> None:
    """The retries end with the cancellation."""

    async def begin() -> PContext:
        return await start_processes("test", "no-such-command", {0: ()}, restart=restart(1000, scope=scope))

    task = asyncio.ensure_future(begin())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_rank_that_can_not_be_started_takes_down_those_before_it(tmp_path: Path) -> None:
    """A half start is no start, with restarts of single ranks too."""
    args = {0: ("sleep", "60"), 1: ("sleep", "60"), 2: ("true", "x" * 300_000)}
    with pytest.raises(OSError, match="test rank 2"):
        await start_processes("test", "env", args, restart=restart(1, scope="rank"), stop=PATIENT)


@SCOPES
async def test_the_old_tree_is_gone_before_the_new_start(scope: str, tmp_path: Path) -> None:
    """A grandchild in a session of its own, deaf to SIGTERM, doesn't see the next attempt."""
    leaves = "trap '' TERM; setsid sleep 600 <&- >&- 2>&- & echo $! > pid; exit 3"
    looks = (
        'p=$(cat pid); grep -aq "$AELASTIC_RUN_ID" /proc/$p/environ && exit 9; exit 0'  # the number may be another's
    )
    script = f"cd {tmp_path}; [ $AELASTIC_ATTEMPT = 1 ] && {{ {looks}; }}; {leaves}"
    result, _ = await result_of(sh(script, restart=restart(1, scope=scope)))
    assert (result.outcome, result.exits[0].code) == ("succeeded", 0)


@SCOPES
async def test_lines_and_output_go_on_over_all_attempts(scope: str, tmp_path: Path) -> None:
    """One subscription reads them all, told apart by their attempt; filters have a file each attempt."""
    logs = DefaultLogsSpecs(tmp_path, tee=Std.OUT)
    policy = restart(2, scope=scope, when="always", backoff=Backoff(initial=0.1))
    async with sh("echo keep $AELASTIC_ATTEMPT; echo drop", logs_specs=logs, restart=policy,
                  duplicate_stdout_filters=["keep"]) as ctx:  # fmt: skip
        lines = [(line.attempt, line.number, line.text) async for line in ctx.lines()]
        await ctx.wait()
    assert lines == [(k, number, text) for k in range(3) for number, text in ((1, f"keep {k}"), (2, "drop"))]
    filtered = [Path(ctx.log_dir, f"attempt_{k}", "filtered_stdout.log").read_text() for k in range(3)]
    assert filtered == [f"[test0]:keep {k}\n" for k in range(3)]


async def test_a_hundred_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither processes, descriptors, threads nor tasks (checked after each test), nor read streams of the past."""
    async with sh("echo x", "echo y", restart=restart(50, scope="rank", when="always"), logs_specs=capture()) as ctx:
        lines = ctx.lines()
        texts = [line.text async for line in lines]
        result = await ctx.wait()
    assert len(texts) >= 100  # the first two may have come before there was a subscription
    assert set(texts) == {"x", "y"}
    assert (result.attempts, len(result.history), lines._streams) == (51, 51, [])


async def test_the_guard_knows_each_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of every new worker, in the place of the rank's former one."""
    told: list[tuple[int, int]] = []
    tell = Watch.worker

    def worker(self: Watch, rank: int, pid: int, pidfd: int | None, held_ticks: int) -> None:
        told.append((rank, pid))
        tell(self, rank, pid, pidfd, held_ticks)

    monkeypatch.setattr(Watch, "worker", worker)
    async with sh("exit 3", restart=restart(2)) as ctx:
        await ctx.wait()
        events = await all_events(ctx)
    assert told == [(event.rank, event.pid) for event in events if isinstance(event, WorkerStarted)]


ENDS_AT_FIRST = "import os; value = os.environ['AELASTIC_ATTEMPT']; value != '0' or os._exit(3)"


@SCOPES
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
async def test_functions_restart_too(method: Any, scope: str) -> None:
    """What they return is the last attempt's; a rank that had returned alone keeps its value."""
    args = {0: (ENDS_AT_FIRST,), 1: ("import os; value = os.environ['AELASTIC_ATTEMPT']",)}
    policy = restart(scope=scope)
    async with start_processes("test", jobs.evaluate, args, start_method=method, restart=policy) as ctx:
        result = await ctx.wait()
    assert (result.outcome, result.attempts) == ("succeeded", 2)
    assert result.return_values == {0: "1", 1: "1" if scope == "gang" else "0"}
    assert result.history[0][0].exitcode == 3


async def test_a_lost_fork_server_is_started_again() -> None:
    """The next attempt finds another one."""
    kills_it = "import os, signal; value = 5; os.environ['AELASTIC_ATTEMPT'] != '0' or os.kill(os.getppid(), 9)"
    async with start_processes(
        "test", jobs.evaluate, {0: (kills_it + "; value != '0' or signal.pause()",)}, start_method="forkserver",
        restart=restart(when="always"),
    ) as ctx:  # fmt: skip
        result = await ctx.wait()
    assert (result.attempts, result.return_values) == (4, {0: 5})


async def test_every_attempt_is_settled_once(tmp_path: Path) -> None:
    """`reify` is called once for each, with the environments that its workers see."""

    class Counted(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> Any:
            settled.append([(env["AELASTIC_RANK"], env["AELASTIC_ATTEMPT"]) for env in envs.values()])
            return super().reify(envs)

    settled: list[Any] = []
    await result_of(sh("exit 3", "exec sleep 60", restart=restart(1), logs_specs=Counted(tmp_path, redirects=Std.ALL)))
    assert settled == [[(rank, attempt) for rank in "01"] for attempt in "01"]


async def test_what_is_lost_is_counted_over_all_attempts(tmp_path: Path) -> None:
    """A full disk in the first attempt is in the result of the last."""

    class Full(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> Any:
            dest = super().reify(envs)
            dest.stdouts[0] = dest.tee_stdouts[0] = "/dev/full"
            return dest

    policy = restart(2, when="always")
    result, _ = await result_of(sh("echo 12345", restart=policy, logs_specs=Full(tmp_path, tee=Std.OUT)))
    assert result.lost_bytes == 3 * 6


async def test_an_attempt_that_succeeds_says_so_in_its_event() -> None:
    """Each attempt tells how it ended; the run tells of the last."""
    async with sh("[ $AELASTIC_ATTEMPT = 1 ]", "true") as ctx:
        await ctx.wait()
        events = await all_events(ctx)
    assert [event.succeeded for event in events if isinstance(event, AttemptFinished)] == [False, True]
    assert isinstance(events[-1], RunFinished)
    assert events[-1].succeeded


def test_a_forgotten_context_in_its_backoff_ends_with_the_loop() -> None:
    """`asyncio.run` does not wait for the next attempt."""

    async def forgetful() -> None:
        ctx = await sh("exit 3", restart=restart(backoff=NEVER))
        await seen(ctx, RestartScheduled)

    asyncio.run(forgetful())
