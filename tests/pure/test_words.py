"""The values: exit statuses, streams, policies, failures."""

from __future__ import annotations

import json
import pickle
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aelastic._events import OutputLost, WorkerExited
from aelastic._exit import ExitStatus, signal_name
from aelastic._failures import ChildFailedError, ProcessFailure, RankMappingError
from aelastic._options import WorkerOptions
from aelastic._policies import Rotate, StopPolicy
from aelastic._results import ExitUsage, RunProcsResult, Survivor
from aelastic._std import Std, to_map


def failed(rank: int, ns: int, **more: object) -> ProcessFailure:
    status = ExitStatus(3, None)
    return ProcessFailure(
        local_rank=rank,
        pid=100 + rank,
        exitcode=3,
        error_file="",
        status=status,
        monotonic_ns=ns,
        **more,  # type: ignore[arg-type]
    )


@given(
    st.one_of(
        st.builds(ExitStatus, st.integers(0, 255), st.none()), st.builds(ExitStatus, st.none(), st.integers(1, 64))
    )
)
def test_a_returncode_says_all_that_an_exit_status_holds(status: ExitStatus) -> None:
    assert ExitStatus.from_returncode(status.returncode) == status


def test_an_exit_cannot_have_both_a_code_and_a_signal() -> None:
    with pytest.raises(ValueError, match="not both"):
        ExitStatus(1, 9)


def test_a_status_that_another_waiter_took_is_not_invented() -> None:
    unknown = ExitStatus(None, None)
    assert not unknown.ok
    assert unknown.returncode == 255
    assert "another waiter" in unknown.describe()


def test_a_signal_is_told_in_words_and_as_the_shell_counts_it() -> None:
    status = ExitStatus(None, signal.SIGTERM)
    assert (status.returncode, status.shell_code, status.describe()) == (-15, 143, "killed by SIGTERM")
    assert signal_name(signal.SIGRTMIN + 3) == "SIGRTMIN+3"


@given(st.dictionaries(st.integers(0, 9999), st.sampled_from([0, 1, 2, 3]), min_size=1))
def test_a_stream_setting_by_rank_reads_back_as_written(stds: dict[int, int]) -> None:
    text = ",".join(f"{rank}:{value}" for rank, value in stds.items())
    assert Std.from_str(text) == {rank: Std(value) for rank, value in stds.items()}


@pytest.mark.parametrize("text", ["", "4", "x", "0:4", "0:1,", "0:1,0:2", "-1", "0=1"])
def test_a_stream_setting_that_cannot_be_meant_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"write one of|names no stream|twice"):
        Std.from_str(text)


def test_to_map_spells_out_every_rank() -> None:
    assert to_map(Std.ERR, 2) == {0: Std.ERR, 1: Std.ERR}
    assert to_map({1: Std.OUT}, 2) == {0: Std.NONE, 1: Std.OUT}


@pytest.mark.parametrize(
    "steps",
    [(), ((15, 1.0),), ((9, -1.0),), ((9, float("nan")),), ((9, float("inf")),), ((99, 1.0), (9, 1.0)), (9,), "KILL"],
)
def test_stop_steps_that_could_never_end_are_refused(steps: object) -> None:
    with pytest.raises((TypeError, ValueError), match="StopPolicy"):
        StopPolicy(steps=steps)  # type: ignore[arg-type]


def test_a_close_with_arguments_replaces_the_first_step_only() -> None:
    policy = StopPolicy()
    assert policy.overridden(signal.SIGINT, 1.0) == ((signal.SIGINT, 1.0), (signal.SIGKILL, 5.0))
    assert policy.overridden(None, 0) == ((signal.SIGTERM, 0.0), (signal.SIGKILL, 5.0))
    assert policy.overridden(signal.SIGKILL, None) == ((signal.SIGKILL, 5.0),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"umask": 0o1000},
        {"nice": "5"},
        {"cpus": ()},
        {"cpus": {0: ()}},
        {"cpus": {-1}},
        {"cpus": 0},
        {"rlimits": {7: "x"}},
        {"rlimits": {7: (10, 5)}},
        {"rlimits": 7},
        {"user": ""},
        {"user": 1.5},
        {"group": -1},
        {"groups": 3},
        {"groups": [None]},
        {"unset_env": [3]},
        {"cwd": 3},
        {"cwd": "a\0"},
        {"pass_fds": (-1,)},
        {"unset_env": "HOME"},
    ],
)
def test_worker_options_name_the_field_that_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"WorkerOptions.{next(iter(wrong))}"):
        WorkerOptions(**wrong)  # type: ignore[arg-type]


