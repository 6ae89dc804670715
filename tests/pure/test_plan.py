"""Where streams go, decided from a `LogsDest`, and what `DefaultLogsSpecs` answers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from aelastic._logs import DefaultLogsSpecs, InheritLogsSpecs, LogsDest, Route, StreamPlan, plan
from aelastic._policies import Rotate
from aelastic._std import Std


def envs(nprocs: int, run_id: str = "abc", attempt: int = 0) -> dict[int, dict[str, str]]:
    """The environments of a launch, as far as logs are concerned."""
    return {rank: {"AELASTIC_RUN_ID": run_id, "AELASTIC_ATTEMPT": str(attempt)} for rank in range(nprocs)}


def out_of(dest: LogsDest, rank: int = 0, nprocs: int = 1) -> StreamPlan:
    """The plan of one rank's stdout."""
    return plan(dest, nprocs, {Std.OUT: ["word"]})[rank][Std.OUT]


def test_streams_are_inherited_unless_told_otherwise(tmp_path: Path) -> None:
    """Without redirects and tee a worker writes where the host does."""
    stream = out_of(DefaultLogsSpecs(str(tmp_path)).reify(envs(1)))
    assert (stream.route, stream.path, stream.console) == (Route.INHERIT, "", False)


def test_a_plain_redirect_goes_straight_to_the_file(tmp_path: Path) -> None:
    """A redirect without tee, capture, rotation or index never passes through the supervisor."""
    dest = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT).reify(envs(1))
    assert out_of(dest).route is Route.FILE
    assert out_of(dest).path == dest.stdouts[0]
    assert dest.stderrs[0] == ""


@pytest.mark.parametrize("rotate", [None, Rotate(max_bytes=10, keep=1)])
@pytest.mark.parametrize("timestamps", [True, False])
def test_rotation_and_time_index_need_a_pipe(tmp_path: Path, rotate: Rotate | None, timestamps: bool) -> None:
    """What the supervisor must write itself is piped."""
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT, rotate=rotate, timestamps=timestamps)
    stream = out_of(specs.reify(envs(1)))
    assert (stream.route is Route.PIPE) is (rotate is not None or timestamps)
    assert (stream.rotate, stream.timestamps, stream.console) == (rotate, timestamps, False)


def test_tee_implies_a_file_and_a_filter(tmp_path: Path) -> None:
    """What is tee'd is in its file, on the console, and in the filter file where words are given."""
    dest = DefaultLogsSpecs(str(tmp_path), tee={0: Std.OUT}).reify(envs(2))
    stream = out_of(dest, nprocs=2)
    assert (stream.route, stream.path, stream.console) == (Route.PIPE, dest.tee_stdouts[0], True)
    assert stream.filtered == dest.filtered_stdout
    assert plan(dest, 2, {})[0][Std.OUT].filtered == ""
    assert out_of(dest, rank=1, nprocs=2).route is Route.INHERIT


def test_capture_pipes_without_file_or_console(tmp_path: Path) -> None:
    """A captured stream is there for its readers only."""
    stream = out_of(DefaultLogsSpecs(str(tmp_path), capture=Std.ALL).reify(envs(1)))
    assert (stream.route, stream.path, stream.console, stream.filtered) == (Route.PIPE, "", False, "")


def test_a_rank_that_is_not_shown_still_has_its_file_and_lines(tmp_path: Path) -> None:
    """Outside the filter, tee'd streams are piped to the file only, inherited ones discarded."""
    dest = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, local_ranks_filter={0}).reify(envs(2))
    plans = plan(dest, 2, {Std.OUT: ["word"]})
    assert plans[0][Std.OUT].console
    assert plans[0][Std.ERR].route is Route.INHERIT
    hidden = plans[1][Std.OUT]
    assert (hidden.route, hidden.path, hidden.console, hidden.filtered) == (Route.PIPE, dest.stdouts[1], False, "")
    assert plans[1][Std.ERR].route is Route.DISCARD


def test_an_empty_filter_shows_all_ranks(tmp_path: Path) -> None:
    """As in torch, an empty set of ranks is no filter."""
    dest = DefaultLogsSpecs(str(tmp_path), tee=Std.OUT, local_ranks_filter=set()).reify(envs(2))
    assert set(dest.tee_stdouts) == {0, 1}


def test_the_null_device_turns_everything_off() -> None:
    """With `log_dir=os.devnull` streams are inherited, and there are no files of any kind."""
    specs = DefaultLogsSpecs(os.devnull, redirects=Std.ALL, tee=Std.ALL, capture=Std.ALL)
    dest = specs.reify(envs(1))
    assert specs.root_log_dir == os.devnull
    assert (dest.error_files, dest.journal, dest.run_dir) == ({0: ""}, "", "")
    assert out_of(dest).route is Route.INHERIT


