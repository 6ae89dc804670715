"""Whole runs of functions: every start method keeps the promises that a command's run keeps."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, Literal

import pytest

from aelastic import (
    DefaultLogsSpecs,
    ExitStatus,
    PContext,
    RunProcsResult,
    StopPolicy,
    WorkerExited,
    WorkerFailed,
    WorkerOptions,
    WorkerSignaled,
    start_processes,
)
from tests.leaks import lives
from tests.real import deeds
from tests.real.jobs import double, evaluate, fail
from tests.real.runs import QUICK, all_events, capture, ready, redirect, tee
from tests.real.test_run_start import TURNS, begun, cancelled_after
from tests.ways_to_die import (
    DEAF_TO_TERM,
    DIES_STARTING,
    ENDING,
    EXCEPTION,
    EXIT_0,
    LINGERING,
    OS_EXIT,
    RUNS_ON,
    SEGFAULT,
    WRAPPED,
    Way,
)

pytestmark = pytest.mark.one_loop

Method = Literal["spawn", "forkserver", "fork"]
METHODS = pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
LONG = bool(os.environ.get("AELASTIC_TEST_LONG"))
"""Whether everything is tried that takes long."""
GOES_ON = StopPolicy(steps=QUICK.steps, drain=0.2, on_failure="continue")
SHORT = StopPolicy(steps=((signal.SIGTERM, 0.1), (signal.SIGKILL, 10.0)), drain=0.1)
STAYS = StopPolicy(steps=((signal.SIGTERM, 60.0), (signal.SIGKILL, 10.0)), drain=0.1)
NET = 60.0


def start(method: Method, function: Callable[..., Any], *args: Any, nprocs: int = 1, **options: Any) -> Any:
    """The same call on every rank."""
    options.setdefault("stop", QUICK)
    return start_processes("test", function, dict.fromkeys(range(nprocs), args), start_method=method, **options)


def start_ways(method: Method, ways: Sequence[Way], **options: Any) -> Any:
    """One way to die a rank."""
    options.setdefault("stop", QUICK)
    args = {rank: (way.argv,) for rank, way in enumerate(ways)}
    return start_processes("test", deeds.live, args, start_method=method, **options)


async def ended(method: Method, function: Callable[..., Any], *args: Any, **options: Any) -> RunProcsResult:
    async with asyncio.timeout(NET), start(method, function, *args, **options) as ctx:
        result: RunProcsResult = await ctx.wait()
        return result


def expected_reason(way: Way) -> str:
    """What a function's failure is called that ends so."""
    if way is EXCEPTION:
        return "raised"
    if way is OS_EXIT:
        return "no_result"
    return "exited" if way.signal is None else "signaled"


@METHODS
async def test_every_way_to_end_is_told_and_every_byte_kept(method: Method, tmp_path: Path) -> None:
    """The list that commands are tried with, all in one run: status, reason, value and files of each rank."""
    async with start_ways(method, ENDING, stop=GOES_ON, logs_specs=tee(tmp_path)) as ctx:
        result = await ctx.wait()
    assert result.outcome == "failed"
    assert (result.survivors, result.victims, result.lost_bytes) == ((), {}, 0)
    for rank, way in enumerate(ENDING):
        assert result.exits[rank] == ExitStatus(way.code, None if way.signal is None else int(way.signal)), way
        assert Path(result.stdouts[rank]).read_bytes() == way.stdout, way
        stderr = Path(result.stderrs[rank]).read_bytes()
        assert stderr.endswith(way.stderr), way
        assert bool(stderr) == bool(way.stderr) or way is SEGFAULT, way
        if way.succeeds and way is not OS_EXIT:
            assert result.return_values[rank] is None, way
        else:
            assert result.failures[rank].reason == expected_reason(way), way
            assert result.failures[rank].message, way
    assert "Segmentation fault" in Path(result.stderrs[ENDING.index(SEGFAULT)]).read_text()


@METHODS
async def test_what_runs_on_is_stopped_by_close(method: Method) -> None:
    """Neither failure nor victim; the whole session goes with each worker."""
    async with start_ways(method, LINGERING, logs_specs=capture()) as ctx:
        await ready(ctx)
        await ctx.close()
    result = ctx.result
    assert (result.outcome, result.failures, result.victims, result.survivors) == ("stopped", {}, {}, ())
    for rank, way in enumerate(LINGERING):
        if way is not WRAPPED:
            assert result.exits[rank] == ExitStatus(way.code, None if way.signal is None else int(way.signal)), way


