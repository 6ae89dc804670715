"""A file gets every byte in order, and what it can't get is counted and told."""

from __future__ import annotations

import asyncio
import errno
import gzip
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aelastic._logs import Journal
from aelastic._logs import files as files_file
from aelastic._logs.files import FileSink
from aelastic._logs.logfile import LogFile
from aelastic._policies import Rotate
from aelastic._threads import Threads
from tests.real.streams import until


class Watched:
    """A sink, and what it said."""

    def __init__(self, path: Path | str, executor: Threads, **options: object) -> None:
        self.lost: list[tuple[int, str]] = []
        self.broken: list[BaseException] = []
        self.sink = FileSink(
            str(path),
            executor=executor,
            buffer_bytes=1 << 20,
            on_lost=lambda count, reason: self.lost.append((count, reason)),
            on_room=lambda: None,
            on_broken=self.broken.append,
            **options,  # type: ignore[arg-type]  # rotate and timestamps, by name
        )


@asynccontextmanager
async def opened(path: Path | str, **options: object) -> AsyncIterator[Watched]:
    """An open sink, closed at the end."""
    executor = Threads("test disk", 2)
    watched = Watched(path, executor, **options)
    try:
        watched.sink.start()
        assert await watched.sink.opened is None
        yield watched
        await watched.sink.finish()
    finally:
        await watched.sink.finish()
        executor.close()
    assert watched.broken == []


async def test_chunks_are_appended_in_order(tmp_path: Path) -> None:
    """What was there before stays, and what is put comes after it."""
    path = tmp_path / "out.log"
    path.write_bytes(b"before\n")
    async with opened(path) as watched:
        for number in range(1000):
            watched.sink.put(b"%d\n" % number, 0)
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % number for number in range(1000))
    assert (watched.lost, watched.sink.lost_bytes) == ([], 0)


async def test_short_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that takes only a part is asked again for the rest."""
    real = os.writev

    def short(fd: int, pieces: Sequence[bytes]) -> int:
        return real(fd, [bytes(pieces[0])[:3]])

    monkeypatch.setattr(os, "writev", short)
    async with opened(tmp_path / "out.log") as watched:
        for _ in range(100):
            watched.sink.put(b"0123456789", 0)
    assert (tmp_path / "out.log").read_bytes() == b"0123456789" * 100


async def test_a_full_disk_is_told_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What /dev/full refuses is lost: one announcement, the total in the count, and the giver is never held back."""
    monkeypatch.setattr(files_file, "GRACE", 0.1)
    async with opened("/dev/full") as watched:
        watched.sink.put(b"x" * 100, 0)
        await until(lambda: watched.lost)
        for _ in range(100):
            watched.sink.put(b"y" * 100_000, 0)
            assert not watched.sink.full
    assert len(watched.lost) == 1
    assert "No space left" in watched.lost[0][1]
    assert watched.sink.lost_bytes == 100 + 100 * 100_000


async def test_a_disk_that_recovers_in_time_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing write is tried again before anything is given up."""
    failures = iter([errno.ENOSPC, errno.EIO, errno.ENOSPC])
    real = os.writev

    def failing(fd: int, pieces: Sequence[bytes]) -> int:
        if (error := next(failures, None)) is not None:
            raise OSError(error, os.strerror(error))
        return real(fd, pieces)

    monkeypatch.setattr(os, "writev", failing)
    async with opened(tmp_path / "out.log") as watched:
        watched.sink.put(b"kept\n", 0)
        await until(lambda: (tmp_path / "out.log").read_bytes() == b"kept\n")
    assert watched.lost == []


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, every write is an I/O error; little patience is had with it."""
    monkeypatch.setattr(files_file, "GRACE", 0.05)
    monkeypatch.setattr(files_file, "LONGEST_PAUSE", 0.05)
    broken = threading.Event()
    real = os.writev

    def failing(fd: int, pieces: Sequence[bytes]) -> int:
        if broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, pieces)

    monkeypatch.setattr(os, "writev", failing)
    return broken


async def test_each_time_output_is_lost_it_is_told(tmp_path: Path, broken: threading.Event) -> None:
    """After a disk works again, a second failure is announced again."""
    async with opened(tmp_path / "out.log") as watched:
        for number in (1, 2):
            broken.set()
            watched.sink.put(b"lost", 0)
            await until(lambda number=number: len(watched.lost) == number)  # type: ignore[misc]
            broken.clear()
            watched.sink.put(b"kept%d" % number, 0)
            await until(lambda number=number: (tmp_path / "out.log").read_bytes().endswith(b"%d" % number))  # type: ignore[misc]
    assert watched.sink.lost_bytes == 8
    assert (tmp_path / "out.log").read_bytes() == b"kept1kept2"


