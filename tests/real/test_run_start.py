"""A half start is no start, and a cancelled one leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from aelastic import DefaultLogsSpecs, PContext, Starting, Std, start_processes
from aelastic._run import Run
from tests.real.runs import PATIENT, capture, ready, redirect, start
from tests.ways_to_die import DEAF_TO_TERM, DIES_STARTING, EXIT_0, EXIT_3, RUNS_ON, WAYS, Way

TURNS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584)
"""Turns of the loop after which a start is cancelled: from its first await to after its last."""
TOO_LONG = ("true", "x" * 300_000)
"""Arguments that execve(2) refuses with E2BIG, which nothing can know before it is tried."""


async def cancelled_after(turns: int, what: Starting) -> PContext | None:
    """Cancel an await after so many turns of the loop; None if it was cancelled in time."""

    async def begin() -> PContext:
        return await what

    task = asyncio.ensure_future(begin())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


@pytest.mark.parametrize("turns", TURNS)
async def test_a_start_cancelled_at_any_turn_leaves_nothing(turns: int, tmp_path: Path) -> None:
    """Everything that was started is gone when the cancellation arrives."""
    ctx = await cancelled_after(turns, start(dict.fromkeys(range(3), RUNS_ON), logs_specs=redirect(tmp_path)))
    if ctx is not None:
        await ctx.close()


async def test_a_start_cancelled_again_and_again_leaves_nothing() -> None:
    """A second native cancellation breaks a shield of anyio's; it must not break the teardown."""
    task = asyncio.ensure_future(begun(start(dict.fromkeys(range(3), DEAF_TO_TERM), logs_specs=capture())))
    while not task.done():
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def begun(starting: Starting) -> PContext:
    return await starting


async def test_a_start_cancelled_as_it_succeeds_has_ended_when_the_cancellation_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody is given the context of such a start, so nobody else could close it."""
    begin, runs = Run.begin, []

    def begin_and_cancel(run: Run) -> None:
        runs.append(run)
        run.started.add_done_callback(lambda _: task.cancel())
        begin(run)

    monkeypatch.setattr(Run, "begin", begin_and_cancel)
    task = asyncio.ensure_future(begun(start(dict.fromkeys(range(2), RUNS_ON), logs_specs=capture())))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [run.result is not None for run in runs] == [True]


async def test_a_start_under_a_timeout_leaves_nothing() -> None:
    """`asyncio.timeout` cancels as anybody does."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await start(RUNS_ON)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("others", [RUNS_ON, EXIT_0, EXIT_3, DEAF_TO_TERM], ids=str)
async def test_a_start_that_fails_at_one_rank_takes_the_rest_down(rank: int, others: Way) -> None:
    """Ranks before it are gone before the exception arrives; ranks after it were never there."""
    ways = dict.fromkeys(range(4), others) | {rank: Way("too long", TOO_LONG)}
    with pytest.raises(OSError, match=f"test rank {rank}"):
        await start(ways, logs_specs=capture())


async def test_an_exit_during_the_start_is_judged_afterwards() -> None:
    """The start succeeds; the result then says who failed."""
    async with start({0: DIES_STARTING, 1: RUNS_ON}) as ctx:
        result = await ctx.wait()
    assert result.failures[0].status.code == 7
    assert result.victims[1].signal == signal.SIGTERM


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_an_exception_in_the_body_closes_the_run(way: Way) -> None:
    """`async with` closes on the way out and passes the exception on."""
    with pytest.raises(ZeroDivisionError):
        async with start({0: way, 1: RUNS_ON}) as ctx:
            assert ctx.nprocs / 0
    assert ctx.result is not None


async def test_a_body_that_is_cancelled_closes_the_run() -> None:
    """The run is over when the cancellation is seen outside."""
    contexts: list[PContext] = []

    async def body() -> None:
        async with start(RUNS_ON, logs_specs=capture()) as ctx:
            contexts.append(ctx)
            await ctx.wait()

    task = asyncio.ensure_future(body())
    while not contexts:
        await asyncio.sleep(0)
    await ready(contexts[0])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contexts[0].result is not None
    assert contexts[0].result.outcome == "stopped"


