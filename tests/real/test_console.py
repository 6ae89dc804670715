"""The console shows whole lines, and is nobody's trouble when it hangs."""

from __future__ import annotations

import asyncio
import io
import os
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aelastic._logs import Console, DefaultLogsSpecs
from aelastic._logs import voice as voice_file
from aelastic._logs.console import Place
from aelastic._logs.prefix import Prefix
from aelastic._logs.voice import Voice
from aelastic._std import Std
from tests.real.streams import PipeConsole, attempt, console_is, until


def speaker(console: Console, rank: int, std: Std = Std.OUT) -> Voice:
    """A stream's way to the console."""
    voice = console.voice(std, Prefix.fixed(f"[{rank}]:"), f"/logs/{rank}.log", rank=rank)
    assert voice is not None
    return voice


def said(voice: Voice, data: bytes) -> None:
    """Take a chunk and put out what is whole."""
    voice.feed(data)
    voice.say()


async def finished(console: Console, pipe: PipeConsole) -> bytes:
    """Close both; return what was shown."""
    pipe.read_on()
    await console.settled(30)
    console.close()
    return pipe.close()


def threads_of_ours() -> list[str]:
    """Names of console threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name == "aelastic-console"]


async def test_lines_of_two_streams_are_never_mixed(tmp_path: Path) -> None:
    """Ranks that write halves of lines in turn are shown line by line."""
    console = PipeConsole()
    console.read_on()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.ALL), 4, console=console) as streams:
        for number in range(50):
            for half in (b"begin-%d-" % number, b"end-%d\n" % number):
                for rank in range(4):
                    for std in (Std.OUT, Std.ERR):
                        await streams.write(half, rank, std)
        for rank in range(4):
            await streams.end(rank)
    lines = console.close().decode().splitlines()
    assert len(lines) == 400
    assert all(re.fullmatch(r"\[job[0-3]\]:begin-(\d+)-end-\1", line) for line in lines)


async def test_an_unfinished_line_is_shown_after_a_quiet_moment(tmp_path: Path) -> None:
    """A prompt appears although its line has no end, and is completed without a second prefix."""
    console = PipeConsole()
    console.read_on()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        await streams.write(b"name? ")
        await until(lambda: console.shown == b"[job0]:name? ")
        await streams.write(b"Ada")
        await until(lambda: console.shown == b"[job0]:name? Ada")
        await streams.write(b"\nthanks\n")
        await streams.end()
    assert console.close() == b"[job0]:name? Ada\n[job0]:thanks\n"


async def test_an_interrupted_line_is_ended_and_shown_whole_later() -> None:
    """When another stream writes first, a newline ends the part, and the whole line comes when it is complete."""
    pipe = PipeConsole()
    with console_is(pipe.text):
        console = Console()
    slow, other = speaker(console, 0), speaker(console, 1)
    said(slow, b"10%")
    slow.hush()
    said(other, b"hello\n")
    said(slow, b"\r20%")
    slow.hush()  # not shown in part again
    said(other, b"again\n")
    said(slow, b"\r100%\n")
    shown = await finished(console, pipe)
    assert shown == b"[0]:10%\n[1]:hello\n[1]:again\n[0]:10%\r20%\r100%\n"


async def test_an_unfinished_line_waits_while_another_is_shown() -> None:
    """Only where the console stands at the start of a line is an unfinished one shown."""
    pipe = PipeConsole()
    with console_is(pipe.text):
        console = Console()
    first, second = speaker(console, 0), speaker(console, 1)
    said(first, b"one")
    first.hush()
    said(second, b"two")
    second.hush()
    first.finish()
    second.hush()
    second.finish()
    assert await finished(console, pipe) == b"[0]:one\n[1]:two\n"


@pytest.mark.parametrize("rest", [b"\n", b" of it\n"])
async def test_what_was_left_out_is_told_before_an_unfinished_line_is_shown(
    rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the line is complete: the marker would stand in the midst of it."""
    stalled = True
    monkeypatch.setattr(Place, "stalled", property(lambda _: stalled))
    monkeypatch.setattr(voice_file, "STALLED_BYTES", 0)
    pipe = PipeConsole()
    with console_is(pipe.text):
        console = Console()
    voice = speaker(console, 0)
    said(voice, b"one\ntwo\n")
    stalled = False
    said(voice, b"half")
    voice.hush()
    said(voice, rest)
    marker = b"[0]:(2 lines were left out here: the console was stalled; everything is in /logs/0.log)\n"
    assert await finished(console, pipe) == marker + b"[0]:half" + rest