async def test_a_disk_that_works_again_is_written_to_at_once(tmp_path: Path, broken: threading.Event) -> None:
    """After a loss and a long silence the next byte is tried, however small: it doesn't wait for the end."""
    broken.set()
    async with opened(tmp_path / "out.log") as watched:
        watched.sink.put(b"lost", 0)
        await until(lambda: watched.lost)
        await until(lambda: watched.sink._idle)
        broken.clear()
        watched.sink.put(b"kept", 0)
        await until(lambda: (tmp_path / "out.log").read_bytes() == b"kept")
    assert watched.sink.lost_bytes == 4


async def test_a_deleted_file_is_told_and_made_anew(tmp_path: Path) -> None:
    """What was in a file that somebody deletes is counted as lost; what comes after is in a new one."""
    path = tmp_path / "out.log"
    async with opened(path) as watched:
        watched.sink.put(b"first", 0)
        await until(lambda: path.read_bytes() == b"first")
        path.unlink()
        watched.sink.put(b"second", 0)
        await until(path.exists)
    assert path.read_bytes() == b"second"
    assert [count for count, _ in watched.lost] == [5]
    assert "deleted" in watched.lost[0][1]
    assert watched.sink.lost_bytes == 5


async def test_a_file_deleted_after_the_last_write_is_told(tmp_path: Path) -> None:
    """The end of the stream notices too."""
    path = tmp_path / "out.log"
    async with opened(path) as watched:
        watched.sink.put(b"all", 0)
        await until(lambda: path.read_bytes() == b"all")
        path.unlink()
    assert watched.sink.lost_bytes == 3
    assert len(watched.lost) == 1


async def test_a_fifo_nobody_reads_blocks_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A special file works while it is read; unread, it is a sink that fails, and closing it is bounded."""
    monkeypatch.setattr(files_file, "GRACE", 0.1)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    async with opened(path) as watched:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        watched.sink.put(b"heard", 0)
        await until(lambda: _try_read(reader) == b"heard")
        watched.sink.put(b"x" * (1 << 20), 0)
        await until(lambda: watched.lost)
    os.close(reader)
    assert 0 < watched.sink.lost_bytes < 1 << 20


def _try_read(fd: int) -> bytes:
    try:
        return os.read(fd, 100)
    except BlockingIOError:
        return b""


async def test_a_disk_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing ends within its bound although a write never returns; what it held counts as lost."""
    monkeypatch.setattr(files_file, "GIVEN_UP_AFTER", 0.1)
    answers = threading.Event()
    real = os.writev

    def hanging(fd: int, pieces: Sequence[bytes]) -> int:
        answers.wait()
        return real(fd, pieces)

    monkeypatch.setattr(os, "writev", hanging)
    async with opened(tmp_path / "out.log") as watched:
        watched.sink.put(b"held", 0)
        await watched.sink.finish()
        answers.set()
        assert watched.sink.lost_bytes == 4
        assert "took nothing" in watched.lost[0][1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=40),
    places=st.lists(st.integers(min_value=0), max_size=30),
    most=st.integers(min_value=1, max_value=40),
    ended=st.booleans(),
)
def test_rotation_never_splits_a_line_nor_loses_a_byte(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], places: list[int], most: int, ended: bool
) -> None:
    """The pieces in order are the stream; each ends with a line, and only one long line makes a longer piece."""
    path = tmp_path_factory.mktemp("rotate") / "out.log"
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    file = LogFile(str(path), rotate=Rotate(max_bytes=most, keep=1000))
    file.open()
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    for start, end in pairwise(edges):
        file.writelines([(data[start:end], 0)])
    file.close()
    pieces = [Path(piece).read_bytes() for piece in file.all_pieces()]
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert all(len(piece) <= most or piece.rstrip(b"\n").count(b"\n") == 0 for piece in pieces)
    assert file.taken_bytes == len(data)


async def test_pieces_beyond_keep_are_removed_and_counted_apart(tmp_path: Path) -> None:
    """The newest full piece is `.1`; what `keep` removes is dropped, not lost."""
    path = tmp_path / "out.log"
    async with opened(path, rotate=Rotate(max_bytes=10, keep=2)) as watched:
        for number in range(6):
            watched.sink.put(b"line %d\n" % number, 0)
    assert watched.sink.pieces() == (f"{path}.2", f"{path}.1", str(path))
    assert [Path(piece).read_bytes() for piece in watched.sink.pieces()] == [b"line 3\n", b"line 4\n", b"line 5\n"]
    assert (watched.sink.dropped_bytes, watched.sink.lost_bytes) == (21, 0)
    assert sorted(os.listdir(tmp_path)) == ["out.log", "out.log.1", "out.log.2"]


