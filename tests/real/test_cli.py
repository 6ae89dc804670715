"""The command `aelastic`: exits as its root cause did, and leaves nothing but logs."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aelastic import Rotate, Std
from aelastic._logs.logfile import LogFile
from aelastic._threads import Threads
from aelastic.cli.logs import finished
from aelastic.cli.stream import Stream
from tests.house.source import ROOT
from tests.ways_to_die import DEAF_TO_TERM, ENDING, EXIT_0, NOT_EXECUTABLE, NOT_FOUND, RUNS_ON, Way

AELASTIC = (sys.executable, "-m", "aelastic")


def spawn(*words: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [*AELASTIC, *words], stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def aelastic(*words: str) -> tuple[int, str, str]:
    """Run it to its end: exit code, stdout, stderr."""
    with spawn(*words) as process:
        out, err = process.communicate()
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


@pytest.mark.parametrize("way", [way for way in ENDING if not way.leaves], ids=str)
def test_run_exits_with_the_root_causes_code(way: Way) -> None:
    """128 and the signal, when one killed it."""
    code, _, err = aelastic("run", "--", *way.argv)
    assert code == way.shell_code
    assert ("failed: rank 0" in err) == (not way.succeeds)


def test_run_shows_a_tee_with_prefixes_and_names_the_logs(tmp_path: Path) -> None:
    """Four ranks, each line once, the files left behind and named."""
    code, out, err = aelastic(
        "run", "-n", "4", "--tee", "3", "--log-dir", str(tmp_path), "--name", "job", "--", *EXIT_0.argv
    )
    assert code == 0
    assert sorted(out.splitlines()) == [f"[job{rank}]:ready" for rank in range(4)]
    (run_dir,) = tmp_path.iterdir()
    assert str(run_dir) in err
    for rank in range(4):
        assert f"attempt_0/{rank}/stdout.log (6 bytes)" in err
        assert (run_dir / f"attempt_0/{rank}/stdout.log").read_bytes() == b"ready\n"


def test_run_reports_the_failure_on_stderr(tmp_path: Path) -> None:
    """Root cause first, its last words, who was stopped for it."""
    program = "import os, sys; print('bad thing', file=sys.stderr); sys.exit(int(os.environ['AELASTIC_RANK']) * 5)"
    code, _, err = aelastic(
        "run", "-n", "2", "--redirects", "3", "--log-dir", str(tmp_path), "--", sys.executable, "-c", program
    )
    assert code == 5
    assert re.search(r"failed: rank 1 \(pid \d+\) exited with code 5", err)
    assert "bad thing" in err


@pytest.mark.parametrize(("program", "code"), [(NOT_FOUND.program, 127), (NOT_EXECUTABLE.program, 126)])
def test_run_of_what_cannot_be_started_exits_as_a_shell(program: str, code: int) -> None:
    """127 when there is no such command, 126 when it can't be executed."""
    got, _, err = aelastic("run", "--", program)
    assert got == code
    assert "rank 0" in err


@pytest.mark.parametrize(
    "words", [(), ("run",), ("run", "-n", "0", "--", "true"), ("run", "--tee", "9", "--", "true"), ("walk",)]
)
def test_a_wrong_command_line_exits_with_2(words: tuple[str, ...]) -> None:
    """And says how it is used."""
    code, _, err = aelastic(*words)
    assert code == 2
    assert "usage: aelastic" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_gang_and_is_the_exit_code(number: signal.Signals) -> None:
    """128 and its number, after everything is gone."""
    with spawn("run", "-n", "2", "--", *RUNS_ON.argv) as process:
        first_lines(process, 2)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 128 + number