async def test_a_stalled_console_stalls_nobody(tmp_path: Path) -> None:
    """While nobody reads the console, worker and file go on; lines left out are counted where it moves again."""
    lines = [b"line %07d" % number for number in range(1 << 18)]
    console = PipeConsole()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        await streams.write(b"\n".join(lines) + b"\n")  # returns: the worker is not held back for ever
        await until(lambda: streams.outputs._pumps[0, Std.OUT].stream.tail.lines == len(lines))
        console.read_on()
        await streams.console.settled(30)
        await streams.write(b"it moves\n")
        await streams.end()
        assert streams.file() == b"\n".join(lines) + b"\nit moves\n"
        path = streams.dest.stdouts[0]
    shown = console.close().decode().splitlines()
    markers = [line for line in shown if "left out" in line]
    assert markers
    assert all(path in marker for marker in markers)
    left_out = sum(int(count) for marker in markers for count in re.findall(r"\((\d+) line", marker))
    assert len(shown) - len(markers) + left_out == len(lines) + 1
    assert shown[-1] == "[job0]:it moves"


async def test_who_waits_for_room_is_called_once_however_often_it_asks() -> None:
    """A pump that finds no room asks again; if each question were answered twice, answers would double for ever."""
    pipe = PipeConsole()
    with console_is(pipe.text):
        console = Console()
    voice = speaker(console, 0)
    calls: list[float] = []
    loop = asyncio.get_running_loop()

    def wake() -> None:
        calls.append(loop.time())
        voice.wake_when_room(wake)

    while not voice.full:
        said(voice, b"x" * 99_999 + b"\n")
    for _ in range(50):
        voice.wake_when_room(wake)
    began = loop.time()
    await until(lambda: len(calls) >= 2)  # two rechecks: nobody reads this console, so there is no room
    assert len(calls) <= 2 + (loop.time() - began) / voice_file.RECHECK
    voice.finish()
    await finished(console, pipe)


async def test_a_slow_console_that_moves_loses_nothing(tmp_path: Path) -> None:
    """A console that accepts a little at a time holds the worker back instead of losing lines."""
    data = b"".join(b"line %07d\n" % number for number in range(1 << 17))
    console = PipeConsole()

    def read_slowly() -> None:
        while chunk := os.read(console.read_fd, 20_000):
            console.shown += chunk
            pause.wait(0.005)

    pause = threading.Event()
    reader = threading.Thread(target=read_slowly)
    reader.start()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        await streams.write(data)
        pause.set()
        await streams.end()
    console.text.close()
    reader.join()
    os.close(console.read_fd)
    assert bytes(console.shown) == data.replace(b"line", b"[job0]:line")


async def test_a_closed_console_is_nobodys_trouble(tmp_path: Path) -> None:
    """When the other end is closed, everything else goes on."""
    console = PipeConsole()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console) as streams:
        os.close(console.read_fd)
        data = b"gone\n" * (1 << 20)
        await streams.write(data)
        await streams.end()
        assert streams.file() == data
        assert streams.broken == []
    console.text.close()


async def test_a_stalled_console_is_let_go_when_the_time_is_up(tmp_path: Path) -> None:
    """At the end a console that accepts nothing is waited for within bounds, and its thread ends."""
    console = PipeConsole()
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), console=console, settle=0.1) as streams:
        await streams.write(b"x" * 99 + b"\n" * (1 << 18))
        await streams.end()
    await until(lambda: not threads_of_ours(), "the console's thread did not end")
    console.read_on()
    console.close()


