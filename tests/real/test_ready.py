"""When a rank is ready: by what it says, prints, serves or is asked, and what is told when it never is."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import socket
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aelastic import (
    Backoff,
    DefaultLogsSpecs,
    HealthPolicy,
    HttpGet,
    LinePattern,
    Notify,
    PContext,
    RestartPolicy,
    Std,
    StreamNotCaptured,
    TcpPort,
    WorkerFailed,
    WorkerNotReady,
    WorkerOptions,
    WorkerReady,
    WorkerStarted,
    start_processes,
)
from tests.real.patients import METHODS, READY_THEN_RESTS, be_ready_and_rest, speaker
from tests.real.runs import QUICK, all_events, capture, redirect
from tests.ways_to_die import FOREVER, PYTHON

pytestmark = pytest.mark.one_loop

NET = 30.0


def launch(*argvs: tuple[str, ...], **options: Any) -> Any:
    """One command a rank."""
    options.setdefault("logs_specs", capture())
    options.setdefault("stop", QUICK)
    return start_processes("test", "env", args=dict(enumerate(argvs)), **options)


def ready(condition: Any, **options: Any) -> HealthPolicy:
    return HealthPolicy(ready=condition, **options)


@pytest.fixture
def port() -> int:
    """A port that nobody serves yet."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        number: int = server.getsockname()[1]
    return number


async def names(ctx: PContext, rank: int) -> list[str]:
    """The kinds of a rank's events, once the run is over."""
    return [type(event).__name__ for event in await all_events(ctx) if getattr(event, "rank", None) == rank]


async def test_a_rank_says_that_it_is_ready() -> None:
    """Told once, after its start; who waits later is told at once."""
    async with launch(
        speaker(READY_THEN_RESTS), speaker("ready('up')\nready()\nsignal.pause()"), health=ready(Notify())
    ) as ctx:
        await ctx.wait_ready(NET)
        await ctx.wait_ready(0)
    told = await names(ctx, 1)
    assert told.count("WorkerReady") == 1
    assert told.index("WorkerStarted") < told.index("WorkerReady") < told.index("WorkerExited")


@pytest.mark.parametrize("method", METHODS)
async def test_a_function_says_that_it_is_ready(method: Any) -> None:
    """Whatever made its process."""
    health = ready(Notify())
    async with start_processes(
        "test", be_ready_and_rest, {0: (), 1: ()}, start_method=method, health=health, stop=QUICK
    ) as ctx:
        await ctx.wait_ready(NET)
        events = [event async for event in _until_all_ready(ctx)]
    assert sorted(event.rank for event in events if isinstance(event, WorkerReady)) == [0, 1]


async def _until_all_ready(ctx: PContext) -> Any:
    left = ctx.nprocs
    async for event in ctx.events():
        yield event
        left -= isinstance(event, WorkerReady)
        if not left:
            return


async def test_running_is_ready_where_nothing_was_asked_for() -> None:
    """With and without a policy; no event says so."""
    for health in (None, HealthPolicy()):
        async with launch((*PYTHON, FOREVER), health=health) as ctx:
            await ctx.wait_ready()
        assert "WorkerReady" not in await names(ctx, 0)


async def test_a_line_tells_and_its_groups_are_kept() -> None:
    """An unfinished one too, in either stream, rank by rank."""
    out = (*PYTHON, f"print('serving on port 8{{}}'.format(80), flush=True); {FOREVER}")
    err = (*PYTHON, f"import sys; sys.stderr.write('port 7 > '); sys.stderr.flush(); {FOREVER}")
    async with launch(out, err, health=ready(LinePattern(r"port (?P<port>\d+)"))) as ctx:
        await ctx.wait_ready(NET)
        assert ctx.ready_captures == {0: {"port": "880"}, 1: {"port": "7"}}


async def test_a_pattern_that_is_not_needed_any_more_holds_nobody_back() -> None:
    """It reads without loss only until the rank is ready by other means."""
    loud = speaker("ready()\nfor _ in range(40): os.write(1, b'x' * 49999 + b'\\n')\nprint('done', flush=True)")
    async with launch(loud, health=ready(Notify() | LinePattern("never"))) as ctx:
        await ctx.wait_for_line("^done$", timeout=NET)


