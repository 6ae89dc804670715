"""One process: started, signalled, its exit known, whoever collects it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aelastic._exit import ExitStatus
from aelastic._limits import check_descriptors
from aelastic._process import launch, platform, resolve
from aelastic._process.pace import SLOW_STARTS, STARTS, Pace
from tests.real import children
from tests.real.children import NET, child, command, open_ends, python


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", ExitStatus(0, None)),
        ("exit 3", ExitStatus(3, None)),
        ("sleep 0.05; exit 255", ExitStatus(255, None)),
        ("kill -KILL $$", ExitStatus(None, 9)),
        ("kill -SEGV $$", ExitStatus(None, 11)),
    ],
)
async def test_an_exit_is_told_as_the_kernel_tells_it(script: str, status: ExitStatus) -> None:
    async with child("sh", "-c", script) as started:
        assert await asyncio.wait_for(started.process.exited, NET) == status
        assert started.process.has_ended()
        assert started.process.exit_ns > started.process.started_ns


async def test_an_exit_is_seen_although_a_grandchild_holds_the_pipe() -> None:
    async with child("sh", "-c", "sleep 60 & echo ready") as started:
        await started.line()
        assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(0, None)
        assert started.process.signal_group(signal.SIGKILL)


async def test_many_short_processes_lose_no_exit() -> None:
    async def one(code: int) -> None:
        async with child("sh", "-c", f"exit {code}") as started:
            assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(code, None)

    for start in range(0, 200, 20):
        await asyncio.gather(*(one(code) for code in range(start, start + 20)))


async def test_a_turn_of_the_loop_starts_a_few_processes_only_in_the_order_of_asking() -> None:
    """Hundreds of runs that start at the same moment leave every turn to the host's own work, too."""
    pace, started = Pace.of_running_loop(), list[int]()

    async def begin(number: int) -> None:
        await pace.start_admitted()
        started.append(number)

    tasks = [asyncio.ensure_future(begin(number)) for number in range(10)]
    most = STARTS if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop) else SLOW_STARTS
    counts = [0]
    while len(started) < len(tasks):
        await asyncio.sleep(0)
        counts.append(len(started))
    assert started == list(range(10))
    assert max(after - before for before, after in itertools.pairwise(counts)) <= most


async def test_signals_and_exits_race_and_nothing_is_lost() -> None:
    for pause in range(60):
        async with child("sh", "-c", "exit 7") as started:
            await asyncio.sleep(pause / 20_000)
            started.process.signal_group(signal.SIGTERM)
            status = await asyncio.wait_for(started.process.exited, NET)
            assert status in (ExitStatus(7, None), ExitStatus(None, signal.SIGTERM))


@pytest.fixture
def reaper() -> Iterator[Callable[[], None]]:
    """Starts a thread of the host that waits for every child there is."""
    over = threading.Event()

    def reap() -> None:
        while not over.is_set():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.0005)

    thread = threading.Thread(target=reap)
    yield thread.start
    over.set()
    thread.join()


@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
async def test_a_status_that_another_waiter_took_at_once_is_unknown_and_not_invented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_child = platform.open_child

    def too_late(pid: int) -> int | None:
        os.waitpid(pid, 0)
        return open_child(pid)

    monkeypatch.setattr(platform, "open_child", too_late)
    async with child("sh", "-c", "exit 0") as started:
        status = await asyncio.wait_for(started.process.exited, NET)
        assert (status.code, status.signal, status.returncode) == (None, None, 255)
        assert not started.process.signal_group(signal.SIGKILL)


# uvloop has no way to let go of a child that another waiter took; it closes its handle with the loop, and says so.
@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
async def test_a_foreign_waitpid_neither_loses_the_exit_nor_changes_its_status(reaper: Callable[[], None]) -> None:
    async def one(code: int) -> None:
        async with child("sh", "-c", f"echo ready; sleep 0.25; exit {code}") as started:
            await started.line()
            assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(code, None)
            began = time.monotonic()
            await started.process.reaped(NET)
            assert time.monotonic() - began < 5

    reaper()
    await asyncio.gather(*map(one, range(12)))


async def test_an_exit_is_known_although_the_host_ignores_sigchld() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        async with child("sh", "-c", "sleep 0.02; exit 6") as started:
            assert await asyncio.wait_for(started.process.exited, NET) == ExitStatus(6, None)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_it_works_in_a_loop_of_another_thread() -> None:
    statuses: list[ExitStatus] = []

    async def main() -> None:
        async with child("sh", "-c", "exit 4") as started:
            statuses.append(await asyncio.wait_for(started.process.exited, NET))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join()
    assert statuses == [ExitStatus(4, None)]


async def test_the_group_is_signalled_also_after_its_leader_was_collected() -> None:
    async with child("sh", "-c", "sleep 60 & echo $!") as started:
        grandchild = int(await started.line())
        await asyncio.wait_for(started.process.exited, NET)
        await started.process.reaped(NET)
        pidfd = os.pidfd_open(grandchild)
        assert started.process.signal_group(signal.SIGKILL)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        await asyncio.wait_for(ended.wait(), NET)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


async def test_a_stranger_that_got_the_pid_is_not_signalled() -> None:
    async with child("true") as started:
        await asyncio.wait_for(started.process.exited, NET)
        await started.process.reaped(NET)
        with children.process_of_pid(started.process.pid) as stranger:
            assert stranger == started.process.pid
            assert not started.process.signal_group(signal.SIGKILL)
            assert os.waitpid(stranger, os.WNOHANG) == (0, 0)


