"""An attempt in plain values: what it is lent, what it is started with, how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from ._bus import Bus
from ._ending import Cause, End
from ._exit import ExitStatus
from ._failures import ProcessFailure
from ._function import ForkServer
from ._guard import Watch
from ._health import Ward
from ._limits import check_descriptors, check_open
from ._logs import Console, LineHub, LogsDest, Plans, Route
from ._process import Cgroups, Tree
from ._results import Survivor
from ._returned import Value
from ._spec import RunSpec
from ._std import STREAMS
from ._threads import Threads

_DESCRIPTORS = {Route.INHERIT: 0, Route.DISCARD: 1, Route.FILE: 1, Route.PIPE: 4}
"""By route, what one stream of one rank has open: both ends of a pipe, the file and its index."""


TRANSIENT_DESCRIPTORS = 24
"""What one spawn has open while it is under way, a reserve for looks at /proc, the guard and the journal."""


class StartAbandoned(Exception):
    """The run was stopped before all its ranks had been started."""


def most_descriptors(spec: RunSpec) -> int:
    """How many descriptors a gang can have open when all its ranks are started, wherever its output goes."""
    return len(STREAMS) * spec.nprocs * max(_DESCRIPTORS.values()) + _of_ranks(spec)


def check_limits(spec: RunSpec, plans: Plans) -> None:
    """Raise unless a gang's descriptors are there: those it passes on are open, and there is room for its own.

    Raises:
        OSError: EBADF or EMFILE, naming the run and what is missing.
    """
    check_open(spec.options.pass_fds, spec.name)
    streams = sum(_DESCRIPTORS[plan.route] for streams in plans.values() for plan in streams.values())
    check_descriptors(streams + _of_ranks(spec) + TRANSIENT_DESCRIPTORS, spec.name)


def _of_ranks(spec: RunSpec) -> int:
    """Those that are not for output: pidfds (ours and asyncio's), pipes for calls and results, readiness sockets."""
    return spec.nprocs * ((2 if spec.is_command else 4) + (spec.health is not None))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What a run lends to its attempts."""

    bus: Bus
    tree: Tree
    threads: Threads
    """For /proc, evidence and pickles."""
    disks: Threads
    """For log files."""
    hub: LineHub
    console: Console
    watch: Watch
    ward: Ward
    cgroups: Cgroups | None
    """None where the workers are contained by their sessions."""
    server: ForkServer
    starts: asyncio.Lock
    """Held for one start at a time, so that the loop has its turns while many ranks restart at once."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one attempt is started with. Mappings hold every rank of the run, also those that it doesn't start."""

    attempt: int
    envs: Mapping[int, dict[str, str]]
    dest: LogsDest
    plans: Plans


@final
@dataclass(slots=True)
class AttemptEnd:
    """How an attempt ended; mappings by rank."""

    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    exits: dict[int, ExitStatus] = field(default_factory=dict)
    victims: dict[int, ExitStatus] = field(default_factory=dict)
    survivors: tuple[Survivor, ...] = ()
    lost_bytes: int = 0
    pieces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    closed: bool = False
    """Whether the caller stopped it before it ended by itself."""

    @property
    def succeeded(self) -> bool:
        """Whether it ended well, and by itself."""
        return not (self.failures or self.survivors or self.closed)

    def add(self, end: End) -> None:
        """Count one rank in."""
        if end.status is not None:
            self.exits[end.rank] = end.status
            if end.stopped is Cause.FAILURE:
                self.victims[end.rank] = end.status
        if end.failure is not None:
            self.failures[end.rank] = end.failure
        elif end.stopped is None and isinstance(end.returned, Value):
            self.return_values[end.rank] = end.returned.value
        self.survivors += end.survivors