async def test_streams_that_end_in_one_place_share_one_writer() -> None:
    """stdout and stderr of all runs have one thread where they are one pipe; it is gone with the last run."""
    pipe = PipeConsole()
    with console_is(pipe.text, io.TextIOWrapper(io.FileIO(pipe.text.fileno(), "w", closefd=False))):
        first, second = Console(), Console()
    voices = [speaker(console, 0, std) for console in (first, second) for std in (Std.OUT, Std.ERR)]
    assert len(threads_of_ours()) == 1
    for voice in voices:
        said(voice, b"line\n")
    first.close()
    first.close()
    assert len(threads_of_ours()) == 1
    assert await finished(second, pipe) == b"[0]:line\n" * 4
    await until(lambda: not threads_of_ours())


async def test_a_long_line_holds_the_console_until_it_ends() -> None:
    """A line that is too long to be held is shown as it comes, and others wait for its end."""
    pipe = PipeConsole()
    pipe.read_on()
    with console_is(pipe.text):
        console = Console()
    long, other = speaker(console, 0), speaker(console, 1)
    part = b"x" * (voice_file.HELD_BYTES + 1)
    said(long, part)
    said(other, b"waits\n")
    said(long, part + b"\nnext\n")
    assert await finished(console, pipe) == b"[0]:" + part * 2 + b"\n[0]:next\n[1]:waits\n"


async def test_a_long_line_that_is_quiet_lets_others_speak() -> None:
    """A long line that stops is broken for those that wait, and goes on as a line of its own."""
    pipe = PipeConsole()
    pipe.read_on()
    with console_is(pipe.text):
        console = Console()
    long, other = speaker(console, 0), speaker(console, 1)
    part = b"x" * (voice_file.HELD_BYTES + 1)
    said(long, part)
    said(other, b"waits\n")
    long.said_at -= 1.0  # it was quiet for a while
    long.hush()
    said(long, b"rest\n")
    long.finish()
    assert await finished(console, pipe) == b"[0]:" + part + b"\n[1]:waits\n[0]:rest\n"


async def test_two_long_lines_come_one_after_the_other(tmp_path: Path) -> None:
    """While one holds the console the other waits, its worker held back; both are whole."""
    console = PipeConsole()
    console.read_on()
    line = b"y" * (8 << 20)
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), 2, console=console) as streams:
        await asyncio.gather(streams.write(line + b"\n", 0), streams.write(line + b"\n", 1))
        await streams.end(0)
        await streams.end(1)
    assert sorted(console.close().splitlines()) == [b"[job0]:" + line, b"[job1]:" + line]


async def test_a_worker_does_not_wait_for_a_long_line_that_stopped(tmp_path: Path) -> None:
    """A long line without end that is quiet is broken for another long one."""
    console = PipeConsole()
    console.read_on()
    line = b"y" * (3 << 20)
    async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT), 2, console=console) as streams:
        await streams.write(line, 0)
        await until(lambda: len(console.shown) == len(b"[job0]:" + line))  # all of it, after the quiet moment
        await streams.write(line + b"\n", 1)
        await until(lambda: console.shown.endswith(b"y\n"))
        await streams.write(b"end\n", 0)
        await streams.end(0)
        await streams.end(1)
    assert console.close().splitlines() == [b"[job0]:" + line, b"[job1]:" + line, b"[job0]:end"]


@pytest.mark.parametrize("binary", [True, False])
async def test_stream_objects_without_a_descriptor_are_written_to(tmp_path: Path, binary: bool) -> None:
    """A notebook's or a test runner's stdout is used through its own write."""
    stream: Any = io.TextIOWrapper(io.BytesIO()) if binary else io.StringIO()
    with console_is(stream):
        async with attempt(DefaultLogsSpecs(str(tmp_path), tee=Std.OUT)) as streams:
            await streams.write("grüße\n".encode())
            await streams.end()
    text = stream.buffer.getvalue().decode() if binary else stream.getvalue()
    assert text == "[job0]:grüße\n"


