"""Where every stream of an attempt goes, decided from its `LogsDest`; pure, touches no disk.

Route by route: INHERIT and DISCARD and FILE hand the worker a descriptor and cost nothing per byte; PIPE is what
the pumps read.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from aelastic._failures import RankMappingError
from aelastic._policies import Rotate
from aelastic._std import STREAMS, Std

from .prefix import DEFAULT_PREFIX, LinePrefix

DEFAULT_BUFFER_BYTES = 4 << 20
"""Default of `LogsDest.buffer_bytes`."""


@dataclass
class LogsDest:
    """Where the output of one attempt goes. Mappings are keyed by rank; ranks left out have no entry of that kind.

    Source: `torch.distributed.elastic.multiprocessing.LogsDest`; the first seven fields are torch's.
    """

    stdouts: dict[int, str] = field(default_factory=dict)
    """File of each rank's stdout; `""` inherits the host's, `os.devnull` discards."""
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    """Ranks whose stdout is shown on the console too, with the same file as in `stdouts`."""
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    error_files: dict[int, str] = field(default_factory=dict)
    """Where each worker reports its exception; `""` for nowhere."""
    filtered_stdout: str = ""
    """File of the tee'd stdout lines that hold one of the filter words; `""` for none."""
    filtered_stderr: str = ""
    captures: dict[int, Std] = field(default_factory=dict)
    """Streams that pass through the supervisor for `lines()`, whatever else becomes of them."""
    rotate: Rotate | None = None
    timestamps: bool = False
    """Whether a time index is written beside each file."""
    run_dir: str = ""
    """The run's own directory, which holds all its attempts; `""` when logs are off."""
    journal: str = ""
    """The file of the run's events, one JSON object a line; `""` for none."""
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    """How much of one stream may wait for its file before the worker is held back. Default 4 MiB."""
    prefix: LinePrefix = DEFAULT_PREFIX
    """What stands before each line on the console and in the filter files, of ranks without a prefix of their own
    (`log_line_prefixes`). Default `[{name}{rank}]:`."""


class LogsSpecs(ABC):
    """Decides where output goes, attempt by attempt. One object may serve many launches at once.

    Source: `torch.distributed.elastic.multiprocessing.LogsSpecs`.

    Args:
        log_dir: directory under which logs are written.
        redirects: streams that go to files, for all ranks or by rank.
        tee: streams that go to files and to the console.
        local_ranks_filter: the ranks shown on the console; None or empty shows all.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | Mapping[int, Std] = Std.NONE,
        tee: Std | Mapping[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        self._root_log_dir = log_dir
        self._redirects = redirects
        self._tee = tee
        self._local_ranks_filter = local_ranks_filter

    @abstractmethod
    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Settle the files of one attempt, and make the directories they need.

        Called in a worker thread, once per attempt.

        Args:
            envs: by rank, the environments as the workers will see them; `AELASTIC_RUN_ID` tells the launch,
                `AELASTIC_ATTEMPT` the attempt.

        Raises:
            OSError: if a directory can't be made.
        """

    @property
    @abstractmethod
    def root_log_dir(self) -> str:
        """The directory under which runs have theirs."""


@final
class Route(enum.Enum):
    """Where the worker's own descriptor leads."""

    INHERIT = enum.auto()
    DISCARD = enum.auto()
    FILE = enum.auto()
    PIPE = enum.auto()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """All that is decided about one stream of one rank."""

    rank: int
    std: Std
    route: Route
    path: str = ""
    """Its file; `""` for none."""
    console: bool = False
    """Whether its lines are shown."""
    filtered: str = ""
    """The file that gets its matching lines; `""` for none."""
    rotate: Rotate | None = None
    timestamps: bool = False


BY_RANK = ("stdouts", "stderrs", "tee_stdouts", "tee_stderrs", "error_files", "captures")
"""Fields of `LogsDest` that are keyed by rank."""


def check_dest(dest: object, nprocs: int, who: str) -> LogsDest:
    """Give back what `LogsSpecs.reify` answered, if it can be used.

    Args:
        who: the run, for the text.

    Raises:
        TypeError: if it is no `LogsDest`.
        RankMappingError: if a mapping names a rank that the run doesn't have.
    """
    if not isinstance(dest, LogsDest):
        raise TypeError(f"{who}: LogsSpecs.reify must return a LogsDest, not {dest!r}")
    for name in BY_RANK:
        if extra := sorted(getattr(dest, name).keys() - range(nprocs), key=repr):
            raise RankMappingError(f"{who}: LogsDest.{name}", missing=(), extra=extra, nprocs=nprocs, every=False)
    return dest


Plans = Mapping[int, Mapping[Std, StreamPlan]]
"""By rank and stream, both streams of every rank."""


def plan(dest: LogsDest, nprocs: int, filters: Mapping[Std, Sequence[str] | None]) -> dict[int, dict[Std, StreamPlan]]:
    """Decide every stream's way.

    Args:
        dest: what `LogsSpecs.reify` answered; it is not changed.
        nprocs: number of ranks.
        filters: by stream, the words of the filter file; None or empty for none.

    Returns:
        A plan for both streams of every rank 0..nprocs-1.

    Example:
        >>> plan(LogsDest(stdouts={0: "/tmp/out"}), 1, {})[0][Std.OUT].route
        <Route.FILE: 3>
    """
    return {rank: {std: _stream(dest, rank, std, filters.get(std)) for std in STREAMS} for rank in range(nprocs)}


def shown(plans: Plans) -> list[Std]:
    """The streams of the host's console that some rank is shown on."""
    return [std for std in STREAMS if any(of_rank[std].console for of_rank in plans.values())]


def _stream(dest: LogsDest, rank: int, std: Std, words: Sequence[str] | None) -> StreamPlan:
    files, tees, filtered = (
        (dest.stdouts, dest.tee_stdouts, dest.filtered_stdout)
        if std is Std.OUT
        else (dest.stderrs, dest.tee_stderrs, dest.filtered_stderr)
    )
    path = files.get(rank, "")
    # torch names os.devnull as the tee of every rank when logs are off.
    tee = bool(path) and tees.get(rank, "") not in ("", os.devnull)
    captured = std in dest.captures.get(rank, Std.NONE)
    written = path not in ("", os.devnull)
    if tee or captured or (written and (dest.rotate is not None or dest.timestamps)):
        return StreamPlan(
            rank=rank,
            std=std,
            route=Route.PIPE,
            path=path if written else "",
            console=tee,
            filtered=filtered if tee and words else "",
            rotate=dest.rotate if written else None,
            timestamps=dest.timestamps and written,
        )
    if path == os.devnull:
        return StreamPlan(rank=rank, std=std, route=Route.DISCARD)
    return StreamPlan(rank=rank, std=std, route=Route.FILE if path else Route.INHERIT, path=path)
