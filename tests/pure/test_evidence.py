"""A failure says who, how and why, whatever the worker left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic._child.record import report_of
from aelastic._evidence import (
    REPORT_LIMIT_BYTES,
    ErrorReport,
    Evidence,
    OomKills,
    build_failure,
    count_oom_kills,
    out_of_memory_hint,
    parse_report,
    read_error_file,
    read_evidence,
    tail_of_file,
)
from aelastic._exit import ExitStatus
from aelastic._failures import ProcessFailure
from aelastic._returned import NO_RESULT, Raised, Returned, Torn, Unloadable, Value

EXIT_3 = ExitStatus(3, None)
KILLED = ExitStatus(None, signal.SIGKILL)


def failure(
    status: ExitStatus | None = EXIT_3,
    returned: Returned = Value(None),  # noqa: B008  # a frozen value
    evidence: Evidence = Evidence(),  # noqa: B008  # a frozen value
    **more: object,
) -> ProcessFailure:
    facts: dict[str, object] = {"started_ns": 1_000, "exit_ns": 2_000_001_000, "exit_at": 99.5}
    return build_failure(
        rank=1,
        pid=77,
        status=status,
        returned=returned,
        evidence=evidence,
        **(facts | more),  # type: ignore[arg-type]
    )


def test_our_own_report_is_read_whole() -> None:
    error = ValueError("boom")
    error.add_note("a hint")
    report = parse_report(json.dumps(report_of(error)).encode(), "f")
    assert (report.message, report.notes, report.damage) == ("ValueError: boom", ("a hint",), "")
    assert "ValueError: boom\na hint" in report.traceback
    assert report.monotonic_ns > 0
    assert report.timestamp > 0


def test_both_formats_of_torch_are_read() -> None:
    plain = parse_report(b'{"message": "cuda is gone", "timestamp": "12"}', "f")
    assert (plain.message, plain.timestamp, plain.monotonic_ns) == ("cuda is gone", 12, 0)
    nested = {"message": {"message": "E: x", "extraInfo": {"py_callstack": "Traceback", "timestamp": "13"}}}
    report = parse_report(json.dumps(nested).encode(), "f")
    assert (report.message, report.traceback, report.timestamp) == ("E: x", "Traceback", 13)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'"message"'])
def test_a_damaged_file_is_a_note(content: bytes) -> None:
    report = parse_report(content, "error.json")
    assert "error.json is damaged" in report.damage
    seen = failure(evidence=Evidence(report=report))
    assert seen.message.startswith("exited with code 3\n")
    assert report.damage in seen.message


@given(st.binary(max_size=200))
def test_no_content_makes_reading_raise(content: bytes) -> None:
    parse_report(content, "f")


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.dictionaries(
            st.sampled_from(["message", "extraInfo", "timestamp", "monotonic_ns", "notes"]), inner
        ),
    )
)
def test_no_shape_makes_reading_raise(data: object) -> None:
    parse_report(json.dumps(data).encode(), "f")


def test_files_that_cannot_be_read_are_notes(tmp_path: Path) -> None:
    assert read_error_file("") is None
    assert read_error_file(str(tmp_path / "none")) is None
    assert read_error_file("/dev/null/none") is None
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        report = read_error_file(str(path))
        assert report is not None
        assert "could not be read" in report.damage
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, REPORT_LIMIT_BYTES + 1)
    report = read_error_file(str(big))
    assert report is not None
    assert "longer than" in report.damage


def test_a_tail_is_the_last_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\xff\n10%\r50%\r\nlast")
    assert tail_of_file(str(log)) == ("one", "two\ufffd", "50%", "last")
    assert tail_of_file(str(log), lines=1) == ("last",)
    assert tail_of_file(str(log), begin=4) == ("two\ufffd", "50%", "last")
    log.write_bytes(b"x" * 70_000 + b"\n" + b"y\n" * 3)
    assert tail_of_file(str(log)) == ("y", "y", "y")
    assert tail_of_file(str(tmp_path)) == tail_of_file("/dev/null") == tail_of_file(str(tmp_path / "no")) == ()


def test_evidence_prefers_stderr(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("from stdout\n")
    assert read_evidence("", str(out), str(err)).tail == ("from stdout",)
    err.write_text("from stderr\n")
    assert read_evidence("", str(out), str(err)).tail == ("from stderr",)


def test_out_of_memory_counters(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "vmstat").write_text("nr_free 1\noom_kill 5\n")
    assert count_oom_kills(str(root), str(proc)) == OomKills(5, "this machine")
    (proc / "self" / "cgroup").write_text("4:memory:/box\n0::/\n")
    (root / "memory" / "box").mkdir(parents=True)
    (root / "memory" / "box" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert count_oom_kills(str(root), str(proc)) == OomKills(2, "the cgroup /box")
    (proc / "self" / "cgroup").write_text("0::/box\n")
    (root / "box").mkdir()
    (root / "box" / "memory.events").write_text("max 0\noom 1\noom_kill 1\n")
    assert count_oom_kills(str(root), str(proc)) == OomKills(1, "the cgroup /box")
    assert count_oom_kills("/none", "/none") is None


def test_out_of_memory_is_said_only_of_a_sigkill_that_was_counted() -> None:
    before, after = OomKills(1, "c"), OomKills(2, "c")
    assert "lack of memory in c" in out_of_memory_hint(KILLED, before, after)
    assert out_of_memory_hint(KILLED, before, before) == ""
    assert out_of_memory_hint(KILLED, None, after) == ""
    assert out_of_memory_hint(KILLED, OomKills(0, "d"), after) == ""
    assert out_of_memory_hint(ExitStatus(None, signal.SIGTERM), before, after) == ""
    seen = failure(KILLED, evidence=Evidence(oom_kills=after), oom_before=before)
    assert seen.reason == "out_of_memory"
    assert seen.message.startswith("killed by SIGKILL\nthe kernel killed once")


def test_a_failure_without_evidence_says_how_it_ended() -> None:
    seen = failure(tail=("bye",))
    assert (seen.reason, seen.message, seen.tail, seen.timestamp) == ("exited", "exited with code 3", ("bye",), 99)
    assert (seen.seconds, seen.monotonic_ns, seen.exitcode) == (2.0, 2_000_001_000, 3)
    assert failure(KILLED).reason == "signaled"
    assert failure(ExitStatus(None, None)).reason == "status_lost"
    assert failure(None).reason == "unkillable"


@pytest.mark.parametrize(("own", "placed"), [(5_000, 5_000), (999, 2_000_001_000), (2_000_001_001, 2_000_001_000)])
def test_its_own_time_counts_only_between_start_and_exit(own: int, placed: int) -> None:
    evidence = Evidence(report=ErrorReport(message="x", monotonic_ns=own, timestamp=7))
    seen = failure(evidence=evidence)
    assert (seen.monotonic_ns, seen.timestamp) == (placed, 7)


@pytest.mark.parametrize(
    ("status", "returned", "reason", "words"),
    [
        (ExitStatus(0, None), NO_RESULT, "no_result", "os._exit(0)"),
        (EXIT_3, NO_RESULT, "exited", "exited with code 3"),
        (KILLED, NO_RESULT, "signaled", "killed by SIGKILL"),
        (ExitStatus(0, None), Torn("the result stopped after 3 bytes"), "result_lost", "after 3 bytes"),
        (ExitStatus(0, None), Unloadable("it can't be pickled", "Traceback x"), "result_lost", "can't be pickled"),
        (ExitStatus(1, None), Raised(None, "Traceback\nValueError: v"), "raised", "ValueError: v\nTraceback"),
        (ExitStatus(None, signal.SIGINT), Raised(KeyboardInterrupt(), "KeyboardInterrupt"), "raised", "Keyboard"),
    ],
)
def test_the_ends_of_a_function(status: ExitStatus, returned: Returned, reason: str, words: str) -> None:
    seen = failure(status, returned)
    assert seen.reason == reason
    assert words in seen.message
    assert seen.describe()


def test_a_traceback_in_the_error_file_of_a_command_means_raised() -> None:
    report = ErrorReport(message="ValueError: v", traceback="Traceback\nValueError: v\n")
    seen = failure(evidence=Evidence(report=report))
    assert (seen.reason, seen.message) == ("raised", "ValueError: v\nTraceback\nValueError: v")
