"""Lines reach every reader at its own pace, and none is lost without being counted."""

from __future__ import annotations

import asyncio
import gc
import os
import re
from pathlib import Path

import pytest

from aelastic._failures import LineNotSeen, StreamNotCaptured
from aelastic._logs import DefaultLogsSpecs, LineHub, LogsDest, StreamPlan, plan
from aelastic._logs import hub as hub_file
from aelastic._logs.hub import HubStream
from aelastic._results import LogLine
from aelastic._std import Std
from tests.real.streams import attempt, until


def captured(nprocs: int = 1) -> LogsDest:
    """Both streams of every rank piped for their readers."""
    return LogsDest(captures=dict.fromkeys(range(nprocs), Std.ALL))


def plans(dest: LogsDest, nprocs: int = 1) -> dict[int, dict[Std, StreamPlan]]:
    """The plans of an attempt."""
    return plan(dest, nprocs, {})


class Stream:
    """A hub with one stream that the test feeds itself."""

    def __init__(self, nprocs: int = 1) -> None:
        self.hub = LineHub("job")
        self.streams = self.hub.begin(plans(captured(nprocs), nprocs), 0)
        self.at_ns = 0

    def feed(self, data: bytes, rank: int = 0, std: Std = Std.OUT) -> HubStream:
        """Feed a chunk."""
        stream = self.streams[rank, std]
        self.at_ns += 1000
        stream.feed(data, data.count(b"\n"), self.at_ns, asyncio.get_running_loop().time())
        return stream

    def finish(self) -> None:
        """End everything."""
        for stream in self.streams.values():
            stream.end()
        self.hub.finish()


def texts(lines: list[LogLine]) -> list[str]:
    """What was read."""
    return [line.text for line in lines]


async def test_a_reader_gets_the_tail_and_what_follows(tmp_path: Path) -> None:
    """With replay the kept lines come first; the last line needs no newline; the iterator ends with the run."""
    async with attempt(captured()) as streams:
        await streams.write(b"one\ntwo\n")
        await until(lambda: streams.outputs.tail(0, Std.OUT) == ("one", "two"))
        reader = streams.hub.lines()
        await streams.write(b"three\nfour")
        await streams.end()
        streams.hub.finish()
        lines = [line async for line in reader]
    assert texts(lines) == ["one", "two", "three", "four"]
    assert [(line.rank, line.std, line.attempt, line.number) for line in lines] == [
        (0, Std.OUT, 0, number) for number in range(1, 5)
    ]


async def test_without_replay_a_reader_begins_now() -> None:
    """What was there is not shown, but for the line under way, which comes whole."""
    stream = Stream()
    stream.feed(b"old\nunder ")
    reader = stream.hub.lines(replay=False)
    stream.feed(b"way\nnew\n")
    stream.finish()
    lines = [line async for line in reader]
    assert texts(lines) == ["under way", "new"]
    assert [(line.number, line.skipped) for line in lines] == [(2, 0), (3, 0)]