@METHODS
async def test_one_failure_stops_the_others_as_victims(method: Method) -> None:
    """Whoever else is running, and who has returned before keeps its value."""
    ways = (*LINGERING, Way("waits for all", (*EXCEPTION.argv[:-1], "input(); raise ValueError('broken')")), EXIT_0)
    failing, returned = len(ways) - 2, len(ways) - 1
    gate, key = os.pipe()
    args = {rank: (way.argv,) for rank, way in enumerate(ways)}
    args[failing] = ((*EXCEPTION.argv[:-1], f"import os; os.read({gate}, 1); raise ValueError('broken')"),)
    options = WorkerOptions(pass_fds=[gate])
    try:
        async with start_processes(
            "test", deeds.live, args, start_method=method, stop=QUICK, logs_specs=capture(), options=options
        ) as ctx:
            await ready(ctx, *range(len(LINGERING)))
            async for event in ctx.events():
                if isinstance(event, WorkerExited):
                    break
            os.write(key, b".")
            result = await ctx.wait()
    finally:
        os.close(gate)
        os.close(key)
    assert set(result.failures) == {failing}
    assert result.failures[failing].reason == "raised"
    assert set(result.victims) == set(range(len(LINGERING)))
    assert result.return_values == {returned: None}


SOME_TURNS = TURNS if LONG else (0, 2, 13, 144, 987)


@METHODS
@pytest.mark.parametrize("turns", SOME_TURNS)
async def test_a_start_cancelled_at_any_turn_leaves_nothing(method: Method, turns: int, tmp_path: Path) -> None:
    """Everything that was started is gone when the cancellation arrives."""
    ways = (RUNS_ON, DEAF_TO_TERM)
    ctx = await cancelled_after(turns, start_ways(method, ways, logs_specs=redirect(tmp_path)))
    if ctx is not None:
        await ctx.close()