async def test_the_console_is_what_it_was_when_the_run_started(capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that is put in its place later gets nothing."""
    console = Console()
    with console_is(io.StringIO()) as _:
        said(speaker(console, 0), b"here\n")
    await console.settled(30)
    console.close()
    assert capsys.readouterr().out == "[0]:here\n"


async def test_what_the_host_printed_before_comes_first() -> None:
    """Text that waits in the host's own buffer is flushed before the first line."""
    pipe = PipeConsole()
    buffered = io.TextIOWrapper(io.BufferedWriter(io.FileIO(pipe.text.fileno(), "w", closefd=False)))
    buffered.write("host\n")
    with console_is(buffered):
        console = Console()
    said(speaker(console, 0), b"line\n")
    assert await finished(console, pipe) == b"host\n[0]:line\n"


async def test_a_host_without_streams_shows_nothing() -> None:
    """Under a daemon without stdout, or with a closed one, there is no console and no error."""
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    with console_is(None, closed):
        console = Console()
    assert console.voice(Std.OUT, Prefix.fixed(""), "") is None
    voice = console.voice(Std.ERR, Prefix.fixed(""), "")
    if voice is not None:
        said(voice, b"line\n")
    assert await console.settled(30)
    console.close()


async def test_a_console_that_others_made_nonblocking_is_waited_for() -> None:
    """Another program may have set O_NONBLOCK on the shared terminal; nothing is lost for it."""
    pipe = PipeConsole()
    os.set_blocking(pipe.text.fileno(), False)
    with console_is(pipe.text):
        console = Console()
    said(speaker(console, 0), b"x" * 99_999 + b"\n")
    assert await finished(console, pipe) == b"[0]:" + b"x" * 99_999 + b"\n"


async def test_a_kernel_without_nonblocking_pipe_writes_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pipe can't be written to without blocking, small writes after poll do the same."""
    monkeypatch.setattr("aelastic._logs.terminal.NOWAIT", None)
    pipe = PipeConsole()
    with console_is(pipe.text):
        console = Console()
    said(speaker(console, 0), b"x" * 299_999 + b"\n")
    assert await finished(console, pipe) == b"[0]:" + b"x" * 299_999 + b"\n"


def test_the_register_of_places_is_empty_between_runs() -> None:
    """Nothing process-wide stays when no run is left."""
    assert Console._places == {}
    assert Place.__name__ not in [type(thread).__name__ for thread in threading.enumerate()]


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
async def test_prefixes_are_coloured_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    """Each rank in a colour of its own, unless NO_COLOR is set; the filter file has none."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    controller, terminal = os.openpty()
    with open(controller, "rb", buffering=0) as screen, os.fdopen(terminal, "w") as text:
        with console_is(text):
            specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, prefix="{rank}>")
            async with attempt(specs, 2, filters={Std.OUT: ["hi"]}) as streams:
                for rank in range(2):
                    await streams.write(b"hi\n", rank)
                    await streams.end(rank)
                path = streams.dest.filtered_stdout
        shown = b""
        while shown.count(b"\n") < 2:
            shown += screen.read(1000)
    expected = [b"\x1b[36m0>\x1b[0mhi", b"\x1b[33m1>\x1b[0mhi"] if coloured else [b"0>hi", b"1>hi"]
    assert shown.splitlines() == expected
    assert Path(path).read_bytes() == b"0>hi\n1>hi\n"


async def test_prefixes_of_ranks_and_of_the_specs(tmp_path: Path) -> None:
    """A rank's own prefix comes first; a time tells when the line began, in the filter file too."""
    console = PipeConsole()
    console.read_on()
    specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, prefix="{time:%Y}-{rank} ")
    year = datetime.now(UTC).astimezone().strftime("%Y").encode()
    async with attempt(specs, 2, console=console, filters={Std.OUT: ["a"]}, prefixes={0: "{mine} "}) as streams:
        for rank in range(2):
            await streams.write(b"a\n", rank)
            await streams.end(rank)
        path = streams.dest.filtered_stdout
    assert console.close() == b"{mine} a\n" + year + b"-1 a\n"
    assert sorted(Path(path).read_bytes().splitlines()) == sorted([b"{mine} a", year + b"-1 a"])


async def test_a_prefix_that_raises_at_the_start_leaves_nothing_open(tmp_path: Path) -> None:
    """Its error is the start's, before any pipe is made."""
    specs = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, prefix=lambda origin: str(1 // origin.rank))
    with pytest.raises(ZeroDivisionError):
        async with attempt(specs):
            pass
