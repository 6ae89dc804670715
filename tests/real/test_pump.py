"""Every byte that a worker writes is read, in order, and goes to its file first."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path

import pytest

from aelastic._logs import DefaultLogsSpecs, LogsDest, Outputs, plan
from aelastic._logs import pipes as pipes_file
from aelastic._logs.tail import Tail
from aelastic._std import Std
from tests.real.streams import PipeConsole, attempt, until

PREFIX = b"[job0]:"


def shown_as(data: bytes) -> bytes:
    """What a console shows of a finished stream of rank 0."""
    *whole, rest = data.split(b"\n")
    return b"".join(PREFIX + line + b"\n" for line in ([*whole, rest] if rest else whole))


async def test_every_byte_is_in_the_file_and_every_line_on_the_console(tmp_path: Path) -> None:
    """Whatever the bytes and however they are written, the file has them and the console the lines."""
    chance = random.Random(4)
    parts = [b"\n", b"\0", b"\xff\xfe", "ü".encode(), b"\r50%\r", b"x" * 999]
    data = b"".join(chance.choice(parts) for _ in range(4000))
    console = PipeConsole()
    console.read_on()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        at = 0
        while at < len(data):
            size = chance.choice([1, 7, 4096, 100_000])
            await streams.write(data[at : at + size])
            at += size
        assert await streams.end()
        assert streams.file() == data
    assert console.close() == shown_as(data)
    assert streams.lost == []


async def test_a_long_line_is_whole_everywhere(tmp_path: Path) -> None:
    """A line far beyond what is held in memory is whole in the file and on the console."""
    data = b"a\n" + b"x" * (20 << 20) + b"end\nlast"
    console = PipeConsole()
    console.read_on()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        await streams.write(data)
        assert await streams.end()
        assert streams.file() == data
        assert streams.outputs.tail(0, Std.OUT)[-1] == "last"
    assert console.close() == shown_as(data)


async def test_a_worker_that_dies_leaves_all_it_wrote(tmp_path: Path) -> None:
    """What is in the pipe when the worker is killed reaches the file."""
    code = "import os,signal\nfor i in range(5000): os.write(1, b'line %d\\n' % i)\nos.kill(os.getpid(), 9)"
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), 1, console=(console := PipeConsole())) as streams:
        console.read_on()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=streams.ends[0, Std.OUT])
        await process.wait()
        assert await streams.end()
        assert streams.file() == b"".join(b"line %d\n" % i for i in range(5000))
    console.close()


async def test_a_redirect_is_written_by_the_worker_itself(tmp_path: Path) -> None:
    """A plain redirect hands the worker its file, opened to be appended to."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT)) as streams:
        end = streams.ends[0, Std.OUT]
        assert os.path.samestat(os.fstat(end), os.stat(streams.dest.stdouts[0]))
        os.write(end, b"direct")
        assert streams.file() == b"direct"
        assert streams.outputs.pipe_inodes(0) == frozenset()
        assert await streams.end()


async def test_an_open_pipe_is_left_when_the_time_is_up(tmp_path: Path) -> None:
    """While somebody holds the pipe the end is not reached; what was written by then is in the file."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, timestamps=True)) as streams:
        held = os.dup(streams.ends[0, Std.OUT])
        inode = os.fstat(held).st_ino
        streams.hang_up()
        os.write(held, b"grandchild")
        hurry: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert streams.outputs.pipe_inodes(0) == {inode}
        assert not await streams.outputs.at_eof(0, 0.05, hurry)
        hurry.set_result(None)
        assert not await streams.outputs.at_eof(0, 60.0, hurry)
        assert not await streams.outputs.finish(0, within=0.05)
        assert streams.file() == b"grandchild"
        with pytest.raises(BrokenPipeError):
            os.write(held, b"too late")
        os.close(held)


async def test_the_end_is_told_at_once(tmp_path: Path) -> None:
    """Waiting for the end of output ends with the output, long before its time is up."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), capture=Std.ALL)) as streams:
        hurry: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        streams.hang_up()
        assert await streams.outputs.at_eof(0, 60.0, hurry)


async def test_a_slow_disk_holds_the_worker_back_within_a_bound(tmp_path: Path) -> None:
    """While the disk doesn't answer, so much is read ahead and no more; nothing is lost when it answers."""
    data = os.urandom(12 << 20)
    dest = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, timestamps=True).reify({0: {}})
    dest.buffer_bytes = 1 << 20
    async with attempt(dest, threads=1) as streams:
        disk = threading.Event()
        executor = streams.outputs._executor
        stuck = executor.submit(disk.wait)
        writing = asyncio.ensure_future(streams.write(data))
        pump = streams.outputs._pumps[0, Std.OUT]
        await until(lambda: pump._paused)
        assert pump.stream.tail.size <= dest.buffer_bytes + 2 * (1 << 20)
        assert not writing.done()
        disk.set()
        stuck.result()
        await writing
        assert await streams.end()
        assert streams.file() == data
        assert streams.lost == []