async def test_a_pattern_for_a_stream_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    """Before anything is started, with the option to set."""
    marker = tmp_path / "ran"
    for logs, std in ((redirect(tmp_path), Std.ALL), (DefaultLogsSpecs(capture=Std.OUT), Std.ERR)):
        with pytest.raises(StreamNotCaptured, match=r"a line that matches 'x' can't be waited for.*Set capture=Std"):
            await launch(("touch", str(marker)), logs_specs=logs, health=ready(LinePattern("x", std=std)))
    assert not marker.exists()


async def test_a_port_that_accepts_is_ready(port: int) -> None:
    """By name and by address; asked until it is so."""
    serve = f"import socket, time; time.sleep(0.05); s = socket.create_server(('127.0.0.1', {port})); {FOREVER}"
    health = ready(TcpPort(port) & TcpPort(port, "localhost"), interval=0.02)
    async with launch((*PYTHON, serve), health=health) as ctx:
        with pytest.raises(TimeoutError, match=f"a connection to 127.0.0.1 port {port}"):
            await ctx.wait_ready(0.01)
        await ctx.wait_ready(NET)


async def test_a_web_server_is_ready_when_it_answers(port: int, tmp_path: Path) -> None:
    """`python -m http.server` behind HttpGet; a status that is not expected is no yes, and is told."""
    (tmp_path / "index.html").write_text("hello", encoding="ascii")
    serve = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    url = f"http://127.0.0.1:{port}"
    async with launch(serve, health=ready(HttpGet(f"{url}/index.html?q=1"), interval=0.02)) as ctx:
        await ctx.wait_ready(NET)
        missing = launch((*PYTHON, FOREVER), health=ready(HttpGet(f"{url}/nothing"), ready_timeout=0.2, interval=0.02))
        async with missing as other:
            with pytest.raises(WorkerNotReady, match=r"an answer from http://\S+/nothing \(last: status 404\)"):
                await other.wait_ready(NET)


async def test_what_answers_no_http_is_not_ready(port: int) -> None:
    """Nor what accepts and never answers."""
    mute = f"import socket; s = socket.create_server(('127.0.0.1', {port})); {FOREVER}"
    rude = (
        f"import socket; s = socket.create_server(('127.0.0.1', {port}))\n"
        "while True: c = s.accept()[0]; c.recv(999); c.send(b'nope\\r\\n'); c.close()"
    )
    for program, told in ((mute, "no answer within 0.1 s"), (rude, "no HTTP: b'nope")):
        async with launch((*PYTHON, program), health=ready(HttpGet(f"http://127.0.0.1:{port}/", timeout=0.1))) as ctx:
            while told not in await why_not(ctx):
                await asyncio.sleep(0.01)


async def why_not(ctx: PContext) -> str:
    """What keeps a run from being ready."""
    with pytest.raises(TimeoutError) as caught:
        await ctx.wait_ready(0.001)
    return str(caught.value)


async def test_a_callable_is_asked_until_it_says_yes() -> None:
    """With the context and the rank; an exception is a no."""
    asked: list[tuple[PContext, int, dict[int, int]]] = []

    async def is_up(ctx: PContext, rank: int) -> bool:
        asked.append((ctx, rank, ctx.pids()))
        if len(asked) == 1:
            raise ConnectionError("not yet")
        return len(asked) > 2

    async with launch((*PYTHON, FOREVER), health=ready(is_up, interval=0.01)) as ctx:
        await ctx.wait_ready(NET)
        assert asked == [(ctx, 0, ctx.pids())] * 3


async def test_a_question_that_breaks_is_asked_again() -> None:
    """A host that can be no name, and a callable that lost what it waited for; both are told."""
    asked: list[int] = []

    async def lost(ctx: PContext, rank: int) -> bool:
        asked.append(rank)
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task
        return True

    both = TcpPort(80, host="a..b") & lost
    async with launch((*PYTHON, FOREVER), health=ready(both, interval=0.01)) as ctx:
        while len(asked) < 3:
            await asyncio.sleep(0.01)
        missing = await why_not(ctx)
    assert re.search(r"port 80 \(last: .*label", missing)
    assert "(last: what it waited for was cancelled)" in missing


