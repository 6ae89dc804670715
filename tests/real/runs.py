"""What the tests of whole runs share: quick policies, and starting one way to die on every rank."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aelastic import DefaultLogsSpecs, Event, PContext, Std, StopPolicy, start_processes
from tests.ways_to_die import RUNS_ON, Way

QUICK = StopPolicy(steps=((signal.SIGTERM, 0.3), (signal.SIGKILL, 10.0)), drain=0.2)
"""Steps that don't keep a test waiting for who ignores SIGTERM or holds a pipe."""
PATIENT = StopPolicy(steps=((signal.SIGTERM, 60.0), (signal.SIGKILL, 10.0)), drain=0.2)
"""Steps whose first must do, or the net of the suite catches it."""


RUNS_ON_ARGS = RUNS_ON.argv


def start(ways: Way | Mapping[int, Way], **options: Any) -> Any:
    """Start the way of each rank; all ranks have one program, so that of rank 0 must do for all."""
    by_rank = {0: ways} if isinstance(ways, Way) else dict(ways)
    options.setdefault("stop", QUICK)
    # `env` runs any program: the contract has one command for all ranks.
    args = {rank: way.argv for rank, way in by_rank.items()}
    return start_processes(options.pop("name", "test"), "env", args=args, **options)


def tee(directory: Path) -> DefaultLogsSpecs:
    """Both streams to files and to the console."""
    return DefaultLogsSpecs(str(directory), tee=Std.ALL)


def redirect(directory: Path) -> DefaultLogsSpecs:
    """Both streams to files only, without the supervisor."""
    return DefaultLogsSpecs(str(directory), redirects=Std.ALL)


def capture() -> DefaultLogsSpecs:
    """Both streams to `lines()` only."""
    return DefaultLogsSpecs(capture=Std.ALL)


async def ready(ctx: PContext, *ranks: int) -> None:
    """Wait until each of these ranks has printed `ready`."""
    for rank in ranks or range(ctx.nprocs):
        await ctx.wait_for_line("^ready$", rank=rank, std=Std.OUT, timeout=30)


async def all_events(ctx: PContext) -> list[Event]:
    """Every event of a run, once it is over."""
    return [event async for event in ctx.events()]
