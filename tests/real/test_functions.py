"""Functions travel to their workers and what they return comes back, whatever they do."""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction, resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import pytest

from aelastic._exit import ExitStatus
from aelastic._function import (
    ForkServer,
    Function,
    NoResult,
    Raised,
    RemoteTraceback,
    Returned,
    Torn,
    Unloadable,
    Value,
)
from aelastic._function.function import _pickle_all
from aelastic._options import WorkerOptions
from aelastic._process import Command, Process
from aelastic._spec import check
from tests.real.jobs import Counter, Trap, be_picky, double, double_later, evaluate, fail, write_to

pytestmark = pytest.mark.one_loop

NET = 60.0
"""Seconds; only a net."""


class Ranks:
    """Function workers without a gang: started, heard, and gone at the end."""

    def __init__(self, function: Function, processes: Mapping[int, Process], folder: Path) -> None:
        self.function = function
        self.processes = processes
        self.folder = folder

    async def returned(self, rank: int = 0) -> Returned:
        async with asyncio.timeout(NET):
            return await asyncio.shield(self.function.returned[rank])

    async def status(self, rank: int = 0) -> ExitStatus:
        async with asyncio.timeout(NET):
            return await asyncio.shield(self.processes[rank].exited)

    def error_file(self, rank: int = 0) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder / f"{rank}.json").read_text())
        return data

    def text(self, stream: str, rank: int = 0) -> str:
        return (self.folder / f"{rank}.{stream}").read_text()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


Start = Callable[..., contextlib.AbstractAsyncContextManager[Ranks]]


@pytest.fixture(params=["spawn", "forkserver", "fork"])
def start(request: pytest.FixtureRequest, threads: ThreadPoolExecutor, tmp_path: Path) -> Start:
    return functools.partial(started, request.param, threads, tmp_path)


@pytest.fixture
def spawn(threads: ThreadPoolExecutor, tmp_path: Path) -> Start:
    return functools.partial(started, "spawn", threads, tmp_path)


@pytest.fixture(params=["spawn", "forkserver"])
def start_apart(request: pytest.FixtureRequest, threads: ThreadPoolExecutor, tmp_path: Path) -> Start:
    """By the methods whose workers don't share the memory of this process."""
    return functools.partial(started, request.param, threads, tmp_path)


@contextlib.asynccontextmanager
async def started(
    method: str,
    threads: ThreadPoolExecutor,
    folder: Path,
    entrypoint: Callable[..., Any],
    *args: Any,
    nprocs: int = 1,
    env: Mapping[str, str] | None = None,
    options: WorkerOptions | None = None,
) -> AsyncIterator[Ranks]:
    spec = check(
        "fn",
        entrypoint,
        dict.fromkeys(range(nprocs), args),
        None,
        None,
        method,
        duplicate_stdout_filters=None,
        duplicate_stderr_filters=None,
        options=options,
        stop=None,
    )
    processes: dict[int, Process] = {}
    server = ForkServer("fn", spec.options, on_born=lambda *_: None)
    function = await Function.prepare(spec, range(nprocs), threads, server)
    try:
        for rank in range(nprocs):
            processes[rank] = await launch(function, rank, folder, env or {}, spec.options)
        for process in processes.values():
            await process.confirmed()
        yield Ranks(function, processes, folder)
    finally:
        for process in processes.values():
            process.signal_group(signal.SIGKILL)
            await process.exited
            await process.reaped(NET)
            process.close()
        await function.close()
        await server.close()


async def launch(
    function: Function, rank: int, folder: Path, env: Mapping[str, str], options: WorkerOptions
) -> Process:
    with contextlib.ExitStack() as stack:
        stdin = stack.enter_context(open(os.devnull, "rb"))
        out, err = (stack.enter_context(open(folder / f"{rank}.{name}", "wb")) for name in ("out", "err"))
        return await function.launch(
            rank,
            Command(
                argv=(),
                env={**os.environ, "AELASTIC_RANK": str(rank), "AELASTIC_ERROR_FILE": f"{folder}/{rank}.json", **env},
                cwd=None if options.cwd is None else str(options.cwd),
                stdin=stdin.fileno(),
                stdout=out.fileno(),
                stderr=err.fileno(),
                pass_fds=tuple(options.pass_fds),
                options=options,
                on_born=lambda *_: None,
                rank=rank,
                who=f"fn rank {rank}",
            ),
        )