async def test_a_callable_that_hangs_holds_nobody_up() -> None:
    """It is cancelled when the run ends; what it raised last is told before."""

    async def never(ctx: PContext, rank: int) -> bool:
        if asked:
            await asyncio.Event().wait()
        asked.append(rank)
        raise LookupError("no such table")

    asked: list[int] = []
    async with launch((*PYTHON, FOREVER), health=ready(Notify() | never, interval=0.01)) as ctx:
        with pytest.raises(
            TimeoutError, match=r"\(READY=1 .* or a yes of .*never\(ctx, rank\) \(last: LookupError: no"
        ):
            await ctx.wait_ready(0.2)
        assert ctx.pids()  # the timeout was the caller's own and harmed nobody
    assert ctx.result.outcome == "stopped"


async def test_each_rank_may_have_a_condition_of_its_own() -> None:
    """The one that has none is ready as it runs."""
    health = HealthPolicy(ready={0: Notify(), 1: LinePattern("^ready$")})
    async with launch(speaker(READY_THEN_RESTS), (*PYTHON, FOREVER), (*PYTHON, FOREVER), health=health) as ctx:
        await ctx.wait_ready(NET)
    told = [event.rank for event in await all_events(ctx) if isinstance(event, WorkerReady)]
    assert sorted(told) == [0, 1]


@pytest.mark.parametrize(
    ("code", "how"), [("sys.exit(3)", "exited with code 3"), ("sys.exit(0)", "exited with code 0")]
)
async def test_a_rank_that_ends_first_is_told_at_once(code: str, how: str) -> None:
    """With its failure, if it is one, and its last lines; others that are not ready don't matter."""
    dies = speaker(f"print('no config', file=sys.stderr)\n{code}")
    async with launch((*PYTHON, FOREVER), dies, health=ready(Notify())) as ctx:
        with pytest.raises(WorkerNotReady, match=f"rank 1 .* {how} before it was ready") as caught:
            await ctx.wait_ready(NET)
    assert caught.value.tail[-1] == "no config"
    assert "no config" in str(caught.value)
    assert [failure.exitcode for failure in caught.value.failures.values()] == ([3] if "3" in how else [])


async def test_ready_timeout_fails_the_rank_and_says_what_is_missing(port: int) -> None:
    """Reason `not_ready`; the others are stopped as after any failure."""
    late = speaker("ready('loading 3 of 4')\nprint('loading', flush=True)\nsignal.pause()")
    health = ready(Notify() & TcpPort(port), ready_timeout=0.3, interval=0.02)
    async with launch(late, late, health=health) as ctx:
        with pytest.raises(WorkerNotReady, match=r"not ready within 0\.3 s; still missing: a connection to") as caught:
            await ctx.wait_ready(NET)
        result = await ctx.wait()
    assert "its last status: loading 3 of 4" in str(caught.value)
    assert {failure.reason for failure in caught.value.failures.values()} == {"not_ready"}
    assert caught.value.tail == ("loading",)
    failure = result.root_cause
    assert (failure.reason, failure.status.signal) == ("not_ready", signal.SIGTERM)
    assert failure.describe().endswith(f"was not ready in time after {failure.seconds * 1000:.0f} ms")
    assert "READY=1" not in failure.message
    failed = [event for event in await all_events(ctx) if isinstance(event, WorkerFailed)]
    assert failed[0].failure is failure


async def test_not_ready_is_told_before_a_deaf_worker_is_gone() -> None:
    """The news does not wait for the steps of the stop."""
    deaf = (*PYTHON, f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}")
    async with launch(deaf, health=ready(Notify(), ready_timeout=0.3)) as ctx:
        with pytest.raises(WorkerNotReady) as caught:
            await ctx.wait_ready(NET)
        assert ctx.pids()
        assert caught.value.failures[0].reason == "not_ready"
        result = await ctx.wait()
    assert (result.failures[0].reason, result.failures[0].exitcode) == ("not_ready", -signal.SIGKILL)


async def test_a_rank_asks_for_more_time() -> None:
    """EXTEND_TIMEOUT_USEC moves the end of `ready_timeout`, as systemd has it."""
    slow = speaker(
        "from aelastic._child.notify import _say\n"
        "_say('EXTEND_TIMEOUT_USEC=20000000')\ntime.sleep(0.4)\nready()\nsignal.pause()"
    )
    async with launch(slow, health=ready(Notify(), ready_timeout=0.3)) as ctx:
        await ctx.wait_ready(NET)