async def test_a_directory_that_allows_no_pieces_costs_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current piece grows instead; when renaming works again, the next one begins."""
    path = tmp_path / "out.log"

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    file = LogFile(str(path), rotate=Rotate(max_bytes=10, keep=2))
    file.open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        file.writelines([(b"line %d\n" % number, 0) for number in range(4)])
    assert [Path(piece).read_bytes() for piece in file.all_pieces()] == [b"line 0\nline 1\nline 2\nline 3\n"]
    file.writelines([(b"line 4\n", 0)])
    file.close()
    pieces = [Path(piece).read_bytes() for piece in file.all_pieces()]
    assert pieces == [b"line 0\nline 1\nline 2\nline 3\n", b"line 4\n"]


async def test_full_pieces_are_compressed(tmp_path: Path) -> None:
    """With gzip every full piece is compressed by the time the file is closed, and named so."""
    path = tmp_path / "out.log"
    async with opened(path, rotate=Rotate(max_bytes=1000, keep=50, compress="gzip")) as watched:
        data = b"".join(b"line %05d\n" % number for number in range(1000))
        for start in range(0, len(data), 777):
            watched.sink.put(data[start : start + 777], 0)
    *full, current = watched.sink.pieces()
    assert len(full) == 11
    assert all(piece.endswith(".gz") for piece in full)
    assert b"".join(gzip.decompress(Path(piece).read_bytes()) for piece in full) + Path(current).read_bytes() == data
    assert len(os.listdir(tmp_path)) == 12


async def test_a_device_has_no_pieces() -> None:
    """A special file is written to and never renamed."""
    async with opened(os.devnull, rotate=Rotate(max_bytes=1, keep=1)) as watched:
        watched.sink.put(b"a\nb\nc\n", 0)
    assert watched.sink.pieces() == (os.devnull,)


async def test_others_pieces_are_left_alone(tmp_path: Path) -> None:
    """A file that looks like a piece and isn't ours is neither renamed over nor removed."""
    path = tmp_path / "out.log"
    (tmp_path / "out.log.1").write_bytes(b"theirs")
    async with opened(path, rotate=Rotate(max_bytes=3, keep=1)) as watched:
        for letter in (b"a\n", b"b\n", b"c\n"):
            watched.sink.put(letter, 0)
    assert b"theirs" in [Path(tmp_path, name).read_bytes() for name in os.listdir(tmp_path)]


@pytest.mark.parametrize("rotate", [None, Rotate(max_bytes=25, keep=9)])
async def test_the_index_tells_when_each_line_was_read(tmp_path: Path, rotate: Rotate | None) -> None:
    """Beside the byte-exact file, each line's end is in the first row that reaches it."""
    path = tmp_path / "out.log"
    async with opened(path, rotate=rotate, timestamps=True) as watched:
        for second in range(10):
            watched.sink.put(b"at %d\n" % second, second * 1_000_000_000)
    seen = []
    for piece in watched.sink.pieces():
        rows = [line.split("\t") for line in Path(piece + ".times").read_text().splitlines()]
        offset = 0
        for line in Path(piece).read_bytes().splitlines(keepends=True):
            offset += len(line)
            at = next(at for reaches, at in rows if int(reaches) >= offset)
            seen.append((line, datetime.fromisoformat(at)))
    assert seen == [(b"at %d\n" % second, datetime.fromtimestamp(second, UTC)) for second in range(10)]


async def test_a_journal_is_whole_when_it_is_closed(tmp_path: Path) -> None:
    """Events are appended in order without waiting, and are on disk after closing."""
    executor = Threads("test disk", 1)
    journal = await Journal.open(str(tmp_path / "events.jsonl"), executor=executor)
    for number in range(1000):
        journal.append(b'{"seq": %d}\n' % number)
    await journal.close()
    await journal.close()
    executor.close()
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert lines == [b'{"seq": %d}' % number for number in range(1000)]
    assert journal.lost_bytes == 0


async def test_an_error_of_our_own_ends_the_journal_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the writer is raised where the journal is closed."""
    monkeypatch.setattr(LogFile, "_append", lambda *_: 1 / 0)
    executor = Threads("test disk", 1)
    journal = await Journal.open(str(tmp_path / "events.jsonl"), executor=executor)
    journal.append(b"{}\n")
    try:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(journal.close(), 30)
    finally:
        executor.close()