async def test_a_worker_leads_a_session_and_is_given_what_was_written() -> None:
    code = "print(os.getsid(0) == os.getpid() == os.getpgrp(), [os.fsencode(a) for a in sys.argv[1:]])"
    async with child(*python(code), "", "a b", b"\xff") as started:
        assert await started.line() == "True [b'', b'a b', b'\\xff']"


async def test_the_program_is_called_as_the_user_wrote_it() -> None:
    async with child("sh", "-c", "tr '\\0' '\\n' </proc/$$/cmdline | head -1") as started:
        assert await started.line() == "sh"


async def test_a_program_is_looked_up_along_the_workers_own_path(tmp_path: Path) -> None:
    program = tmp_path / "only-here"
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    async with child("only-here", env={"PATH": f"/nowhere:{tmp_path}"}) as started:
        assert await started.line() == "found"
    async with child("./only-here", cwd=str(tmp_path)) as started:
        assert await started.line() == "found"


@pytest.mark.parametrize(
    ("program", "error", "text"),
    [
        ("no-such-program", FileNotFoundError, "no such program was found along the worker's PATH"),
        ("./no-such-program", FileNotFoundError, "no such program was found from"),
        ("/etc/passwd", PermissionError, "/etc/passwd is not executable"),
        ("/", PermissionError, "/ is a directory"),
    ],
)
async def test_a_program_that_cannot_be_executed_is_named(program: str, error: type[OSError], text: str) -> None:
    with pytest.raises(error) as raised:
        resolve(program, os.environ, None, who="demo rank 2")
    assert text in str(raised.value)
    with pytest.raises(error) as raised:
        async with child(program, rank=2):
            pass
    assert text in str(raised.value)
    assert "demo rank 2 can't be started" in str(raised.value)


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="its directory does not exist"):
        async with child("true", cwd=str(tmp_path / "gone")):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="its cwd is no directory"):
        async with child("true", cwd=str(tmp_path / "file")):
            pass


async def test_a_script_whose_interpreter_is_missing_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(FileNotFoundError, match="the interpreter that its first line names does not exist"):
        async with child(str(script)):
            pass


async def test_too_long_arguments_are_told() -> None:
    with pytest.raises(OSError, match="larger than the kernel takes") as raised:
        async with child("true", "x" * 3_000_000):
            pass
    assert raised.value.errno == errno.E2BIG


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Lowers the soft limit to so many more than are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers: list[int] = []

    def lower(free: int) -> None:
        """The kernel gives the lowest free number, below the limit: fill the holes, then leave so many."""
        while fillers:
            os.close(fillers.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        fillers.append(os.open(os.devnull, os.O_RDONLY))
        while fillers[-1] < highest:
            fillers.append(os.dup(fillers[0]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(highest, fillers[-1]) + 1 + free, before[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    while fillers:
        os.close(fillers.pop())


async def test_running_out_of_descriptors_at_any_point_leaves_nothing(few_descriptors: Callable[[int], None]) -> None:
    async with child("true"):
        pass  # what the loop opens once is open
    refused = started = 0
    with open_ends() as (stdin, stdout):
        for free in range(1, 16):
            few_descriptors(free)
            try:
                process = await launch(command("true", stdin=stdin, stdout=stdout))
            except OSError as error:
                refused += error.errno == errno.EMFILE
                continue
            started += 1
            await asyncio.wait_for(process.exited, NET)
            await process.reaped(NET)
            process.close()
        assert refused >= 1  # two are needed for the spawn itself
    assert started >= 2
    assert refused + started == 15


async def test_a_shortage_names_resource_limit_and_need(few_descriptors: Callable[[int], None]) -> None:
    with open_ends() as (stdin, stdout):
        few_descriptors(1)
        with pytest.raises(OSError, match=r"demo rank 0 .*no descriptor is left: this process may .*RLIMIT_NOFILE"):
            await launch(command("true", stdin=stdin, stdout=stdout))


def test_the_need_of_all_ranks_is_checked_before_the_start(few_descriptors: Callable[[int], None]) -> None:
    few_descriptors(50)
    check_descriptors(40, "demo")
    with pytest.raises(OSError, match=r"demo can't be started: it needs 500 descriptors, .*RLIMIT_NOFILE") as raised:
        check_descriptors(500, "demo")
    assert raised.value.errno == errno.EMFILE


async def test_a_child_that_asyncio_cannot_watch_does_not_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        pytest.skip("uvloop watches by SIGCHLD")

    def no_descriptor(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", no_descriptor)
    with pytest.raises(OSError, match="demo rank 0 can't be started") as raised:
        async with child("sleep", "60"):
            pass
    assert raised.value.errno == errno.EMFILE


async def test_cpu_seconds_are_told_where_the_zombie_could_be_read() -> None:
    async with child(*python("while time.process_time() < 0.1: pass")) as started:
        await asyncio.wait_for(started.process.exited, NET)
        cpu_seconds = started.process.usage.cpu_seconds
    assert cpu_seconds is not None
    assert 0.05 < cpu_seconds < 5


async def test_closing_is_idempotent_and_ends_signalling() -> None:
    async with child("sleep", "60") as started:
        assert started.process.signal_group(signal.SIGKILL)
        await asyncio.wait_for(started.process.exited, NET)
        started.process.close()
        started.process.close()
        assert not started.process.signal_group(signal.SIGKILL)
