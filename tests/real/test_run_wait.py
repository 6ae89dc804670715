"""Waiting asks and never harms: results, timeouts, lines and events."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from aelastic import LineNotSeen, RankMappingError, RunFinished, Std, StreamNotCaptured, WorkerExited, WorkerSignaled
from tests.real.runs import all_events, capture, ready, redirect, start
from tests.ways_to_die import EXIT_0, EXIT_3, EXITS_0_ON_TERM, INVALID_UTF8, NO_NEWLINE, RUNS_ON


async def test_a_wait_of_zero_seconds_asks() -> None:
    """None while it runs, the result when it is there."""
    async with start(RUNS_ON) as ctx:
        assert await ctx.wait(0) is None
        assert ctx.result is None
    assert await ctx.wait(0) is ctx.result is not None


async def test_a_wait_that_expires_gives_none_and_harms_nobody() -> None:
    """The run goes on."""
    async with start(RUNS_ON, logs_specs=capture()) as ctx:
        assert await ctx.wait(0.01) is None
        assert ctx.pids().keys() == {0}


async def test_a_negative_timeout_waits_for_ever() -> None:
    """As torch has it."""
    async with start(EXIT_0) as ctx:
        assert (await ctx.wait(-1)).outcome == "succeeded"


async def test_any_number_of_tasks_wait_for_one_result() -> None:
    """They get the same object."""
    async with start(EXIT_0) as ctx:
        results = await asyncio.gather(*(ctx.wait() for _ in range(100)))
    assert all(result is ctx.result for result in results)


async def test_cancelling_a_wait_stops_only_the_waiting() -> None:
    """The worker lives on, and another wait gets the result."""
    async with start(RUNS_ON, logs_specs=capture()) as ctx:
        await ready(ctx)
        for what in (ctx.wait(), ctx.wait_for_line("never"), anext(ctx.lines(replay=False))):
            task = asyncio.ensure_future(what)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ctx.pids().keys() == {0}
        ctx.send_signal(signal.SIGKILL)
        assert (await ctx.wait()).exits[0].signal == signal.SIGKILL


async def test_every_subscriber_gets_every_event_in_order() -> None:
    """From the beginning, early or late, until the run has finished."""
    async with start({0: EXIT_0, 1: EXIT_3}) as ctx:
        early = asyncio.ensure_future(all_events(ctx))
        await ctx.wait()
        late = await all_events(ctx)
        assert await early == late
    assert isinstance(late[-1], RunFinished)
    assert [event.seq for event in late] == list(range(len(late)))
    assert [event.monotonic_ns for event in late] == sorted(event.monotonic_ns for event in late)
    assert {(event.run_id, event.name, event.attempt) for event in late} == {(ctx.run_id, "test", 0)}
    assert len([event for event in late if isinstance(event, WorkerExited)]) == 2


async def test_events_without_replay_begin_at_the_call() -> None:
    """The subscription begins at the call, not at the first read."""
    async with start(EXITS_0_ON_TERM, logs_specs=capture()) as ctx:
        await ready(ctx)
        events = ctx.events(replay=False)
        ctx.send_signal(signal.SIGTERM)
        await ctx.wait()
        told = [type(event) async for event in events]
    assert told[0] is WorkerSignaled
    assert told[-1] is RunFinished


async def test_the_journal_holds_what_was_told(tmp_path: Path) -> None:
    """Each event is a line of JSON in the run's folder, the last one before the result is there."""
    async with start({0: EXIT_0, 1: EXIT_3}, logs_specs=redirect(tmp_path)) as ctx:
        await ctx.wait()
        lines = (Path(ctx.log_dir) / "events.jsonl").read_text().splitlines()
        events = await all_events(ctx)
    assert [json.loads(line) for line in lines] == [json.loads(json.dumps(event.to_dict())) for event in events]


async def test_without_a_journal_there_is_none(tmp_path: Path) -> None:
    """`journal=False` writes none."""
    async with start(EXIT_0, logs_specs=redirect(tmp_path), journal=False) as ctx:
        await ctx.wait()
    assert not (Path(ctx.log_dir) / "events.jsonl").exists()