def test_a_rotation_keeps_one_piece_at_least() -> None:
    with pytest.raises(ValueError, match=r"Rotate\.keep"):
        Rotate(max_bytes=1, keep=0)


def test_the_root_cause_is_what_was_seen_first_and_stands_first_in_the_report() -> None:
    failures = {0: failed(0, 200, message="second"), 1: failed(1, 100, message="first", tail=("a", "boom"))}
    result = RunProcsResult(failures=failures, outcome="failed")
    assert result.root_cause is failures[1]
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failures("job")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("job failed: rank 1 (pid 101) exited with code 3")
    assert "    boom" in lines
    assert lines.index("Failed after it:") > lines.index("    boom")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("exited with code 3", []),
        ("exited with code 3\nthe error file is damaged", ["  the error file is damaged"]),
        ("ValueError: no\nTraceback (most recent call last):\n  File\nValueError: no",
         ["  ValueError: no", "  Traceback (most recent call last):", "    File"]),
        ("it said something else", ["  it said something else"]),
    ],
)  # fmt: skip
def test_a_report_says_each_thing_once(message: str, shown: list[str]) -> None:
    report = str(ChildFailedError("job", {0: failed(0, 1, message=message)}))
    headline, *rest = report.splitlines()
    assert headline.startswith("job failed: rank 0 (pid 100) exited with code 3 after")
    assert rest == shown


def test_a_report_names_many_victims_as_ranges_within_its_width() -> None:
    victims = [1, *range(3, 60), *range(100, 300, 2)]
    report = str(ChildFailedError("job", {0: failed(0, 1)}, victims=victims))
    assert "Stopped because of it: ranks 1, 3-59, 100, 102" in report
    assert max(map(len, report.splitlines())) <= 100


def test_a_result_calls_the_run_by_its_name() -> None:
    with pytest.raises(ChildFailedError, match=r"^trainer failed: rank 0"):
        RunProcsResult(failures={0: failed(0, 1)}, outcome="failed", name="trainer").raise_for_failures()


@given(st.text(max_size=2000))
def test_a_report_fits_a_terminal_of_100_columns(message: str) -> None:
    report = str(ChildFailedError("job", {0: failed(0, 1, message=message, tail=(message,))}))
    assert max(len(line) for line in report.split("\n")) <= 100


def test_survivors_alone_make_a_run_fail_aloud() -> None:
    survivor = Survivor(0, 7, "sleep", "D (disk sleep)", "it waits for a disk")
    with pytest.raises(ChildFailedError, match="pid 7 of rank 0"):
        RunProcsResult(outcome="failed", survivors=(survivor,)).raise_for_failures()


def test_errors_survive_pickling() -> None:
    errors = [
        ChildFailedError("job", {0: failed(0, 1)}),
        RankMappingError("args", missing=[1], extra=["x"], nprocs=2),
        RankMappingError("cpus", missing=[], extra=[7], nprocs=1, every=False),
    ]
    for error in errors:
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_event_is_a_sentence_and_a_line_of_json() -> None:
    event = WorkerExited(name="job", rank=2, pid=9, status=ExitStatus(None, 9), seconds=0.5, usage=ExitUsage())
    assert str(event) == "job: rank 2 (pid 9) killed by SIGKILL after 0.500 s"
    assert json.loads(json.dumps(event.to_dict()))["status"] == {"code": None, "signal": 9}
    assert OutputLost(rank=0, std=Std.ERR, lost_bytes=3, reason="x").to_dict()["std"] == "stderr"