@METHODS
async def test_a_start_cancelled_again_and_again_leaves_nothing(method: Method) -> None:
    """A second native cancellation must not break the teardown."""
    task = asyncio.ensure_future(begun(start_ways(method, (RUNS_ON, RUNS_ON), logs_specs=capture())))
    while not task.done():
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@METHODS
@pytest.mark.parametrize("turns", [turns for turns in TURNS if turns] if LONG else (1, 34))  # at 0 it never began
async def test_a_close_cancelled_at_any_turn_ends_the_run_first(method: Method, turns: int) -> None:
    """The cancellation is raised when everything is gone."""
    ctx: PContext = await start_ways(method, (RUNS_ON, DEAF_TO_TERM), logs_specs=capture(), stop=SHORT)
    await ready(ctx)
    task = asyncio.ensure_future(ctx.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert ctx.result is not None
    assert ctx.pids() == {}


@METHODS
async def test_a_body_that_is_cancelled_while_a_result_arrives_closes_the_run(method: Method) -> None:
    """A worker that has stopped half-way through sending holds neither the body nor its end."""

    async def body() -> None:
        async with start(method, deeds.half, True) as ctx:
            begins = asyncio.get_running_loop().time()
            assert await ctx.wait(0.1) is None
            assert asyncio.get_running_loop().time() - begins < 5  # a deadline, not the worker, ended it
            contexts.append(ctx)
            await ctx.wait()

    contexts: list[PContext] = []
    task = asyncio.ensure_future(body())
    while not contexts:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    result = contexts[0].result
    assert result is not None
    assert (result.outcome, result.return_values) == ("stopped", {})


@METHODS
async def test_bad_results_are_their_own_ranks_failures(method: Method) -> None:
    """Torn, unpicklable, unloadable and missing ones touch no rank that returned."""
    does = (
        (deeds.half, (False,)),
        (evaluate, ("import threading; value = threading.Lock()",)),
        (
            evaluate,
            ("class Trap:\n  __reduce__ = lambda _: (exec, ('raise RuntimeError(\"trapped\")',))\nvalue = Trap()",),
        ),
        (os._exit, (0,)),
        (fail, ("boom",)),
        (double, (21,)),
    )
    result = await ended(method, deeds.each, does, nprocs=len(does), stop=GOES_ON, logs_specs=capture())
    failures = result.failures
    assert result.return_values == {5: 42}
    assert {rank: failure.reason for rank, failure in failures.items()} == {
        0: "signaled",
        1: "result_lost",
        2: "result_lost",
        3: "no_result",
        4: "raised",
    }
    assert "is torn" in failures[0].message
    assert "cannot pickle" in failures[1].message
    assert "trapped" in failures[2].message
    assert "os._exit" in failures[3].message
    assert isinstance(failures[4].exception, ValueError)


@METHODS
async def test_raise_for_failures_shows_both_tracebacks(method: Method) -> None:
    """The exception itself is the cause, and the remote traceback is its cause."""
    result = await ended(method, fail, "boom", logs_specs=capture())
    with pytest.raises(Exception, match="ValueError: boom") as caught:
        result.raise_for_failures("test")
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in fail" in str(caught.value.__cause__.__cause__)


@METHODS
async def test_a_process_that_outlives_its_function_is_ended_and_its_value_counts(method: Method) -> None:
    """A thread that is no daemon: bounded by the first step's time, and said in exits and events."""
    async with start(method, deeds.stay, 5, stop=SHORT) as ctx:
        result = await ctx.wait()
    assert (result.outcome, result.return_values, result.victims) == ("succeeded", {0: 5}, {})
    assert result.exits == {0: ExitStatus(None, signal.SIGTERM)}
    told = [event for event in await all_events(ctx) if isinstance(event, WorkerSignaled)]
    assert "its function was over" in told[0].reason


@METHODS
async def test_a_failed_function_whose_process_stays_is_the_root_cause(method: Method) -> None:
    """The others are stopped for it, not it for them, also where no error file tells when it failed."""
    policies = (replace(STAYS, on_failure="stop"), replace(STAYS, on_failure="continue"))
    does = ((deeds.stay_unpicklable, ()), (deeds.stay_failed, ("boom",)))
    results = await asyncio.gather(
        *(
            ended(method, deeds.each, does, nprocs=2, stop=policy, logs_specs=logs)
            for policy in policies
            for logs in (capture(), DefaultLogsSpecs(os.devnull))
        )
    )
    for result, policy in zip(results, (policies[0], policies[0], policies[1], policies[1]), strict=True):
        reasons = {rank: failure.reason for rank, failure in result.failures.items()}
        assert reasons.items() <= {0: "result_lost", 1: "raised"}.items()
        assert len(reasons) == 2 if policy.on_failure == "continue" else reasons
        assert (result.victims.keys() | reasons.keys(), result.return_values) == ({0, 1}, {})


async def test_a_value_that_is_long_in_loading_is_waited_for() -> None:
    """Its worker has ended meanwhile, longer ago than `drain` allows for output."""
    result = await ended("fork", deeds.SlowToLoad, 0.5)
    assert (result.outcome, result.return_values) == ("succeeded", {0: None})


async def test_a_value_that_is_just_being_loaded_survives_another_ranks_failure() -> None:
    """It is there before the end of the run: no second failure is made of it."""
    does = ((deeds.SlowToLoad, (0.1,)), (evaluate, ("import time; time.sleep(0.05); raise ValueError",)))
    result = await ended("fork", deeds.each, does, nprocs=2)
    assert set(result.failures) == {1}
    assert result.return_values == {0: None}


async def test_a_value_whose_loading_never_ends_is_given_up_by_close() -> None:
    """The run is bounded from the first step of a stop on."""
    async with start("fork", deeds.SlowToLoad, 0.8) as ctx:
        async for event in ctx.events():
            if isinstance(event, WorkerExited):
                break
        await ctx.close()
    failure = ctx.result.failures[0]
    assert failure.reason == "result_lost"
    assert "still being loaded" in failure.message
    while any("result of test" in thread.name for thread in threading.enumerate()):
        await asyncio.sleep(0.05)  # its thread can't be ended, and the next test must not find it


@METHODS
async def test_exit_hooks_of_the_standard_library_run(method: Method) -> None:
    """Children of multiprocessing's are joined and idle executors ended, as at the end of any interpreter."""
    does = ((deeds.keep_child, (0.2,)), (deeds.keep_executor, ()))
    begins = time.monotonic()
    result = await ended(method, deeds.each, does, nprocs=2, stop=StopPolicy())
    assert time.monotonic() - begins >= 0.2
    assert result.return_values == {0: "returned", 1: "returned"}
    assert set(result.exits.values()) == {ExitStatus(0, None)}


@METHODS
async def test_a_worker_may_start_a_run_of_its_own(method: Method, tmp_path: Path) -> None:
    """Its console is the worker's own output, also where the worker was forked from a host that has one."""
    inner = ("spawn", "forkserver", "fork")
    args = {rank: (name,) for rank, name in enumerate(inner)}
    async with start_processes("test", deeds.nest, args, start_method=method, logs_specs=tee(tmp_path)) as ctx:
        result = await ctx.wait()
    for rank in args:
        assert result.return_values[rank] == {0: "hello"}, result.failures
        assert Path(result.stdouts[rank]).read_text() == "[inner0]:hello\n"


@METHODS
async def test_shared_memory_that_is_given_by_name_outlives_its_worker(method: Method) -> None:
    """The worker joins the host's resource tracker; with one of its own it would remove the memory (bpo-38119)."""
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        result = await ended(method, deeds.attach, memory.name, logs_specs=capture())
        assert result.outcome == "succeeded", result.failures
        assert bytes(memory.buf or b"")[:5] == b"hello"
        assert Path("/dev/shm", memory.name).exists()
    finally:
        memory.close()
        memory.unlink()


@METHODS
async def test_kill_reaches_everything_that_a_function_started(method: Method) -> None:
    """Its children in its session, and those that left it and show the lineage."""
    code = """
        import os, subprocess, sys, time
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        argv = [sys.executable, "-I", "-S", "-c", deaf]
        pids = [subprocess.Popen(argv).pid, subprocess.Popen(argv, start_new_session=True).pid]
        print("pids", *pids, flush=True)
        time.sleep(600)
    """
    async with start(method, evaluate, code, logs_specs=capture()) as ctx:
        found = await ctx.wait_for_line(r"pids (\d+) (\d+)", timeout=NET)
        pids = [int(found.match[group]) for group in (1, 2)]
        await ctx.close()
    assert not [pid for pid in pids if lives(pid)]


async def test_a_worker_forked_beside_another_run_keeps_none_of_its_pipes() -> None:
    """The other run's output ends with its own worker, and its results with its own pipe."""
    hosts = _pipes(os.getpid())
    async with (
        start_ways("fork", [RUNS_ON], logs_specs=capture()) as other,
        start_ways("fork", [RUNS_ON], logs_specs=capture()) as ctx,
    ):
        await ready(ctx)
        pipes = _pipes(ctx.pids()[0]) & _pipes(os.getpid()) - hosts
        assert len(pipes) == 3  # its stdout, stderr and result
        assert not pipes & _pipes(other.pids()[0])


def _pipes(pid: int) -> set[str]:
    targets: set[str] = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {target for target in targets if target.startswith("pipe:")}


async def test_a_failed_start_of_one_function_takes_the_rest_down() -> None:
    """A call that can't be pickled is told before anything was started."""
    args = {0: (1,), 1: (threading.Lock(),)}
    with pytest.raises(Exception, match="test rank 1 can't be sent to a worker"):
        await start_processes("test", double, args)


async def test_the_failure_is_told_as_it_happens() -> None:
    """`WorkerFailed` carries the function's exception."""
    async with start("spawn", fail, "boom", logs_specs=capture()) as ctx:
        await ctx.wait()
        failed = [event for event in await all_events(ctx) if isinstance(event, WorkerFailed)]
    assert isinstance(failed[0].failure.exception, ValueError)


@METHODS
async def test_a_signal_reaches_a_handler_in_the_midst_of_python_code(method: Method) -> None:
    """Not in a child that another thread than the main one forked, on Python 3.13.0."""
    async with start(method, deeds.spin, logs_specs=capture()) as ctx:
        await ready(ctx)
        ctx.send_signal(signal.SIGUSR1)
        assert (await ctx.wait()).return_values == {0: "told"}


@METHODS
async def test_odd_functions_are_told_from_their_results(method: Method, tmp_path: Path) -> None:
    """A child that comes back too is none of the rank, a broken hook hides nothing, a foreign file gets no result."""
    file, logs = tmp_path / "file", redirect(tmp_path / "logs")
    does = (
        (deeds.come_back_twice, (False,)),
        (deeds.come_back_twice, (True,)),
        (deeds.break_hook, ()),
        (deeds.close_everything, (str(file),)),
        (deeds.lose_streams, ()),
    )
    result = await ended(method, deeds.each, does, nprocs=len(does), stop=GOES_ON, logs_specs=logs)
    assert result.return_values == {0: "from the worker", 1: "from the worker", 4: "returned"}
    assert Path(result.stderrs[1]).read_text().endswith("ValueError: from the child\n")
    assert isinstance(result.failures[2].exception, ValueError)
    assert Path(result.stderrs[2]).read_text().endswith("ValueError: original\n")
    assert "its result can't be sent" in result.failures[3].tail[-1]
    assert file.read_bytes() == b""


@METHODS
async def test_callables_of_a_test_body_travel(method: Method) -> None:
    """Decorated functions, partials of bound methods, objects with `__call__`, `async def` with anyio."""

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(*args: Any) -> Any:
            return ["decorated", function(*args)]

        return inner

    @decorated
    def plain(value: int) -> int:
        return value + 1

    class Adder:
        def __init__(self, number: int) -> None:
            self.number = number

        def add(self, value: int, more: int) -> int:
            return self.number + value + more

        async def __call__(self, value: int) -> int:
            import anyio

            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep, 0)
            return self.number + value

    does = ((plain, (1,)), (functools.partial(Adder(1).add, more=3), (1,)), (Adder(5), (1,)))
    results = await asyncio.gather(*(ended(method, function, *args) for function, args in does))
    assert [result.return_values[0] for result in results] == [["decorated", 2], 5, 6]


@METHODS
async def test_a_dead_worker_says_whether_it_started(method: Method) -> None:
    """A function that exits while its module is imported is told in words."""
    result = await ended(method, deeds.live, DIES_STARTING.argv, logs_specs=capture())
    assert result.failures[0].status.code == 7
