"""A worker that is stuck is found, shows where, is killed, and counts as failed; one that is well is left alone."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    Backoff,
    HealthPolicy,
    Notify,
    RestartPolicy,
    WatchdogExpired,
    WorkerExited,
    WorkerFailed,
    start_processes,
)
from tests.real.patients import METHODS, be_ready_and_rest, beat, hold_interpreter, speaker
from tests.real.runs import PATIENT, QUICK, all_events, redirect, tee
from tests.real.test_ready import launch

pytestmark = pytest.mark.one_loop

WATCHED = HealthPolicy(ready=Notify(), watchdog=0.4)
"""Long enough for a heartbeat every 50 ms on a busy machine."""


@pytest.mark.parametrize(("method", "logs"), list(zip(METHODS, (tee, redirect, redirect), strict=False)))
async def test_a_worker_stuck_in_c_shows_its_stacks_and_is_killed(method: Any, logs: Any, tmp_path: Path) -> None:
    """Although it holds the GIL: the stacks are in its stderr log, the failure is `watchdog`, others are stopped."""
    run = start_processes(
        "test",
        _stuck_or_well,
        {0: (0,), 1: (1,)},
        start_method=method,
        logs_specs=logs(tmp_path),
        health=WATCHED,
        stop=PATIENT,
    )
    async with run as ctx:
        result = await ctx.wait()
    failure = result.failures[1]
    assert failure is result.root_cause
    assert (failure.rank, failure.reason, failure.exitcode) == (1, "watchdog", -signal.SIGKILL)
    assert failure.message.startswith("it sent no heartbeat for 0.4 s")
    assert failure.describe().startswith(f"rank 1 (pid {failure.pid}) sent no heartbeat in time and was stopped")
    assert set(result.victims) == {0}
    log = Path(result.stderrs[1]).read_text(encoding="utf-8")
    assert f"aelastic: rank 1 (pid {failure.pid}): it sent no heartbeat for 0.4 s" in log
    assert "hold_interpreter" in log
    # A forked worker's stack goes on into its parent's, which may be deeper than a tail is long.
    assert method == "fork" or "hold_interpreter" in "\n".join(failure.tail)
    kinds = [type(event) for event in await all_events(ctx) if getattr(event, "rank", None) == 1]
    assert kinds.index(WatchdogExpired) < kinds.index(WorkerExited) < kinds.index(WorkerFailed)


def _stuck_or_well(which: int) -> None:
    if which:
        hold_interpreter()
    be_ready_and_beat()


def be_ready_and_beat() -> None:
    beat(0.05, 10_000)


async def test_the_watchdog_runs_from_the_start_where_nothing_else_is_asked() -> None:
    """A command that never speaks is killed too."""
    async with launch(speaker("signal.pause()"), health=HealthPolicy(watchdog=0.2)) as ctx:
        result = await ctx.wait()
    assert (result.failures[0].reason, result.failures[0].exitcode) == ("watchdog", -signal.SIGKILL)
    assert 0.2 <= result.failures[0].seconds < 10


async def test_heartbeats_keep_it_alive_from_ready_on() -> None:
    """Before it is ready nothing is expected of it; each heartbeat gives it the whole time again."""
    slow = speaker("time.sleep(0.5)\nready()\nfor _ in range(4): time.sleep(0.1); heartbeat()")
    async with launch(slow, health=WATCHED) as ctx:
        assert (await ctx.wait()).outcome == "succeeded"


async def test_a_stalled_loop_is_no_alarm_and_hides_none() -> None:
    """What arrived while the host's loop slept counts, more than the socket's queue holds included."""
    options: dict[str, Any] = {"health": WATCHED, "stop": replace(QUICK, on_failure="continue")}
    async with start_processes("test", _beat_or_stop, {0: (0,), 1: (1,)}, start_method="fork", **options) as ctx:
        await ctx.wait_ready(30)
        time.sleep(0.7)  # the host itself is stuck
        result = await ctx.wait()
    assert (result.return_values, {rank: end.reason for rank, end in result.failures.items()}) == (
        {0: 50},
        {1: "watchdog"},
    )


def _beat_or_stop(which: int) -> Any:
    return be_ready_and_rest() if which else beat(0.02, 50)


async def test_who_is_being_stopped_needs_no_heartbeat() -> None:
    """Nor who has said that it stops by itself."""
    stops = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(0)))\n"
    says = "from aelastic._child.notify import _say\n_say('STOPPING=1')\ntime.sleep(0.5)"
    async with launch(speaker(f"{stops}ready()\nsignal.pause()"), health=WATCHED, stop=PATIENT) as ctx:
        await ctx.wait_ready(30)
        await ctx.close()
    assert (ctx.result.outcome, ctx.result.exits[0].code) == ("stopped", 0)
    async with launch(speaker(f"ready()\n{says}"), health=WATCHED) as ctx:
        assert (await ctx.wait()).outcome == "succeeded"


async def test_a_worker_may_ask_for_its_end() -> None:
    """WATCHDOG=trigger, as systemd has it; the time between heartbeats may be changed, too."""
    says = "from aelastic._child.notify import _say\n_say('{}')\nsignal.pause()"
    trigger, hurried = (speaker(says.format(word)) for word in ("WATCHDOG=trigger", "WATCHDOG_USEC=1\\nREADY=1"))
    for program in (trigger, hurried):
        async with launch(program, health=HealthPolicy(ready=Notify(), watchdog=60)) as ctx:
            assert (await ctx.wait()).failures[0].reason == "watchdog"


async def test_a_worker_may_ask_for_more_time_between_heartbeats() -> None:
    """The new time counts from when it was asked for, as systemd has it."""
    asks = speaker("from aelastic._child.notify import _say\nready()\n_say('WATCHDOG_USEC=60000000')\ntime.sleep(0.6)")
    async with launch(asks, health=WATCHED) as ctx:
        assert (await ctx.wait()).outcome == "succeeded"


async def test_what_was_cut_off_is_not_heard() -> None:
    """A number at the end of a datagram that is too long would be another one; the words before it count."""
    words = "'READY=1', 'STATUS=' + 'x' * (65536 - 31), 'WATCHDOG_USEC=60000000'"  # 15 bytes of the last are left
    long = speaker(f"from aelastic._child.notify import _say\n_say({words})\ntime.sleep(0.2)")
    async with launch(long, health=HealthPolicy(ready=Notify(), watchdog=60)) as ctx:
        await ctx.wait_ready(30)
        assert (await ctx.wait()).outcome == "succeeded"


async def test_a_block_that_lasts_too_long_is_ended() -> None:
    """By the supervisor, with the GIL held, without any watchdog; stacks and event as for one."""
    run = start_processes("test", hold_interpreter, {0: (0.2,)}, start_method="fork", health=HealthPolicy(), stop=QUICK)
    async with run as ctx:
        result = await ctx.wait()
    assert result.failures[0].reason == "watchdog"
    assert result.failures[0].message.startswith("a block that had to end within 0.2 s did not")
    expired = [event for event in await all_events(ctx) if isinstance(event, WatchdogExpired)]
    assert [(event.rank, event.pid, event.seconds) for event in expired] == [(0, result.failures[0].pid, 0.2)]


async def test_a_block_that_ends_in_time_is_nothing() -> None:
    """Also nested, in threads, left by an exception, and while the host's loop slept past its time."""
    code = (
        "import threading\n"
        "def work():\n"
        "    for _ in range(10):\n"
        "        try:\n"
        "            with expires(0.3), expires(60): time.sleep(0.01); raise ValueError\n"
        "        except ValueError: pass\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "print('begin', flush=True)\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "time.sleep(0.3)"
    )
    async with launch(speaker(code), health=HealthPolicy()) as ctx:
        await ctx.wait_for_line("begin", timeout=30)
        time.sleep(0.4)
        assert (await ctx.wait()).outcome == "succeeded"


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_block_needs_a_time(seconds: float) -> None:
    """One that could be meant."""
    from aelastic.worker import expires

    with pytest.raises(ValueError, match="above 0"):
        expires(seconds)


async def test_a_stuck_worker_is_started_again(tmp_path: Path) -> None:
    """A watchdog's failure is one like any other: the next attempt is well, and the story is kept."""
    again = RestartPolicy(max_restarts=1, backoff=Backoff(initial=0.0))
    options: dict[str, Any] = {"logs_specs": redirect(tmp_path), "health": WATCHED, "stop": QUICK}
    async with start_processes("test", _stuck_first, {0: ()}, start_method="fork", restart=again, **options) as ctx:
        result = await ctx.wait()
    assert (result.outcome, result.attempts, result.return_values) == ("succeeded", 2, {0: 2})
    assert result.history[0][0].reason == "watchdog"
    first = Path(ctx.log_dir, "attempt_0", "0", "stderr.log").read_text(encoding="utf-8")
    assert "hold_interpreter" in first
    assert Path(result.stderrs[0]).read_text(encoding="utf-8") == ""


def _stuck_first() -> int:
    from aelastic.worker import attempt

    if not attempt():
        hold_interpreter()
    return beat(0.05, 2)
