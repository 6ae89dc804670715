"""What a caller asks for is checked before anything happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aelastic._failures import RankMappingError
from aelastic._options import WorkerOptions
from aelastic._policies import StopPolicy
from aelastic._spec import RunSpec, check, worker_environments


def checked(**changed: Any) -> RunSpec:
    given: dict[str, Any] = {
        "name": "job",
        "entrypoint": "true",
        "args": {0: (), 1: ()},
        "envs": None,
        "log_line_prefixes": None,
        "start_method": "spawn",
        "duplicate_stdout_filters": None,
        "duplicate_stderr_filters": None,
        "options": None,
        "stop": None,
    }
    return check(**given | changed)


def test_arguments_of_a_command_become_strings_but_bytes_and_paths_stay() -> None:
    spec = checked(args={0: (1, b"\xff", Path("a")), 1: "one argument"})
    assert spec.args == {0: ("1", b"\xff", "a"), 1: ("one argument",)}


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"args": {0: (), 2: ()}}, RankMappingError, "no entry for rank 1 and has entries for 2"),
        ({"args": {}}, RankMappingError, "no entry for rank 0"),
        ({"args": {True: ()}}, RankMappingError, "True"),
        ({"args": {0: 3}}, TypeError, r"args\[0\]"),
        ({"args": [()]}, TypeError, "args must map"),
        ({"args": {0: ("a\0b",)}}, ValueError, r"args\[0\]\[0\] holds a NUL byte"),
        ({"envs": {0: {}}}, RankMappingError, "envs has no entry for rank 1"),
        ({"envs": {0: {}, 1: {"A": 1}}}, TypeError, r"envs\[1\]\['A'\]"),
        ({"envs": {0: {}, 1: {"A": "x\0"}}}, ValueError, r"envs\[1\]\['A'\] holds a NUL"),
        ({"envs": {0: {}, 1: {"A=B": "x"}}}, ValueError, "name of a variable"),
        ({"log_line_prefixes": {7: "x"}}, RankMappingError, "log_line_prefixes has entries for 7"),
        ({"log_line_prefixes": {0: 7}}, TypeError, r"log_line_prefixes\[0\]"),
        ({"options": WorkerOptions(cpus={5: {0}})}, RankMappingError, "cpus has entries for 5"),
        ({"options": StopPolicy()}, TypeError, "options must be a WorkerOptions"),
        ({"stop": 3.0}, TypeError, "stop must be a StopPolicy"),
        ({"start_method": "thread"}, ValueError, "start_method"),
        ({"entrypoint": 3}, TypeError, "entrypoint"),
        ({"entrypoint": ""}, ValueError, "entrypoint is empty"),
        ({"entrypoint": "a\0"}, ValueError, "NUL"),
        ({"name": 3}, TypeError, "name"),
        ({"duplicate_stdout_filters": "word"}, TypeError, "duplicate_stdout_filters"),
        ({"duplicate_stderr_filters": [3]}, TypeError, "duplicate_stderr_filters"),
    ],
)
def test_bad_input_gets_a_sentence_that_names_it(changed: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        checked(**changed)


def test_a_worker_inherits_nothing_that_speaks_of_its_host() -> None:
    host = {
        "HOME": "/root",
        "NOTIFY_SOCKET": "/x",
        "WATCHDOG_USEC": "1",
        "LISTEN_FDS": "1",
        "AELASTIC_RANK": "7",
        "AELASTIC_LINEAGE": ":outer:",
        "TORCHELASTIC_ERROR_FILE": "/outer",
    }
    env = worker_environments(checked(), host, "inner", 0)[1]
    assert env["AELASTIC_LINEAGE"] == ":outer:inner:"
    assert (env["AELASTIC_RANK"], env["AELASTIC_WORLD_SIZE"], env["HOME"]) == ("1", "2", "/root")
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "TORCHELASTIC_ERROR_FILE"} & env.keys()


def test_an_empty_environment_still_carries_the_lineage() -> None:
    spec = checked(options=WorkerOptions(inherit_env=False), envs={0: {"A": "1"}, 1: {}})
    env = worker_environments(spec, {"HOME": "/root", "AELASTIC_LINEAGE": ":outer:"}, "inner", 3)[0]
    assert env["AELASTIC_LINEAGE"] == ":outer:inner:"
    assert env["A"] == "1"
    assert env["TORCHELASTIC_RESTART_COUNT"] == "3"
    assert "HOME" not in env


def test_the_callers_mappings_are_never_changed() -> None:
    args, envs = {0: [1]}, {0: {"A": "1"}}
    worker_environments(checked(args=args, envs=envs), {}, "id", 0)
    assert (args, envs) == ({0: [1]}, {0: {"A": "1"}})