async def test_a_function_returns_its_value(start: Start) -> None:
    async with start(double, 21, nprocs=2) as ranks:
        assert [await ranks.returned(rank) for rank in (0, 1)] == [Value(42), Value(42)]
        assert [await ranks.status(rank) for rank in (0, 1)] == [ExitStatus(0, None)] * 2


async def test_every_kind_of_callable_travels(start: Start) -> None:
    offset = 40

    def closure(value: int) -> int:
        return value + offset

    async def late_closure(value: int) -> int:
        await asyncio.sleep(0)
        return value + offset

    kinds: list[Callable[..., Any]] = [
        double_later,
        closure,
        late_closure,
        lambda value: value + offset,
        functools.partial(closure),
        functools.partial(pow, 2),
        Counter(40).plus,
        str,
        [1, 2].count,
    ]
    for kind in kinds:
        expected = kind(2)
        if asyncio.iscoroutine(expected):
            expected = await expected
        async with start(kind, 2) as ranks:
            assert await ranks.returned() == Value(expected), kind


async def test_a_local_class_comes_back_as_itself(start_apart: Start) -> None:
    class Local:
        number = 3

    async with start_apart(Local) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Value)
        assert type(returned.value) is Local


async def test_results_of_any_size_arrive_whole(start: Start) -> None:
    sizes = (0, 1, 65_535, 65_536, 5_000_000)
    code = f"value = [[b'x' * size, bytearray(size), 'end'] for size in {sizes}]"
    async with start(evaluate, code) as ranks:
        assert await ranks.returned() == Value([[b"x" * size, bytearray(size), "end"] for size in sizes])


async def test_large_arguments_arrive_whole(start: Start) -> None:
    data = array.array("q", range(500_000))
    async with start(hash, data.tobytes()) as ranks:
        assert isinstance(await ranks.returned(), Value)
    async with start(double, data) as ranks:
        assert await ranks.returned() == Value(data * 2)


async def test_buffers_outside_bytes_travel_too(start: Start) -> None:
    code = "import pickle; value = [bytearray(b'ab') * 100_000, pickle.PickleBuffer(b'cd' * 100_000)]"
    async with start(evaluate, code) as ranks:
        assert await ranks.returned() == Value([bytearray(b"ab") * 100_000, b"cd" * 100_000])


async def test_an_exception_comes_with_everything_it_has(start: Start) -> None:
    async with start(fail, "boom") as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Raised)
        assert isinstance(returned.exception, ValueError)
        assert returned.exception.args == ("boom",)
        assert returned.exception.__notes__ == ["a hint"]
        assert isinstance(returned.exception.__cause__, RemoteTraceback)
        for text in ("KeyError: 'the cause'", "ValueError: boom", "a hint", "in fail"):
            assert text in returned.traceback
            assert text in str(returned.exception.__cause__)
        assert "_child" not in returned.traceback
        assert await ranks.status() == ExitStatus(1, None)
        report = ranks.error_file()["message"]
        assert report["message"] == "ValueError: boom"
        assert report["extraInfo"]["py_callstack"] == returned.traceback == ranks.text("err")


async def test_an_exception_that_cannot_be_rebuilt_still_has_its_traceback(start: Start) -> None:
    async with start(be_picky) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Raised)
        assert returned.exception is None
        assert "Picky: 1 and 2" in returned.traceback
    async with start(evaluate, "import threading; e = ValueError(threading.Lock()); raise e") as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Raised)
        assert returned.exception is None
        assert "ValueError: <unlocked" in returned.traceback