async def test_an_errno_is_part_of_the_story() -> None:
    """ERRNO= and STATUS= are told when a rank is not ready in time."""
    sad = speaker("from aelastic._child.notify import _say\n_say('ERRNO=2', 'STATUS=no data')\nsignal.pause()")
    async with launch(sad, health=ready(Notify(), ready_timeout=0.25)) as ctx:
        result = await ctx.wait()
    assert "its last status: no data; it reported the error 2 (No such file or directory)" in result.failures[0].message


async def test_ranks_start_in_order() -> None:
    """Each when the one before is ready; the start takes as long."""
    health = ready(Notify(), start_order="sequential")
    slow = speaker("time.sleep(0.03)\n" + READY_THEN_RESTS)
    async with launch(slow, slow, slow, health=health) as ctx:
        await ctx.wait_ready(NET)
    told = [(type(e).__name__, e.rank) for e in await all_events(ctx) if isinstance(e, (WorkerStarted, WorkerReady))]
    assert told == [(kind, rank) for rank in range(3) for kind in ("WorkerStarted", "WorkerReady")]


async def test_an_ordered_start_ends_where_a_rank_fails() -> None:
    """The next ones are never started, and the run has failed; one that ends well is no reason to stop."""
    health = ready(Notify(), start_order="sequential")
    async with launch((*PYTHON, ""), (*PYTHON, "raise SystemExit(3)"), speaker(READY_THEN_RESTS), health=health) as ctx:
        result = await ctx.wait()
        with pytest.raises(WorkerNotReady, match="rank 2 was not started"):
            await ctx.wait_ready()
    assert (result.outcome, set(result.exits), set(result.failures)) == ("failed", {0, 1}, {1})


@pytest.mark.parametrize("scope", ["gang", "rank"])
async def test_an_ordered_start_goes_on_where_failures_do_not_spread(scope: Any) -> None:
    """With `on_failure="continue"`; who comes after the failed one is waited for as before."""
    options: dict[str, Any] = {"stop": replace(QUICK, on_failure="continue"), "restart": RestartPolicy(scope=scope)}
    health = ready(Notify(), start_order="sequential")
    fails, rests = speaker("sys.exit(3)"), speaker(READY_THEN_RESTS)
    async with launch(fails, rests, rests, health=health, **options) as ctx:
        assert set(ctx.pids()) == {1, 2}
    told = [(type(e).__name__, e.rank) for e in await all_events(ctx) if isinstance(e, (WorkerStarted, WorkerReady))]
    assert told[:4] == [("WorkerStarted", 0), ("WorkerStarted", 1), ("WorkerReady", 1), ("WorkerStarted", 2)]


async def test_an_ordered_start_ends_when_a_rank_that_was_ready_fails() -> None:
    """Nobody waits for what depends on it."""
    short = speaker("ready()\ntime.sleep(0.2)\nsys.exit(3)")
    health = ready(Notify(), start_order="sequential")
    for scope in ("gang", "rank"):
        again = RestartPolicy(scope=scope)
        async with launch(short, (*PYTHON, FOREVER), (*PYTHON, FOREVER), health=health, restart=again) as ctx:
            result = await ctx.wait()
        assert (result.outcome, set(result.failures), set(result.victims)) == ("failed", {0}, {1})


async def test_an_ordered_start_can_be_cancelled(tmp_path: Path) -> None:
    """What was started is gone then."""
    begun = tmp_path / "0"
    begins = (
        *PYTHON,
        f"import os; open({str(tmp_path)!r} + '/' + os.environ['AELASTIC_RANK'], 'w').close(); {FOREVER}",
    )
    starting = asyncio.ensure_future(_open(launch(begins, begins, health=ready(Notify(), start_order="sequential"))))
    async with asyncio.timeout(30):
        while not begun.exists():
            await asyncio.sleep(0.002)
    assert not starting.done()
    assert not (tmp_path / "1").exists()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def _open(starting: Any) -> PContext:
    ctx: PContext = await starting
    return ctx


