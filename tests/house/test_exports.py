"""The door: every name of the contract, and nothing loaded before it is asked for."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

import aelastic
from tests.house.source import ROOT

NAMES = """
    start_processes PContext SubprocessContext MultiprocessContext Starting RunProcsResult
    Std to_map LogsSpecs LogsDest DefaultLogsSpecs Rotate LogLine LineMatch LineOrigin
    ProcessFailure ChildFailedError RankMappingError StreamNotCaptured LineNotSeen SignalException
    record ErrorHandler WorkerOptions StopPolicy ExitStatus ExitUsage Survivor
    Event RunStarted AttemptStarted WorkerStarted WorkerExited WorkerFailed StopRequested WorkerSignaled
    WorkerUnkillable SurvivorsLeft OutputLost AttemptFinished RunFinished RestartPolicy Backoff RestartScheduled
    Supervisor SupervisorFailed
    HealthPolicy Notify LinePattern TcpPort HttpGet WorkerNotReady WorkerReady WatchdogExpired UsageSampled Usage
    JournalLost
""".split()
"""The public names of the contract so far; issues to come add theirs."""


def modules_after(program: str) -> set[str]:
    """Which modules a fresh interpreter has after a program."""
    show = "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program + show],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    names: list[str] = json.loads(run.stdout)
    return set(names)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_importable(name: str) -> None:
    """From the package itself, and listed there."""
    assert getattr(aelastic, name)
    assert name in aelastic.__all__
    assert name in dir(aelastic)


def test_every_listed_name_exists() -> None:
    """`from aelastic import *` works, and no public name has an underscore."""
    assert all(hasattr(aelastic, name) for name in aelastic.__all__)
    assert not [name for name in aelastic.__all__ if name.startswith("_")]


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy door tells who was asked for what."""
    with pytest.raises(AttributeError, match="no attribute 'start_process'"):
        importlib.import_module("aelastic").start_process  # noqa: B018


def test_the_package_alone_loads_nothing() -> None:
    """`import aelastic` brings in neither a loop nor any submodule, nor anything that costs as much as they do."""
    assert modules_after("import aelastic") - modules_after("from __future__ import annotations; import json") == {
        "aelastic"
    }


def test_the_workers_door_loads_the_standard_library_only() -> None:
    """Code inside workers pays for nothing that it doesn't use."""
    extra = modules_after("import aelastic.worker") - modules_after("pass")
    roots = {name.partition(".")[0] for name in extra} - {"aelastic"}
    assert not {root for root in roots if root not in sys.stdlib_module_names}
    assert "asyncio" not in extra


def test_starting_needs_no_torch_and_no_pickles() -> None:
    """`start_processes` itself loads neither torch nor what only functions need."""
    extra = modules_after("from aelastic import start_processes")
    assert not extra & {"torch", "cloudpickle", "multiprocessing.spawn", "psutil", "rich", "click"}