async def test_every_rank_sees_who_it_is(tmp_path: Path) -> None:
    """The environment tells run, rank, world, attempt, error file and lineage; torch's names too."""
    envs = {0: {"MINE": "zero"}, 1: {"MINE": "one"}}
    logs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
    ctx = await start_processes("env", "env", args={0: (), 1: ()}, envs=envs, logs_specs=logs)
    await ctx.wait()
    for rank in range(2):
        seen = dict(line.split("=", 1) for line in Path(ctx.stdouts[rank]).read_text().splitlines() if "=" in line)
        assert seen["MINE"] == envs[rank]["MINE"]
        assert seen["HOME"] == os.environ["HOME"]
        assert seen["AELASTIC_RUN_ID"] == seen["TORCHELASTIC_RUN_ID"] == ctx.run_id
        assert (seen["AELASTIC_RANK"], seen["AELASTIC_WORLD_SIZE"]) == (str(rank), "2")
        assert (seen["AELASTIC_ATTEMPT"], seen["TORCHELASTIC_RESTART_COUNT"]) == ("0", "0")
        assert seen["AELASTIC_ERROR_FILE"] == seen["TORCHELASTIC_ERROR_FILE"] == ctx.error_files[rank]
        assert seen["AELASTIC_LINEAGE"] == f"{os.environ['AELASTIC_LINEAGE']}{ctx.run_id}:"


async def test_what_speaks_of_the_host_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that used the host's own notify socket would answer in its name."""
    hosts = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "AELASTIC_OTHER", "TORCHELASTIC_OTHER"
    for name in hosts:
        monkeypatch.setenv(name, "hosts")
    ctx = await start_processes("env", "env", args={0: ()}, logs_specs=redirect(tmp_path))
    await ctx.wait()
    assert "hosts" not in Path(ctx.stdouts[0]).read_text()


async def test_each_worker_leads_a_session_of_its_own() -> None:
    """So that its group can be signalled and no terminal reaches it."""
    async with start({0: RUNS_ON, 1: RUNS_ON}, stop=PATIENT) as ctx:
        pids = ctx.pids()
        assert {rank: os.getsid(pid) for rank, pid in pids.items()} == pids
        assert {rank: os.getpgid(pid) for rank, pid in pids.items()} == pids


async def test_two_launches_of_one_logs_object_share_nothing(tmp_path: Path) -> None:
    """Each run has a folder of its own; nothing of the first is touched."""
    logs = redirect(tmp_path)
    first, second = await asyncio.gather(*(begun(start(EXIT_0, logs_specs=logs)) for _ in range(2)))
    await asyncio.gather(first.wait(), second.wait())
    assert first.log_dir != second.log_dir
    assert [Path(ctx.stdouts[0]).read_bytes() for ctx in (first, second)] == [b"ready\n"] * 2


async def test_many_starts_at_once() -> None:
    """A control plane runs many groups in one loop."""
    contexts: list[Any] = await asyncio.gather(*(begun(start({0: EXIT_0, 1: EXIT_0})) for _ in range(16)))
    results = await asyncio.gather(*(ctx.wait() for ctx in contexts))
    assert [result.outcome for result in results] == ["succeeded"] * 16


def test_loops_in_several_threads_start_at_the_same_time() -> None:
    """uvloop refuses to fork in two threads at once; runs in loops of their own don't see that."""
    uvloop = pytest.importorskip("uvloop")
    outcomes: list[str] = []

    async def starts() -> None:
        for _ in range(6):
            async with start(dict.fromkeys(range(2), EXIT_0)) as ctx:
                outcomes.append((await ctx.wait()).outcome)

    def loop() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(starts())

    threads = [threading.Thread(target=loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["succeeded"] * 18