async def test_a_reader_that_sleeps_misses_the_oldest_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap is counted on the line after it, and the last line always arrives."""
    monkeypatch.setattr(hub_file, "WINDOW_LINES", 100)
    stream = Stream()
    sleepy = stream.hub.lines()
    stream.feed(b"line 1\n")
    assert (await anext(sleepy)).number == 1
    for number in range(2, 1001):
        stream.feed(b"line %d\n" % number)
    stream.finish()
    lines = [line async for line in sleepy]
    assert lines[0].skipped == 1000 - 1 - len(lines)
    assert [line.number for line in lines] == list(range(1001 - len(lines), 1001))
    assert not any(line.skipped for line in lines[1:])
    assert lines[-1].text == "line 1000"


async def test_what_had_left_the_tail_counts_as_missed() -> None:
    """A late reader is told how many lines came before those that are kept."""
    stream = Stream()
    for number in range(1, 5001):
        stream.feed(b"line %d\n" % number)
    first = await anext(stream.hub.lines())
    assert first.skipped == first.number - 1 > 0


async def test_a_lossless_reader_holds_its_worker_back(tmp_path: Path) -> None:
    """The worker waits, nothing is skipped, and other readers and the file have all of it too."""
    data = b"".join(b"%099d\n" % number for number in range(50_000))
    async with attempt(DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, capture=Std.OUT)) as streams:
        reader = streams.hub.lines(lossless=True)
        writing = asyncio.ensure_future(streams.write(data))
        await until(lambda: streams.outputs._pumps[0, Std.OUT]._paused)
        assert not writing.done()
        number = 0
        async for line in reader:
            assert (line.number, line.skipped, line.text) == (number + 1, 0, f"{number:099d}")
            number += 1
            if number == 50_000:
                break
        await writing
        await streams.end()
        assert streams.file() == data


async def test_a_lossless_reader_that_is_closed_or_dropped_holds_nobody_back(tmp_path: Path) -> None:
    """The worker goes on when the subscription is closed, and when it is merely forgotten."""
    async with attempt(captured()) as streams:
        pump = streams.outputs._pumps[0, Std.OUT]
        for drop in (False, True):
            reader = streams.hub.lines(lossless=True)
            writing = asyncio.ensure_future(streams.write((b"x" * 99 + b"\n") * 50_000))
            await until(lambda: pump._paused)
            if not drop:
                await reader.aclose()
            del reader
            gc.collect()
            await asyncio.wait_for(writing, 30)


async def test_a_lossless_reader_never_holds_a_teardown(tmp_path: Path) -> None:
    """Once the rank ends, everything is read; what the reader did not see is still there for it, or counted."""
    async with attempt(captured()) as streams:
        reader = streams.hub.lines(lossless=True)
        writing = asyncio.ensure_future(streams.write((b"x" * 99 + b"\n") * 50_000))
        await until(lambda: streams.outputs._pumps[0, Std.OUT]._paused)
        streams.outputs.release()
        await writing
        assert await streams.end(within=30)
        streams.hub.finish()
        count = 0
        async for line in reader:
            count += 1 + line.skipped
        assert count == 50_000


async def test_an_unfinished_line_comes_after_a_quiet_moment_and_again_whole() -> None:
    """Part and whole have one number."""
    stream = Stream()
    reader = stream.hub.lines(partials=True)
    plain = stream.hub.lines()
    stream.feed(b"name? ")
    part = await anext(reader)
    assert (part.text, part.partial, part.number) == ("name? ", True, 1)
    stream.feed(b"Ada\n")
    whole = await anext(reader)
    assert (whole.text, whole.partial, whole.number) == ("name? Ada", False, 1)
    assert (await anext(plain)).text == "name? Ada"


async def test_lines_are_decoded_with_replacement() -> None:
    """Characters cut by chunks are whole, bytes that are none are replaced, NUL and returns are kept."""
    stream = Stream()
    word = "grün".encode()
    stream.feed(word[:3])
    stream.feed(word[3:] + b"\xff\0\r50%\r\n")
    assert (await anext(stream.hub.lines())).text == "grün\ufffd\0\r50%\r"


async def test_a_very_long_line_is_truncated_in_the_view() -> None:
    """A view shows the beginning and says so."""
    stream = Stream()
    stream.feed(b"x" * 1_000_000 + b"\nnext\n")
    reader = stream.hub.lines()
    long, following = await anext(reader), await anext(reader)
    assert (long.truncated, len(long.text)) == (True, 1 << 16)
    assert (following.truncated, following.text) == (False, "next")


async def test_streams_are_chosen_by_rank_and_kind() -> None:
    """A reader sees only what it asked for, in the order of reading."""
    stream = Stream(3)
    for rank in range(3):
        stream.feed(b"out %d\n" % rank, rank, Std.OUT)
        stream.feed(b"err %d\n" % rank, rank, Std.ERR)
    stream.finish()
    assert texts([line async for line in stream.hub.lines(ranks=[0, 2], std=Std.ERR)]) == ["err 0", "err 2"]
    assert len([line async for line in stream.hub.lines()]) == 6


async def test_a_cancelled_read_loses_nothing() -> None:
    """Cancelling stops only the waiting."""
    stream = Stream()
    reader = stream.hub.lines()
    read = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    read.cancel()
    await asyncio.wait({read})
    stream.feed(b"line\n")
    assert (await anext(reader)).text == "line"


async def test_a_closed_reader_ends_for_those_that_wait() -> None:
    """Closing twice is fine; a waiting read ends."""
    stream = Stream()
    async with stream.hub.lines() as reader:
        read = asyncio.ensure_future(anext(reader, None))
        await asyncio.sleep(0)
        await reader.aclose()
        assert await read is None
    assert [line async for line in reader] == []


async def test_the_next_attempt_is_read_too() -> None:
    """A subscription goes on over attempts; numbers begin again with each."""
    stream = Stream()
    reader = stream.hub.lines()
    stream.feed(b"first\n")
    stream.streams[0, Std.OUT].end()
    stream.streams = stream.hub.begin(plans(captured()), 1)
    stream.feed(b"second\n")
    stream.finish()
    assert [(line.attempt, line.number, line.text) async for line in reader] == [(0, 1, "first"), (1, 1, "second")]


@pytest.mark.parametrize("lossless", [False, True])
async def test_attempts_do_not_add_up_for_a_reader_that_sleeps(lossless: bool) -> None:
    """Over many restarts it keeps a tail of a few; what it misses is counted, and the last line comes."""
    stream, per_attempt = Stream(), 4000
    reader = stream.hub.lines(lossless=lossless)
    assert reader.next_nowait() is None
    for number in range(30):
        for part in range(4):
            stream.feed(b"".join(b"%d %d %s\n" % (number, part, b"x" * 90) for _ in range(per_attempt // 4)))
        stream.streams[0, Std.OUT].release()
        stream.streams[0, Std.OUT].end()
        if number < 29:
            stream.streams = stream.hub.begin(plans(captured()), number + 1)
    kept = sum(each.tail.kept_bytes for each in reader._streams)
    stream.finish()
    lines = [line async for line in reader]
    assert len(lines) + sum(line.skipped for line in lines) == 30 * per_attempt
    assert lines[-1].text.startswith("29 3 ")
    assert {line.attempt for line in lines} == set(range(22, 30))
    assert kept < (9 if lossless else 3) << 19


async def test_thousands_of_readers_leave_nothing() -> None:
    """Readers that come and go are forgotten, closed or not."""
    stream = Stream()
    stream.feed(b"line\n")
    for number in range(5000):
        reader = stream.hub.lines(lossless=True)
        assert (await anext(reader)).text == "line"
        if number % 2:
            await reader.aclose()
    del reader
    gc.collect()
    assert len(stream.hub._readers) == 0
    assert len(stream.streams[0, Std.OUT]._readers) == 0


async def test_a_thousand_readers_at_once_all_get_every_line() -> None:
    """Each has its own place."""
    stream = Stream()
    readers = [stream.hub.lines() for _ in range(1000)]

    async def count(reader: object) -> int:
        return len([line async for line in reader])  # type: ignore[attr-defined]

    counting = [asyncio.ensure_future(count(reader)) for reader in readers]
    for number in range(20):
        stream.feed(b"%d\n" % number)
        await asyncio.sleep(0)
    stream.finish()
    assert await asyncio.gather(*counting) == [20] * 1000


async def test_a_stream_that_is_not_piped_says_where_it_goes(tmp_path: Path) -> None:
    """The error names the file and the option that would help."""
    hub = LineHub("job")
    dest = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, capture=Std.ERR).reify({0: {}})
    hub.begin(plans(dest), 0)
    with pytest.raises(StreamNotCaptured, match=rf"{re.escape(dest.stdouts[0])}.*capture=Std.OUT"):
        hub.lines(std=Std.OUT)
    hub.lines()
    hub.begin(plans(LogsDest(stdouts={0: os.devnull})), 1)
    with pytest.raises(StreamNotCaptured, match="stdout of rank 0 is discarded; stderr of rank 0 is inherited"):
        hub.lines()


async def test_a_line_is_found_in_the_tail_or_later() -> None:
    """The kept tail is searched first, then each new line; the match is handed back."""
    stream = Stream()
    stream.feed(b"port 8080\n")
    found = await stream.hub.wait_for_line(r"port (\d+)", timeout=0)
    assert (found.match[1], found.text, found.line.number) == ("8080", "port 8080", 1)
    waiting = asyncio.ensure_future(stream.hub.wait_for_line(re.compile("ready"), std=Std.OUT))
    await asyncio.sleep(0)
    stream.feed(b"not yet\nready\n")
    assert (await waiting).line.text == "ready"


async def test_a_prompt_is_found() -> None:
    """Unfinished lines are searched too."""
    stream = Stream()
    stream.feed(b"password: ")
    assert (await stream.hub.wait_for_line("password", timeout=30)).line.partial


async def test_waiting_for_a_line_ends_with_time_or_streams() -> None:
    """Both errors show the last output."""
    stream = Stream()
    stream.feed(b"last words\n")
    with pytest.raises(TimeoutError, match=r"no line matched 'ready' within 0.01 s(.|\n)*last words"):
        await stream.hub.wait_for_line("ready", timeout=0.01)
    stream.finish()
    with pytest.raises(LineNotSeen, match=r"no line matched 'ready'(.|\n)*last words") as seen:
        await stream.hub.wait_for_line("ready")
    assert seen.value.tail == ("last words",)