async def test_exits_are_exits(start: Start) -> None:
    for code, expected, status in [
        (0, Value(None), 0),
        (None, Value(None), 0),
        (3, NoResult(), 3),
        ("sorry", NoResult(), 1),
    ]:
        async with start(sys.exit, code) as ranks:
            assert await ranks.returned() == expected
            assert await ranks.status() == ExitStatus(status, None)
            assert ranks.text("err") == ("sorry\n" if code == "sorry" else "")


async def test_os_exit_hands_nothing_back(start: Start) -> None:
    async with start(os._exit, 0) as ranks:
        assert await ranks.returned() == NoResult()
        assert await ranks.status() == ExitStatus(0, None)


async def test_keyboard_interrupt_is_told_and_ends_by_sigint(start: Start) -> None:
    async with start(evaluate, "raise KeyboardInterrupt('here')") as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Raised)
        assert isinstance(returned.exception, KeyboardInterrupt)
        assert await ranks.status() == ExitStatus(None, signal.SIGINT)
        assert ranks.error_file()["message"]["message"] == "KeyboardInterrupt: here"
        assert ranks.text("err").count("KeyboardInterrupt") == 1


async def test_death_by_signal_leaves_no_result_and_faulthandler_speaks(spawn: Start) -> None:
    async with spawn(evaluate, "import faulthandler; faulthandler._sigsegv()") as ranks:
        assert await ranks.returned() == NoResult()
        assert await ranks.status() == ExitStatus(None, signal.SIGSEGV)
        assert "Segmentation fault" in ranks.text("err")
    async with spawn(evaluate, "import os; os.kill(os.getpid(), 15); value = 1") as ranks:
        assert await ranks.status() == ExitStatus(None, signal.SIGTERM)


async def test_what_cannot_be_pickled_there_is_told(start: Start) -> None:
    async with start(threading.Lock) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Unloadable)
        assert "can't be pickled" in returned.reason
        assert "cannot pickle" in returned.traceback
        assert await ranks.status() == ExitStatus(1, None)
        assert "cannot pickle" in ranks.text("err")


async def test_what_cannot_be_pickled_after_a_large_part_is_told(start: Start) -> None:
    async with start(evaluate, "import threading; value = [bytes(3_000_000), threading.Lock()]") as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Unloadable)
        assert "cannot pickle" in returned.traceback


async def test_what_cannot_be_loaded_here_is_told(start: Start) -> None:
    async with start(Trap) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Unloadable)
        assert "can't be loaded here" in returned.reason
        assert "RuntimeError: trapped" in returned.traceback
    async with start(evaluate, "import io; value = [bytes(2_000_000)] + [__import__('sys').exit] * 3") as ranks:
        assert isinstance(await ranks.returned(), Value)


async def test_a_worker_killed_while_sending_leaves_a_torn_result(start: Start) -> None:
    code = """
        import os, signal
        class Mine:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)
        value = [bytes(200_000), Mine()]
    """
    async with start(evaluate, code, nprocs=2) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Torn)
        assert "rank 0" in returned.reason
        assert await ranks.status() == ExitStatus(None, signal.SIGKILL)


async def test_a_grandchild_that_holds_the_pipe_delays_nothing(start: Start) -> None:
    code = "import os, time\nif os.fork() == 0: time.sleep(60)\nos._exit(0)"
    async with start(evaluate, code) as ranks:
        assert await ranks.status() == ExitStatus(0, None)
        assert await ranks.returned() == NoResult()
        assert ranks.processes[0].signal_group(signal.SIGKILL)


async def test_the_value_arrives_before_a_thread_that_outlives_the_function(start: Start) -> None:
    code = "import threading; threading.Thread(target=threading.Event().wait).start(); value = 5"
    async with start(evaluate, code) as ranks:
        assert await ranks.returned() == Value(5)
        assert not ranks.processes[0].exited.done()


async def test_a_function_that_cannot_be_sent_is_refused_before_anything_starts(start_apart: Start) -> None:
    with pytest.raises(pickle.PicklingError, match=r"fn rank 0 can't be sent.*cannot pickle '_thread.lock'"):
        async with start_apart(double, threading.Lock()):
            pass


