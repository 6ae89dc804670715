"""`record` tells the supervisor why, and changes nothing else."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aelastic._child.record import ErrorHandler, is_async, record, write_whole
from aelastic._evidence import read_error_file
from aelastic._exit import ExitStatus
from aelastic._failures import ChildFailedError, ProcessFailure


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("AELASTIC_ERROR_FILE", str(path))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return path


def raise_(error: BaseException) -> int:
    raise error


def recorded(error: BaseException) -> int | None:
    return record(raise_)(error)


def test_the_exception_goes_on_and_its_report_lies_in_the_file(error_file: Path) -> None:
    with pytest.raises(ValueError, match="boom"):
        recorded(ValueError("boom"))
    report = read_error_file(str(error_file))
    assert report is not None
    assert report.message == "ValueError: boom"
    assert "Traceback" in report.traceback
    assert [entry.name for entry in error_file.parent.iterdir()] == ["error.json"]


def test_causes_notes_and_retriable_are_kept(error_file: Path) -> None:
    def fail() -> None:
        try:
            raise_(KeyError("inner"))
        except KeyError as inner:
            error = RuntimeError("outer")
            error.add_note("a hint")
            error.retriable = False  # type: ignore[attr-defined]
            raise error from inner

    with pytest.raises(RuntimeError):
        record(fail)()
    report = read_error_file(str(error_file))
    assert report is not None
    assert "KeyError: 'inner'" in report.traceback
    assert "a hint" in report.traceback
    assert (report.notes, report.retriable) == (("a hint",), False)


async def test_async_functions_are_recorded_too(error_file: Path) -> None:
    @record
    async def fail(value: int) -> int:
        await asyncio.sleep(0)
        if value:
            raise ValueError("late")
        return value

    assert asyncio.iscoroutinefunction(fail) or is_async(fail)
    assert await fail(0) == 0
    assert read_error_file(str(error_file)) is None
    with pytest.raises(ValueError, match="late"):
        await fail(1)
    report = read_error_file(str(error_file))
    assert report is not None
    assert report.message == "ValueError: late"


def test_is_async_looks_through_partials_and_methods() -> None:
    class Job:
        async def run(self) -> None: ...

        async def __call__(self) -> None: ...

        def plain(self) -> None: ...

    assert is_async(functools.partial(Job().run))
    assert is_async(Job())
    assert not is_async(Job().plain)
    assert not is_async(print)


def test_exit_0_gives_none_and_other_exits_pass_unrecorded(error_file: Path) -> None:
    assert recorded(SystemExit(0)) is None
    for code in (3, "text", None):
        with pytest.raises(SystemExit) as seen:
            recorded(SystemExit(code))
        assert seen.value.code == code
    with pytest.raises(KeyboardInterrupt):
        recorded(KeyboardInterrupt())
    assert not error_file.exists()


def test_an_exception_that_cannot_be_shown_is_still_reported(error_file: Path) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(Mute):
        recorded(Mute())
    report = read_error_file(str(error_file))
    assert report is not None
    assert report.message.startswith("Mute: ")


def test_a_nested_run_passes_its_root_cause_on(error_file: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner.json"
    inner.write_text(json.dumps({"message": {"message": "E: root", "extraInfo": {"timestamp": "5"}}}))
    root = ProcessFailure(local_rank=0, pid=1, exitcode=-11, error_file=str(inner), status=ExitStatus(None, 11))
    with pytest.raises(ChildFailedError):
        recorded(ChildFailedError("nested", {0: root}))
    data = json.loads(error_file.read_text())
    assert data["message"]["message"] == "E: root"
    assert data["message"]["errorCode"] == -11


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_nested_root_cause_without_a_file_is_told_by_its_own_text(
    error_file: Path, tmp_path: Path, content: str | None
) -> None:
    inner = tmp_path / "inner.json"
    if content is not None:
        inner.write_text(content)
    root = ProcessFailure(local_rank=0, pid=41, exitcode=3, error_file=str(inner), status=ExitStatus(3, None))
    with pytest.raises(ChildFailedError):
        recorded(ChildFailedError("nested", {0: root}))
    assert "pid 41" in error_file.read_text()


def test_torchs_variable_counts_where_ours_is_missing(error_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AELASTIC_ERROR_FILE")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    with pytest.raises(ValueError, match="x"):
        recorded(ValueError("x"))
    assert error_file.exists()


def test_a_file_that_cannot_be_written_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AELASTIC_ERROR_FILE", str(tmp_path / "no" / "error.json"))
    with pytest.raises(ValueError, match="boom"):
        recorded(ValueError("boom"))
    assert "could not be written" in capsys.readouterr().err


def test_a_subclass_may_say_more(error_file: Path) -> None:
    class Loud(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            super().record_exception(e)
            error_file.with_suffix(".seen").write_text(str(e))

    with pytest.raises(ValueError, match="x"):
        record(raise_, Loud())(ValueError("x"))
    assert error_file.with_suffix(".seen").read_text() == "x"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    write_whole(str(path), b"a" * 100_000)
    done = threading.Event()

    def rewrite() -> None:
        for letter in (b"b", b"c") * 20:
            write_whole(str(path), letter * 100_000)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert len(path.read_bytes()) == 100_000
    writer.join()


def test_links_and_special_files_are_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_whole(str(link), b"x")
    assert link.is_symlink()
    assert target.read_bytes() == b"x"
    write_whole("/dev/null", b"x")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_program_keeps_its_traceback_and_code(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    code = "from aelastic.worker import record\n@record\ndef main(): raise ValueError('boom')\nmain()"
    done = run_python(code, AELASTIC_ERROR_FILE=str(path))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: boom")
    assert "ValueError: boom" in path.read_text()


def test_a_crash_in_c_shows_its_stack_on_stderr() -> None:
    code = (
        "from aelastic.worker import record\nimport faulthandler\n@record\ndef main(): faulthandler._sigsegv()\nmain()"
    )
    done = run_python(code)
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr


def test_torchs_own_record_reports_to_us(tmp_path: Path) -> None:
    errors = pytest.importorskip("importlib.util").find_spec("torch")
    if errors is None:
        pytest.skip("torch is not installed")
    path = tmp_path / "error.json"
    code = (
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main(): raise ValueError('from torch')\nmain()"
    )
    assert run_python(code, TORCHELASTIC_ERROR_FILE=str(path)).returncode == 1
    report = read_error_file(str(path))
    assert report is not None
    assert report.message == "ValueError: from torch"
    assert "Traceback" in report.traceback


def test_torch_reads_our_file(error_file: Path) -> None:
    pytest.importorskip("torch", exc_type=ImportError)
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure as TorchFailure

    with pytest.raises(ValueError, match="boom"):
        recorded(ValueError("boom"))
    seen = TorchFailure(local_rank=0, pid=1, exitcode=1, error_file=str(error_file))
    assert seen.error_file_data["message"]["message"] == "ValueError: boom"
    assert seen.timestamp > 0


def test_the_worker_module_needs_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import aelastic.worker\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'aelastic'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('aelastic')))"
    )
    done = run_python(code)
    assert done.stdout.splitlines() == [
        "[]",
        str(
            [
                "aelastic",
                *(f"aelastic._child{name}" for name in ("", ".notify", ".record", ".stacks")),
                "aelastic.worker",
            ]
        ),
    ], done.stderr


@pytest.mark.parametrize("name", ["rank", "world_size", "attempt"])
def test_outside_a_run_there_is_no_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from aelastic import worker

    variable = f"AELASTIC_{name.upper()}"
    ask: Callable[[], int] = getattr(worker, name)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(RuntimeError, match=variable):
        ask()
    monkeypatch.setenv(variable, "7")
    assert ask() == 7