def test_the_null_device_keeps_ranks_hidden() -> None:
    """A rank outside the filter stays off the console also when logs are off."""
    dest = DefaultLogsSpecs(os.devnull, local_ranks_filter={1}).reify(envs(2))
    assert [out_of(dest, rank, 2).route for rank in (0, 1)] == [Route.DISCARD, Route.INHERIT]


def test_a_tee_of_the_null_device_is_none() -> None:
    """Torch names os.devnull as every rank's tee when logs are off."""
    dest = LogsDest(stdouts={0: ""}, tee_stdouts={0: os.devnull})
    assert out_of(dest).route is Route.INHERIT


def test_the_layout_is_run_attempt_rank(tmp_path: Path) -> None:
    """Files lie under run, attempt and rank; the journal in the run's directory."""
    dest = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL).reify(envs(1, attempt=3))
    run_dir = Path(dest.run_dir)
    assert run_dir.parent == tmp_path
    assert run_dir.name.startswith("abc_")
    assert dest.stdouts[0] == str(run_dir / "attempt_3" / "0" / "stdout.log")
    assert dest.stderrs[0] == str(run_dir / "attempt_3" / "0" / "stderr.log")
    assert dest.error_files[0] == str(run_dir / "attempt_3" / "0" / "error.json")
    assert dest.filtered_stderr == str(run_dir / "attempt_3" / "filtered_stderr.log")
    assert dest.journal == str(run_dir / "events.jsonl")
    assert (run_dir / "attempt_3" / "0").is_dir()


def test_attempts_of_a_launch_lie_side_by_side_and_launches_apart(tmp_path: Path) -> None:
    """One object serves many launches at once; a launch's attempts share its directory."""
    specs = DefaultLogsSpecs(str(tmp_path))
    found: dict[tuple[int, int], str] = {}

    def launch(number: int) -> None:
        for attempt in range(3):
            found[number, attempt] = specs.reify(envs(2, f"run{number}", attempt)).run_dir

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len({found[number, attempt] for attempt in range(3)}) == 1 for number in range(8))
    assert len(set(found.values())) == 8


def test_what_another_launch_wrote_stays(tmp_path: Path) -> None:
    """The same run id under the same directory never meets the files of before."""
    first = DefaultLogsSpecs(str(tmp_path)).reify(envs(1))
    Path(first.error_files[0]).write_text("kept")
    second = DefaultLogsSpecs(str(tmp_path)).reify(envs(1))
    assert first.run_dir != second.run_dir
    assert Path(first.error_files[0]).read_text() == "kept"


def test_a_log_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """The mistake is told when the object is made."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        DefaultLogsSpecs(str(file))


def test_a_temporary_directory_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without `log_dir` logs go to a temporary directory that outlives the object."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    specs = DefaultLogsSpecs()
    assert list(tmp_path.iterdir()) == []
    dest = specs.reify(envs(1))
    assert Path(dest.run_dir).parent == Path(specs.root_log_dir)
    assert Path(specs.root_log_dir).parent == tmp_path


def test_no_log_specs_means_private_error_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Streams are inherited, error files lie in a directory of this user's that goes with the run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    specs = InheritLogsSpecs()
    dest = specs.reify(envs(2))
    assert out_of(dest, nprocs=2).route is Route.INHERIT
    assert (dest.run_dir, dest.journal) == ("", "")
    directory = Path(dest.error_files[1]).parent
    assert directory.stat().st_mode & 0o077 == 0
    specs.remove()
    assert not directory.exists()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tee": 7}, ValueError, "DefaultLogsSpecs.tee is 7, which names no stream"),
        ({"redirects": "1"}, TypeError, "DefaultLogsSpecs.redirects must be a Std"),
        ({"tee": {"0": Std.OUT}}, TypeError, "DefaultLogsSpecs.tee must have ranks as its keys, not '0'"),
        ({"capture": {0: None}}, TypeError, r"DefaultLogsSpecs.capture\[0\] must be a Std"),
        ({"rotate": 3}, TypeError, "DefaultLogsSpecs.rotate must be a Rotate"),
        ({"local_ranks_filter": 3}, TypeError, "DefaultLogsSpecs.local_ranks_filter must be a set of ranks"),
        ({"local_ranks_filter": {"0"}}, TypeError, "DefaultLogsSpecs.local_ranks_filter must be a set of ranks"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_told_when_it_is_made(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        DefaultLogsSpecs(**settings)