async def test_a_function_that_cannot_be_loaded_there_is_a_failure_with_traceback(start_apart: Start) -> None:
    class Absent:
        def __reduce__(self) -> tuple[Any, ...]:
            return (__import__, ("no_such_module",))

    async with start_apart(double, Absent()) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Raised)
        assert "No module named 'no_such_module'" in returned.traceback
        assert "no_such_module" in ranks.text("err")
        assert ranks.error_file()["message"]["extraInfo"]["type"] == "builtins.ModuleNotFoundError"


async def test_queues_events_locks_and_pipes_are_shared(start_apart: Start) -> None:
    context = multiprocessing.get_context("spawn")
    queue, event, lock = context.SimpleQueue(), context.Event(), context.Lock()
    ours, theirs = context.Pipe()

    def use(queue: Any, event: Any, lock: Any, connection: Any) -> str:
        with lock:
            queue.put("from the worker")
            connection.send("through the pipe")
            event.set()
        return "done"

    def closed_over() -> str:
        return use(queue, event, lock, theirs)

    for function, args in [(use, (queue, event, lock, theirs)), (closed_over, ())]:
        event.clear()
        async with start_apart(function, *args) as ranks:
            assert await ranks.returned() == Value("done"), ranks.text("err")
            assert event.is_set()
            assert queue.get() == "from the worker"
            assert ours.recv() == "through the pipe"
    queue.close()
    for connection in (ours, theirs):
        connection.close()


async def test_shared_memory_outlives_the_worker(start_apart: Start) -> None:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    try:
        async with start_apart(write_to, memory) as ranks:
            assert await ranks.returned() == Value(4096)
            assert await ranks.status() == ExitStatus(0, None)
            assert ranks.text("err") == ""
        assert bytes(memory.buf or b"")[:5] == b"hello"
    finally:
        memory.close()
        memory.unlink()