async def test_no_stream_starves_another_and_none_the_loop(tmp_path: Path) -> None:
    """Beside streams at full speed, a quiet one is heard and the loop's other tasks have their turns."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), capture=Std.OUT), 5) as streams:
        code = "import os\nwhile True: os.write(1, b'x' * 4095 + b'\\n')"
        processes = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=streams.ends[rank, Std.OUT])
            for rank in range(4)
        ]
        await until(lambda: all(streams.outputs._pumps[rank, Std.OUT].stream.tail.size > 1 << 22 for rank in range(4)))
        longest = 0.0
        for number in range(20):
            await streams.write(b"%d\n" % number, rank=4)
            waiting = asyncio.ensure_future(streams.hub.wait_for_line(rf"^{number}$", ranks=[4], timeout=30))
            while not waiting.done():
                before = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - before)
            waiting.result()
        assert longest < 1.0  # a net: benchmarks measure it
        for process in processes:
            process.kill()
            await process.wait()
        for rank in range(5):
            assert await streams.end(rank)


async def test_chatty_streams_are_looked_at_together(tmp_path: Path) -> None:
    """While many lines come one by one they cost no wake-up each; when it is quiet again each stream is waited for."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, capture=Std.OUT), 20) as streams:
        ends = [streams.ends[rank, Std.OUT] for rank in range(20)]
        pumps = [streams.outputs._pumps[rank, Std.OUT] for rank in range(20)]
        rounds = 0
        while not all(pump._looked_at for pump in pumps):
            for end in ends:
                os.write(end, b"line %d\n" % rounds)
            rounds += 1
            await asyncio.sleep(0)
        await until(lambda: not any(pump._looked_at for pump in pumps))
        for rank, end in enumerate(ends):
            os.write(end, b"last\n")
            await streams.hub.wait_for_line("^last$", ranks=[rank], timeout=30)
            assert await streams.end(rank)
            assert streams.file(rank) == b"".join(b"line %d\n" % number for number in range(rounds)) + b"last\n"


async def test_filter_files_hold_the_matching_lines_of_all_ranks(tmp_path: Path) -> None:
    """Lines with one of the words go to the shared file, with their prefix."""
    console = PipeConsole()
    console.read_on()
    specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT)
    async with attempt(specs, 2, console=console, filters={Std.OUT: ["loss", "acc"]}) as streams:
        for rank in range(2):
            await streams.write(b"step 1\nloss 2\nnothing\nlast acc", rank)
            assert await streams.end(rank)
        path = streams.dest.filtered_stdout
    console.close()
    assert sorted(Path(path).read_bytes().splitlines()) == [
        b"[job0]:last acc",
        b"[job0]:loss 2",
        b"[job1]:last acc",
        b"[job1]:loss 2",
    ]


async def test_an_error_of_our_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a sink is never swallowed: it is handed on, and the stream is at its end."""
    async with attempt(DefaultLogsSpecs(str(tmp_path), capture=Std.OUT)) as streams:
        monkeypatch.setattr(Tail, "append", lambda *_: 1 / 0)
        await streams.write(b"anything\n")
        await until(lambda: streams.broken)
        assert isinstance(streams.broken[0], ZeroDivisionError)
        assert streams.outputs._pumps[0, Std.OUT].at_eof.done()


async def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """The rank whose file can't be opened can't be started, and the text says which file of which rank."""
    paths = {0: str(tmp_path / "fine.log"), 1: str(tmp_path / "missing" / "out.log")}
    dest = LogsDest(stdouts=paths, tee_stdouts=dict(paths))
    with pytest.raises(FileNotFoundError, match=r"job rank 1: the file for its stdout .*missing/out.log"):
        async with attempt(dest, 2):
            pass


async def test_running_out_of_descriptors_leaves_none_open(tmp_path: Path) -> None:
    """When the pipes of an attempt don't all fit, it has none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 12, hard))
    try:
        with pytest.raises(OSError, match="no pipes for the output of its 40 ranks"):
            async with attempt(DefaultLogsSpecs(os.devnull).reify({}), 0), attempt(_captured(40), 40):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _captured(nprocs: int) -> LogsDest:
    return LogsDest(captures=dict.fromkeys(range(nprocs), Std.OUT))


def test_pipes_keep_below_a_share_of_the_users_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more pipes there are, the smaller each is made; what is closed is given back."""
    monkeypatch.setattr(pipes_file, "_limit_bytes", lambda: 4 << 20)
    before = pipes_file._share._used_bytes
    few = pipes_file.open_pipes(2)
    many = pipes_file.open_pipes(16)
    assert [pipe.size_bytes for pipe in few] == [1 << 20] * 2
    assert {pipe.size_bytes for pipe in many} == {1 << 17}
    for pipe in (*few, *many):
        pipe.close()
    assert pipes_file._share._used_bytes == before


async def test_outputs_close_without_any_start(tmp_path: Path) -> None:
    """What was opened for workers that never came is closed."""
    dest = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, redirects=Std.ERR).reify({0: {}})
    async with attempt(LogsDest(), 0) as lent:
        outputs = await Outputs.open(
            plan(dest, 1, {}),
            name="job",
            attempt=0,
            prefixes={},
            filters={},
            executor=lent.outputs._executor,
            console=lent.console,
            hub=lent.hub,
            on_lost=lambda *_: None,
            on_broken=lambda _: None,
        )
        await outputs.child_fds(0)
        await outputs.close()
        await outputs.close()