async def test_every_event_is_a_sentence() -> None:
    """`str` names the run and says what happened."""
    async with start({0: EXIT_3, 1: RUNS_ON}) as ctx:
        await ctx.wait()
        sentences = [str(event) for event in await all_events(ctx)]
    assert all(sentence.startswith("test: ") for sentence in sentences)
    assert any("rank 0" in sentence and "exited with code 3" in sentence for sentence in sentences)


async def test_lines_come_decoded_without_newline_and_end_with_the_run() -> None:
    """A last line without a newline is one; invalid bytes are replaced."""
    async with start({0: NO_NEWLINE, 1: INVALID_UTF8}, logs_specs=capture()) as ctx:
        lines = [line async for line in ctx.lines()]
    told = {
        (rank, std): [line.text for line in lines if (line.rank, line.std) == (rank, std)]
        for rank in (0, 1)
        for std in (Std.OUT, Std.ERR)
    }
    assert told == {
        (0, Std.OUT): ["ready", "end"],
        (0, Std.ERR): [],
        (1, Std.OUT): ["ready", "a\ufffd\0b", "\ufffd"],
        (1, Std.ERR): ["\ufffd"],
    }


async def test_lines_of_some_ranks_only() -> None:
    """`ranks` chooses; an unknown one is told."""
    async with start({0: EXIT_0, 1: EXIT_0}, logs_specs=capture()) as ctx:
        assert {line.rank async for line in ctx.lines(ranks=[1])} == {1}
        with pytest.raises(RankMappingError, match="2"):
            ctx.lines(ranks=[2])
        with pytest.raises(RankMappingError, match="7"):
            ctx.send_signal(signal.SIGTERM, ranks=[7])


async def test_lines_of_a_redirect_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """The error says where the stream goes and which option to set."""
    async with start(EXIT_0, logs_specs=redirect(tmp_path)) as ctx:
        with pytest.raises(StreamNotCaptured, match=r"stdout\.log") as caught:
            ctx.lines()
        await ctx.wait()
    assert "capture" in str(caught.value) or "tee" in str(caught.value)


async def test_a_line_is_awaited() -> None:
    """The match tells rank, stream and text."""
    async with start({0: EXIT_0, 1: RUNS_ON}, logs_specs=capture()) as ctx:
        found = await ctx.wait_for_line("re(a)dy", rank=1)
        assert (found.line.rank, found.line.std, found.text, found.match[1]) == (1, Std.OUT, "ready", "a")


async def test_a_line_that_never_comes_ends_with_the_streams() -> None:
    """LineNotSeen, with the tail."""
    async with start(EXIT_0, logs_specs=capture()) as ctx:
        with pytest.raises(LineNotSeen, match="ready") as caught:
            await ctx.wait_for_line("never")
    assert caught.value.tail


async def test_a_line_that_does_not_come_in_time_is_a_timeout_with_the_tail() -> None:
    """Nobody is harmed by it."""
    async with start(RUNS_ON, logs_specs=capture()) as ctx:
        await ready(ctx)
        with pytest.raises(TimeoutError, match="ready"):
            await ctx.wait_for_line("never", timeout=0.01)
        assert ctx.pids().keys() == {0}


async def test_a_signal_reaches_the_ranks_that_are_named() -> None:
    """Ranks that have ended are left out silently."""
    async with start({0: EXITS_0_ON_TERM, 1: EXITS_0_ON_TERM}, logs_specs=capture()) as ctx:
        await ready(ctx)
        ctx.send_signal(signal.SIGTERM, ranks=[0])
        async for event in ctx.events():
            if isinstance(event, WorkerExited):
                break
        assert ctx.pids().keys() == {1}
        ctx.send_signal(signal.SIGTERM)
        result = await ctx.wait()
    assert (result.outcome, {status.code for status in result.exits.values()}) == ("succeeded", {0})


async def test_a_signal_that_does_not_exist_is_told() -> None:
    """Before it is sent."""
    async with start(RUNS_ON) as ctx:
        with pytest.raises(ValueError, match="signal"):
            ctx.send_signal(12345)
