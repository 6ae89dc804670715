"""A sink fails alone: whatever becomes of one rank's file, its worker, its lines and all others go on."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aelastic import JournalLost, LogsDest, LogsSpecs, OutputLost, Std, start_processes
from aelastic._logs import files as files_file
from tests.real.runs import all_events
from tests.real.streams import PipeConsole, console_is

LINES = 6000
LINE = b"x" * 99 + b"\n"
WRITER = "import os\nfor _ in range(6000): os.write(1, b'x' * 99 + b'\\n')"


class Placed(LogsSpecs):
    """Files where the test says."""

    def __init__(self, paths: Sequence[str], journal: str = "", *, shown: bool = True) -> None:
        super().__init__()
        self._paths = dict(enumerate(paths))
        self._journal = journal
        self._shown = shown

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Tee stdout of every rank to its file."""
        tees = dict(self._paths) if self._shown else {}
        return LogsDest(stdouts=dict(self._paths), tee_stdouts=tees, journal=self._journal)


@contextlib.contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[Path]:
    """A file system of its own."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs takes more rights than this test has: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def failing_disk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a disk refuse one file with an I/O error after its first 10,000 bytes."""
    real = os.writev

    def writev(fd: int, pieces: Sequence[bytes]) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") != path:
            return real(fd, pieces)
        room = 10_000 - os.fstat(fd).st_size
        if room <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, [b"".join(map(bytes, pieces))[:room]])

    monkeypatch.setattr(os, "writev", writev)


@pytest.mark.parametrize("how", ["tiny tmpfs", "/dev/full", "I/O error"])
async def test_a_file_that_takes_no_more_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Both workers end well and all their lines are shown; one event tells the loss, the result counts it."""
    monkeypatch.setattr(files_file, "GRACE", 0.2)
    console = PipeConsole()
    console.read_on()
    with contextlib.ExitStack() as stack:
        path = "/dev/full"
        if how != "/dev/full":
            (tmp_path / "small").mkdir()
            path = str(tmp_path / "small" / "out.log")
        if how == "tiny tmpfs":
            stack.enter_context(tmpfs(tmp_path / "small", "size=64k"))
        elif how == "I/O error":
            failing_disk(path, monkeypatch)
        args = dict.fromkeys(range(2), ("-ISc", WRITER))
        with console_is(console.text):
            ctx = await start_processes("job", sys.executable, args, logs_specs=Placed([path, str(tmp_path / "fine")]))
        async with ctx:
            result = await ctx.wait()
        kept = 0 if path == "/dev/full" else os.path.getsize(path)
    assert result.outcome == "succeeded"
    assert kept + result.lost_bytes == LINES * len(LINE)
    assert (tmp_path / "fine").read_bytes() == LINE * LINES
    (lost,) = [event for event in await all_events(ctx) if isinstance(event, OutputLost)]
    assert (lost.rank, lost.std) == (0, Std.OUT)
    assert path in lost.reason
    shown = console.close().splitlines(keepends=True)
    assert sorted(shown) == [b"[job0]:" + LINE] * LINES + [b"[job1]:" + LINE] * LINES


async def test_a_file_that_cannot_be_written_refuses_the_start(tmp_path: Path) -> None:
    """On a read-only disk no worker is started, and the text names run, rank and file."""
    with tmpfs(tmp_path, "ro"):
        path = str(tmp_path / "out.log")
        with pytest.raises(OSError, match=rf"job rank 0: .*stdout can't be opened: Read-only.*{path}"):
            await start_processes("job", "true", {0: ()}, logs_specs=Placed([path]))


async def test_a_journal_that_loses_events_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One event, while subscribers still get all; the result counts the bytes, apart from lost output."""
    monkeypatch.setattr(files_file, "GRACE", 0.05)
    args = {0: ("-ISc", "import time; time.sleep(60)")}
    specs = Placed([str(tmp_path / "out")], "/dev/full", shown=False)
    async with start_processes("job", sys.executable, args, logs_specs=specs) as ctx:
        async for event in ctx.events():
            if isinstance(event, JournalLost):
                break
        await ctx.close()
    events = await all_events(ctx)
    assert [event.seq for event in events] == list(range(len(events)))
    (lost,) = [event for event in events if isinstance(event, JournalLost)]
    assert "/dev/full: No space left" in str(lost)
    assert ctx.result is not None
    assert (ctx.result.outcome, ctx.result.lost_bytes) == ("stopped", 0)
    assert ctx.result.journal_lost_bytes > lost.lost_bytes > 0


async def test_a_journal_that_fails_at_the_very_end_is_counted(tmp_path: Path) -> None:
    """A run too short to be told of it still says in its result that its journal is not whole."""
    specs = Placed([str(tmp_path / "out")], "/dev/full", shown=False)
    async with start_processes("job", "true", {0: ()}, logs_specs=specs) as ctx:
        result = await ctx.wait()
    assert result.outcome == "succeeded"
    assert result.journal_lost_bytes > 0
