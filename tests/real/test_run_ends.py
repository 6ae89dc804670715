"""However a worker ends, the run tells how, keeps what it wrote, and leaves nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aelastic import ChildFailedError, DefaultLogsSpecs, ExitStatus, Std, WorkerFailed, WorkerOptions
from tests.real.runs import QUICK, all_events, capture, ready, redirect, start, tee
from tests.ways_to_die import ENDING, EXIT_0, EXIT_3, KILLED, LINGERING, RUNS_ON, WAYS, WRAPPED, Way

ROUTES = pytest.mark.parametrize("logs", [redirect, tee], ids=["redirected", "teed"])


def status(way: Way) -> ExitStatus:
    return ExitStatus(way.code, None if way.signal is None else int(way.signal))


@ROUTES
@pytest.mark.parametrize("way", ENDING, ids=str)
async def test_an_end_is_told_and_every_byte_kept(
    way: Way, logs: Callable[[Path], DefaultLogsSpecs], tmp_path: Path
) -> None:
    """Exit status, outcome and files are what the worker did."""
    async with start(way, logs_specs=logs(tmp_path)) as ctx:
        result = await ctx.wait()
    assert result.exits == {0: status(way)}
    assert result.outcome == ("succeeded" if way.succeeds else "failed")
    assert result.return_values == ({0: None} if way.succeeds else {})
    assert Path(result.stdouts[0]).read_bytes() == way.stdout
    stderr = Path(result.stderrs[0]).read_bytes()
    assert stderr.endswith(way.stderr)
    assert bool(stderr) == bool(way.stderr)
    assert (result.lost_bytes, result.survivors, result.victims) == (0, (), {})
    assert ctx.pids() == {}


@pytest.mark.parametrize("way", [way for way in ENDING if not way.succeeds], ids=str)
async def test_a_failure_says_something(way: Way, tmp_path: Path) -> None:
    """Code or signal in words, the last lines, how long it lived."""
    async with start(way, logs_specs=redirect(tmp_path)) as ctx:
        result = await ctx.wait()
    failure = result.root_cause
    assert failure is result.failures[0]
    assert (failure.rank, failure.status, failure.exitcode) == (0, status(way), status(way).returncode)
    assert failure.reason == ("exited" if way.signal is None else "signaled")
    assert failure.seconds > 0
    if way.stderr:
        assert failure.tail[-1] == way.stderr.decode().rstrip()
    with pytest.raises(ChildFailedError, match="test failed: rank 0") as caught:
        result.raise_for_failures("test")
    assert status(way).describe() in str(caught.value)
    assert all(len(line) <= 100 for line in str(caught.value).splitlines())


@pytest.mark.parametrize("way", LINGERING, ids=str)
async def test_what_runs_on_is_stopped_by_close(way: Way) -> None:
    """A stop is neither a failure nor a success, and names no victims."""
    ctx = await start(way, logs_specs=capture())
    await ready(ctx)
    await ctx.close()
    result = await ctx.wait()
    assert (result.outcome, result.failures, result.victims) == ("stopped", {}, {})
    if way is not WRAPPED:
        assert result.exits == {0: status(way)}
    result.raise_for_failures()
    assert ctx.pids() == {}


@pytest.mark.parametrize("way", [EXIT_3, KILLED], ids=str)
async def test_one_failure_stops_the_others_as_victims(way: Way, tmp_path: Path) -> None:
    """The root cause is the one that failed by itself."""
    async with start({0: RUNS_ON, 1: way, 2: RUNS_ON}, logs_specs=redirect(tmp_path)) as ctx:
        result = await ctx.wait()
    assert set(result.failures) == {1}
    assert result.root_cause.rank == 1
    assert result.victims == {rank: result.exits[rank] for rank in (0, 2)}
    assert all(status.signal == signal.SIGTERM for status in result.victims.values())
    assert set(result.exits) == {0, 1, 2}


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_each_way_beside_a_failure_leaves_nothing(way: Way) -> None:
    """Whatever the other rank is like, it is gone when the result is there."""
    async with start({0: way, 1: EXIT_3}) as ctx:
        result = await ctx.wait()
    assert result.is_failed()
    assert ctx.pids() == {}


async def test_streams_are_inherited_without_log_specs(capfd: pytest.CaptureFixture[str]) -> None:
    """As torch does: what a worker prints goes where the host's output goes."""
    async with start({0: EXIT_0, 1: EXIT_0}) as ctx:
        await ctx.wait()
    assert capfd.readouterr().out == "ready\nready\n"
    assert (ctx.log_dir, ctx.stdouts) == ("", {0: "", 1: ""})


async def test_a_tee_is_shown_line_by_line_with_its_rank(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whole lines, each with a prefix, none interleaved."""
    async with start({0: EXIT_0, 1: EXIT_0}, logs_specs=tee(tmp_path), name="job") as ctx:
        await ctx.wait()
    assert sorted(capfd.readouterr().out.splitlines()) == ["[job0]:ready", "[job1]:ready"]


async def test_on_failure_continue_lets_the_others_end(tmp_path: Path) -> None:
    """The others' success is theirs; the run has failed all the same."""
    slow = Way("slow", ("sh", "-c", "read line < go; exit 0"), code=0)
    os.mkfifo(tmp_path / "go")
    policy, options = replace(QUICK, on_failure="continue"), WorkerOptions(cwd=str(tmp_path))
    async with start({0: EXIT_3, 1: slow}, stop=policy, options=options) as ctx:
        async for event in ctx.events():
            if isinstance(event, WorkerFailed):
                break
        with open(tmp_path / "go", "w", encoding="ascii") as go:
            go.write("\n")
        result = await ctx.wait()
    assert (result.outcome, set(result.failures), result.victims) == ("failed", {0}, {})
    assert result.return_values == {1: None}


async def test_the_events_tell_the_same_story() -> None:
    """Started, exited, failed: in that order for the rank, and the run's own around them."""
    async with start({0: EXIT_3, 1: RUNS_ON}, logs_specs=capture()) as ctx:
        await ctx.wait()
        told = await all_events(ctx)
    names = [type(event).__name__ for event in told]
    assert names[:2] == ["RunStarted", "AttemptStarted"]
    assert names[-2:] == ["AttemptFinished", "RunFinished"]
    of_rank = [type(event).__name__ for event in told if getattr(event, "rank", None) == 0]
    assert of_rank == ["WorkerStarted", "WorkerExited", "WorkerFailed"]
    assert [event.seq for event in told] == list(range(len(told)))


async def test_the_capture_alone_writes_no_file() -> None:
    """`capture` pipes a stream for `lines()` only."""
    async with start(EXIT_0, logs_specs=capture()) as ctx:
        texts = [line.text async for line in ctx.lines(std=Std.OUT)]
    assert texts == ["ready"]
    assert ctx.stdouts == {0: ""}