class Handle:
    """Only a registered reducer can pickle it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not by pickle")


async def test_registered_reducers_are_honoured_in_arguments_and_closures(spawn: Start) -> None:
    reduction.ForkingPickler.register(Handle, lambda handle: (Handle, (handle.number,)))
    try:
        handle = Handle(7)
        async with spawn(lambda given: given.number + handle.number, Handle(5)) as ranks:
            assert await ranks.returned() == Value(12)
    finally:
        del reduction.ForkingPickler._extra_reducers[Handle]  # type: ignore[attr-defined]


async def test_multiprocessings_default_context_is_left_alone(spawn: Start) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    async with spawn(double, 1) as ranks:
        await ranks.returned()
    assert multiprocessing.get_start_method(allow_none=True) == before


async def test_environment_folder_and_path_are_the_workers_own(spawn: Start, tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("here = 11")
    (tmp_path / "record.py").write_text("raise RuntimeError('the wrong module')")
    code = """
        import os, sys
        import only_there, json
        value = [os.getcwd(), os.environ["MARK"], sys.flags.hash_randomization, only_there.here, sys.path[0]]
    """
    env = {"MARK": "x", "PYTHONHASHSEED": "0", "PYTHONPATH": str(tmp_path)}
    async with spawn(evaluate, code, env=env, options=WorkerOptions(cwd=tmp_path)) as ranks:
        assert await ranks.returned() == Value([str(tmp_path), "x", 0, 11, str(tmp_path)]), ranks.text("err")


async def test_nothing_is_imported_that_a_plain_function_does_not_need(
    spawn: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource_tracker._resource_tracker, "_fd", None)  # another test's, which a worker would join
    async with spawn(evaluate, "import sys; value = sorted(sys.modules)") as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Value)
        heavy = {"multiprocessing", "cloudpickle", "asyncio", "anyio", "runpy", "aelastic._function", "pytest"}
        assert not heavy.intersection(returned.value)


async def test_descriptors_of_ours_are_not_handed_on(spawn: Start) -> None:
    code = """
        import os
        links = ((fd, f"/proc/self/fd/{fd}") for fd in range(3, 400))
        value = [os.readlink(link) for fd, link in links if os.path.exists(link) and os.get_inheritable(fd)]
    """
    async with spawn(evaluate, code) as ranks:
        returned = await ranks.returned()
        assert isinstance(returned, Value)
        # uvloop hands on every inheritable descriptor of the host, and duplicates of the streams.
        allowed = _inheritable() | {f"{ranks.folder}/0.{name}" for name in ("out", "err")} | {os.devnull}
        assert not set(returned.value) - allowed


def _inheritable() -> set[str]:
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.get_inheritable(int(name)):
                links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links


async def test_a_worker_whose_supervisor_gives_up_ends(spawn: Start) -> None:
    async with spawn(evaluate, "import time; time.sleep(0.2); value = bytes(10_000_000)") as ranks:
        await ranks.function.close()
        assert await ranks.returned() == NoResult()
        assert await ranks.status() == ExitStatus(1, None)


@pytest.fixture(params=["forkserver", "fork"])
def fork(request: pytest.FixtureRequest, threads: ThreadPoolExecutor, tmp_path: Path) -> Start:
    """By the methods that fork(2)."""
    return functools.partial(started, request.param, threads, tmp_path)


async def test_a_worker_is_what_its_options_and_environment_say(start: Start, tmp_path: Path) -> None:
    code = """
        import os, resource, signal, sys
        print("to stdout")
        print("to stderr", file=sys.stderr)
        umask = os.umask(0)
        value = {
            "session": os.getsid(0) == os.getpid(),
            "cwd": os.getcwd(),
            "mark": os.environ["MARK"],
            "rank": os.environ["AELASTIC_RANK"],
            "umask": umask,
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "cpus": len(os.sched_getaffinity(0)),
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            "term": signal.getsignal(signal.SIGTERM),
            "stdin": sys.stdin.read(),
        }
    """
    options = WorkerOptions(cwd=tmp_path, umask=0o077, rlimits={resource.RLIMIT_NOFILE: (99, 99)}, cpus={0})
    async with start(evaluate, code, env={"MARK": "x"}, options=options, nprocs=2) as ranks:
        for rank in (0, 1):
            assert await ranks.returned(rank) == Value(
                {
                    "session": True,
                    "cwd": str(tmp_path),
                    "mark": "x",
                    "rank": str(rank),
                    "umask": 0o077,
                    "nofile": (99, 99),
                    "cpus": 1,
                    "blocked": set(),
                    "term": signal.SIG_DFL,
                    "stdin": "",
                }
            ), ranks.text("err", rank)
            assert await ranks.status(rank) == ExitStatus(0, None)
            assert ranks.text("out", rank) == "to stdout\n"
            assert ranks.text("err", rank) == "to stderr\n"


async def test_what_a_forked_worker_cannot_become_is_a_start_error(fork: Start) -> None:
    options = WorkerOptions(user="nobody-here")
    with pytest.raises(OSError, match=r"fn rank 0 can't be started: .*nobody-here"):
        async with fork(double, 1, options=options):
            pass


async def test_a_signal_right_after_the_fork_never_runs_the_hosts_handler(fork: Start, tmp_path: Path) -> None:
    mark = tmp_path / "handled"
    before = signal.signal(signal.SIGTERM, lambda *_: mark.write_text(str(os.getpid())))
    try:
        for _ in range(5):
            async with fork(evaluate, "import time; time.sleep(60)") as ranks:
                assert ranks.processes[0].signal_group(signal.SIGTERM)
                assert await ranks.status() == ExitStatus(None, signal.SIGTERM)
                assert await ranks.returned() == NoResult()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not mark.exists()


async def test_a_forked_worker_does_not_repeat_what_the_host_has_not_flushed(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    sys.stdout.write("once")
    async with started("fork", threads, tmp_path, evaluate, "print('own')") as ranks:
        await ranks.status()
        assert ranks.text("out") == "own\n"


async def test_forked_workers_share_what_was_there_at_the_fork(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    lock = threading.Lock()  # can't be pickled
    async with started("fork", threads, tmp_path, lambda given: given is lock, lock) as ranks:
        assert await ranks.returned() == Value(True)


async def test_modules_are_preloaded_once_and_those_that_cannot_be_are_told(
    threads: ThreadPoolExecutor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "preloaded.py").write_text("import os\npid = os.getpid()")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    code = "import sys, os; value = [sys.modules['preloaded'].pid, os.getppid()]"
    sys.path.insert(0, str(tmp_path))
    try:
        options = WorkerOptions(forkserver_preload=["no_such_module", "exits", "preloaded"])
        async with started("forkserver", threads, tmp_path, evaluate, code, nprocs=2, options=options) as ranks:
            values = [await ranks.returned(rank) for rank in (0, 1)]
            assert isinstance(values[0], Value)
            assert values[0] == values[1]
            assert values[0].value[0] == values[0].value[1]
        told = capfd.readouterr().err
        assert "no_such_module can't be imported: ModuleNotFoundError" in told
        assert "exits can't be imported: SystemExit: 3" in told
    finally:
        sys.path.remove(str(tmp_path))


async def test_when_the_fork_server_dies_its_workers_are_still_told_of(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    async with started("forkserver", threads, tmp_path, evaluate, "import sys; value = sys.stdin.read()") as ranks:
        assert await ranks.returned() == Value("")
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(0.2); value = 7"
    async with started("forkserver", threads, tmp_path, evaluate, code) as ranks:
        assert await ranks.returned() == Value(7)
        assert await ranks.status() in (ExitStatus(0, None), ExitStatus(None, None))


async def test_the_loop_goes_on_while_a_large_result_arrives(spawn: Start) -> None:
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    async with spawn(bytes, 200_000_000) as ranks:
        returned = asyncio.ensure_future(ranks.returned())
        while not _has_begun(ranks.function):
            await asyncio.sleep(0.001)
        ticker = asyncio.ensure_future(tick())
        value = await returned
        ticker.cancel()
        assert isinstance(value, Value)
        assert len(value.value) == 200_000_000
    assert turns > 10  # read or unpickled in the loop, it would be one


def _has_begun(function: Function) -> bool:
    return function._results[0]._transfer is not None


def test_a_stream_of_chunks_is_read_however_it_is_cut() -> None:
    from aelastic._child.frames import END, ChunkReader, ChunkWriter

    read_end, write_end = os.pipe()
    writer = ChunkWriter(write_end)
    pickler = pickle.Pickler(writer, 5)
    pickler.dump(["a", b"b" * 10, {"c": 1.5}])
    writer.mark(END)
    os.close(write_end)
    with open(read_end, "rb") as file:
        content = io.BytesIO(file.read())

    def read_into(view: memoryview) -> None:
        assert content.readinto(view) == len(view)

    reader = ChunkReader(read_into)
    assert pickle.load(reader) == ["a", b"b" * 10, {"c": 1.5}]
    reader.finish()


async def test_ranks_that_get_the_same_share_one_pickle_which_is_let_go_of(spawn: Start) -> None:
    data = bytes(100_000)
    spec = check(
        "fn",
        double,
        {0: (data,), 1: (data,)},
        None,
        None,
        "spawn",
        duplicate_stdout_filters=None,
        duplicate_stderr_filters=None,
        options=None,
        stop=None,
    )
    payloads, _ = _pickle_all(spec, range(2))
    assert payloads[0].body is payloads[1].body
    async with spawn(double, data, nprocs=2) as ranks:
        assert await ranks.returned(1) == Value(data * 2)
        assert not any(payload.body for payload in ranks.function._payloads.values())


async def test_what_an_interpreter_cannot_do_is_in_the_ranks_log(spawn: Start) -> None:
    async with spawn(double, 1, env={"PYTHONHOME": "/nowhere"}) as ranks:
        assert await ranks.returned() == NoResult()
        assert "encodings" in ranks.text("err")