async def test_many_wait_and_each_for_itself() -> None:
    """A timeout or a cancellation of one is nothing to the others."""
    async with launch(speaker("time.sleep(0.1)\n" + READY_THEN_RESTS), health=ready(Notify())) as ctx:
        patient, hasty, cancelled = (asyncio.ensure_future(ctx.wait_ready(seconds)) for seconds in (None, 0.01, None))
        with pytest.raises(TimeoutError):
            await hasty
        cancelled.cancel()
        await patient
        assert cancelled.cancelled()


async def test_closing_ends_the_waiting() -> None:
    """Who waits is told that it will not be."""
    async with launch((*PYTHON, FOREVER), health=ready(Notify())) as ctx:
        waiting = asyncio.ensure_future(ctx.wait_ready())
        await asyncio.sleep(0)
    with pytest.raises(WorkerNotReady, match="killed by SIGTERM before it was ready"):
        await waiting


@pytest.mark.skipif(shutil.which("systemd-notify") is None, reason="systemd-notify is not installed")
async def test_systemds_own_client_is_understood() -> None:
    """Its barrier is answered at once, also after the rank was ready, and from a process of its tree."""
    script = "systemd-notify --ready --status=up && systemd-notify WATCHDOG=1 && echo done && exec sleep 600"
    async with launch(("sh", "-c", script), health=HealthPolicy(ready=Notify(), watchdog=60)) as ctx:
        await ctx.wait_ready(NET)
        await ctx.wait_for_line("^done$", timeout=4)  # without an answer it gives up after 5 s, and fails


async def test_what_a_rank_leaves_behind_is_still_answered() -> None:
    """The socket is read as long as anything of the rank lives."""
    left = speaker(
        "import socket\n"
        "leader = os.getpid()\n"
        "if os.fork(): os._exit(0)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while os.getppid() == leader: time.sleep(0.01)\n"
        "read, write = os.pipe()\n"
        "speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "address = os.environ['NOTIFY_SOCKET'].replace('@', chr(0))\n"
        "speaker.connect(address)\n"
        "socket.send_fds(speaker, [b'BARRIER=1'], [write])\n"
        "os.close(write)\n"
        "os.read(read, 1)\n"
        "print('answered', flush=True)\n"
    )
    async with launch(left, health=HealthPolicy()) as ctx:
        await ctx.wait_for_line("answered", timeout=NET)


async def test_the_socket_is_there_only_with_a_policy() -> None:
    """WATCHDOG_USEC only with a watchdog; without, `ready` and `heartbeat` do nothing."""
    show = speaker(
        "ready(); heartbeat()\n"
        "with expires(9): print(os.environ.get('NOTIFY_SOCKET', '')[:1], os.environ.get('WATCHDOG_USEC'))"
    )
    for health, line in ((None, " None"), (HealthPolicy(), "@ None"), (HealthPolicy(watchdog=1.5), "@ 1500000")):
        async with launch(show, health=health) as ctx:
            assert (await ctx.wait_for_line("None|1500000", timeout=NET)).line.text == line
            assert (await ctx.wait()).outcome == "succeeded"


FLAKY = "import pathlib; seen = pathlib.Path('seen'); first = not seen.exists(); seen.touch()\n"
"""Tells the first incarnation from the later ones, by a file in its directory."""


@pytest.mark.parametrize("scope", ["gang", "rank"])
async def test_who_waits_is_not_told_of_what_is_started_again(scope: Any, tmp_path: Path) -> None:
    """A run that may restart is waited for; a budget that is spent is the end."""
    options = {"options": WorkerOptions(cwd=tmp_path), "health": ready(Notify(), start_order="sequential")}
    flaky = speaker(f"{FLAKY}\nif first: sys.exit(3)\n{READY_THEN_RESTS}")
    again = RestartPolicy(max_restarts=1, scope=scope, backoff=Backoff(initial=0.0))
    async with launch(flaky, speaker(READY_THEN_RESTS), restart=again, **options) as ctx:
        await ctx.wait_ready(NET)
        assert ctx.attempt == 1
    hopeless = speaker("sys.exit(3)")
    async with launch(hopeless, speaker(READY_THEN_RESTS), restart=again, **options) as ctx:
        with pytest.raises(WorkerNotReady, match=r"rank 0 .* exited with code 3 before it was ready") as caught:
            await ctx.wait_ready(NET)
        result = await ctx.wait()
    assert caught.value.failures[0].exitcode == 3
    assert (result.outcome, result.attempts, set(result.exits)) == ("failed", 2, {0})