def test_a_second_signal_shortens_the_wait() -> None:
    """Who ignores SIGTERM is killed at once."""
    with spawn("run", "--", *DEAF_TO_TERM.argv) as process:
        first_lines(process, 1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def first_lines(process: subprocess.Popen[bytes], count: int) -> None:
    if process.stdout is None:
        raise RuntimeError("Popen gave no pipe")
    assert [process.stdout.readline() for _ in range(count)] == [b"ready\n"] * count


def test_run_restarts_as_often_as_it_is_told(tmp_path: Path) -> None:
    """The code is the last attempt's, and the report says that there was no further one."""
    command = ("sh", "-c", "exit $((3 + AELASTIC_ATTEMPT))")
    code, _, err = aelastic("run", "--max-restarts", "1", "--", *command)
    assert code == 4
    assert "Not restarted: its budget of 1 restart is spent" in err


def test_logs_shows_what_a_run_left(tmp_path: Path) -> None:
    """All ranks and streams, or the chosen ones."""
    aelastic("run", "-n", "2", "--redirects", "3", "--log-dir", str(tmp_path), "--", *EXIT_0.argv)
    (run_dir,) = map(str, tmp_path.iterdir())
    assert aelastic("logs", run_dir) == (0, "[0]:ready\n[1]:ready\n", "")
    assert aelastic("logs", run_dir, "--rank", "1") == (0, "[1]:ready\n", "")
    assert aelastic("logs", run_dir, "--std", "err") == (0, "", "")
    assert aelastic("logs", run_dir, "--follow") == (0, "[0]:ready\n[1]:ready\n", "")
    assert aelastic("logs", run_dir, "--since", "1h")[1] == "[0]:ready\n[1]:ready\n"


def test_logs_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """It says so."""
    code, _, err = aelastic("logs", str(tmp_path))
    assert code == 1
    assert "no run's folder" in err


def test_logs_follows_a_run_until_it_has_finished(tmp_path: Path) -> None:
    """Lines come as they are written; the end of the run is the end."""
    run_dir = tmp_path / "run"
    rank_dir = run_dir / "attempt_0" / "0"
    rank_dir.mkdir(parents=True)
    with spawn("logs", str(run_dir), "--follow") as process, open(rank_dir / "stdout.log", "ab", buffering=0) as log:
        if process.stdout is None:
            raise RuntimeError("Popen gave no pipe")
        log.write(b"one\ntw")
        assert process.stdout.readline() == b"[0]:one\n"
        log.write(b"o\n")
        assert process.stdout.readline() == b"[0]:two\n"
        os.rename(rank_dir / "stdout.log", rank_dir / "stdout.log.1")
        (rank_dir / "stdout.log").write_bytes(b"three\nfour")
        assert process.stdout.readline() == b"[0]:three\n"
        (run_dir / "events.jsonl").write_text('{"event": "RunFinished"}\n')
        assert process.stdout.read() == b"[0]:four\n"
    assert process.returncode == 0


def test_logs_merges_by_time_where_an_index_tells(tmp_path: Path) -> None:
    """Across ranks and pieces; lines before `--since` are left out."""
    folder = tmp_path / "attempt_0"
    for rank, rows in ((0, [(2, "10:00:00"), (4, "10:00:02")]), (1, [(2, "10:00:01"), (4, "10:00:03")])):
        (folder / str(rank)).mkdir(parents=True)
        (folder / str(rank) / "stdout.log").write_text(f"{'ab'[rank]}\n{'cd'[rank]}\n")
        index = "".join(f"{offset}\t2021-05-01T{at}+00:00\n" for offset, at in rows)
        (folder / str(rank) / "stdout.log.times").write_text(index)
    assert aelastic("logs", str(tmp_path))[1] == "[0]:a\n[1]:b\n[0]:c\n[1]:d\n"
    assert aelastic("logs", str(tmp_path), "--since", "2021-05-01T10:00:02Z")[1] == "[0]:c\n[1]:d\n"


def test_logs_misses_no_piece_that_is_compressed_meanwhile(tmp_path: Path) -> None:
    """Following goes on after the piece it was in, though that has another name and is another file now."""
    path = tmp_path / "out.log"
    stream = Stream(str(path), attempt=0, rank=0, std=Std.OUT)

    def read() -> list[bytes]:
        return [line.data for line in stream.lines(whole=True)]

    def rotate(number: int, data: bytes) -> None:
        Path(f"{path}.{number}.gz").write_bytes(gzip.compress(data))

    path.write_bytes(b"one\n")
    assert read() == [b"one"]
    with open(path, "ab") as log:
        log.write(b"one and a half\n")
    path.unlink()
    rotate(3, b"one\none and a half\n")
    rotate(2, b"two\n")
    (tmp_path / "out.log.1").write_bytes(b"three\n")
    path.write_bytes(b"four\nfi")
    assert read() == [b"one and a half", b"two", b"three", b"four"]
    stream.close()


def test_logs_goes_on_when_its_piece_was_removed(tmp_path: Path) -> None:
    """All that is left is newer."""
    path = tmp_path / "out.log"
    stream = Stream(str(path), attempt=0, rank=0, std=Std.OUT)
    path.write_bytes(b"one\n")
    assert [line.data for line in stream.lines(whole=True)] == [b"one"]
    path.unlink()
    (tmp_path / "out.log.1").write_bytes(b"eight\n")
    path.write_bytes(b"nine\n")
    assert [line.data for line in stream.lines(whole=True)] == [b"eight", b"nine"]
    stream.close()


def test_logs_reads_while_pieces_are_cut(tmp_path: Path) -> None:
    """Beside a writer that rotates and compresses all the time, each line is read once and in order."""
    path = tmp_path / "out.log"
    file = LogFile(
        str(path), rotate=Rotate(max_bytes=2000, keep=10_000, compress="gzip"), executor=(disk := Threads("d", 1))
    )
    file.open()
    ended = threading.Event()

    def write() -> None:
        for number in range(20_000):
            file.writelines([(b"line %d\n" % number, 0)])
        file.close()
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    stream = Stream(str(path), attempt=0, rank=0, std=Std.OUT)
    seen: list[bytes] = []
    while not ended.is_set():
        seen += [line.data for line in stream.lines(whole=True)]
    seen += [line.data for line in stream.lines(whole=False)]
    writer.join()
    file.finish_pieces(30)
    disk.close()
    stream.close()
    assert seen == [b"line %d" % number for number in range(20_000)]


def test_logs_survives_a_torn_index(tmp_path: Path) -> None:
    """A row that a full disk cut short tells no time; the others do."""
    folder = tmp_path / "attempt_0" / "0"
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text("a\nb\n")
    (folder / "stdout.log.times").write_text("2\t2021-05-01T10:0\n4\t2021-05-01T10:00:02+00:00\n")
    assert aelastic("logs", str(tmp_path)) == (0, "[0]:a\n[0]:b\n", "")


def test_logs_says_what_there_is_instead(tmp_path: Path) -> None:
    """A rank that was never there is no silence, and a folder of runs names them."""
    (tmp_path / "run_1" / "attempt_0" / "3").mkdir(parents=True)
    code, out, err = aelastic("logs", str(tmp_path / "run_1"), "--rank", "3,7")
    assert (code, out) == (1, "")
    assert "no rank 7; it has 3" in err
    assert str(tmp_path / "run_1") in aelastic("logs", str(tmp_path))[2]


@pytest.mark.parametrize(
    ("journal", "ended"),
    [
        ('{"event": "RunFinished"}\n', True),
        ('{"event": "SupervisorDied", "policy": "kill"}\n{"event": "OrphanKilled"}\n', True),
        ('{"event": "SupervisorDied", "policy": "keep"}\n', False),
        ('{"event": "RunFini', False),
        ('{"event": "WorkerStarted"}\n', False),
    ],
)
def test_logs_follows_no_run_whose_supervisor_is_dead(tmp_path: Path, journal: str, ended: bool) -> None:
    """Its end is the last event, or what the guard wrote in its place; workers that are kept have none."""
    (tmp_path / "events.jsonl").write_text(journal)
    assert finished(str(tmp_path)) is ended
