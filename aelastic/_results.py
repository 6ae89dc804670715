"""What a run hands back: results, survivors, lines and resource figures.

Values only. `ProcessFailure` and the exceptions have their own file, `_failures`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, final

from ._exit import ExitStatus
from ._failures import ChildFailedError, ProcessFailure
from ._std import Std

Outcome = Literal["succeeded", "failed", "stopped"]


@final
@dataclass(frozen=True, slots=True)
class Survivor:
    """A process of the run that outlived SIGKILL, or that could not be signalled."""

    rank: int
    """The rank it came from."""
    pid: int
    command: str
    """Its command line as /proc shows it, or its short name in brackets."""
    state: str
    """The kernel's state letter and word, such as `D (disk sleep)`, with the wait channel where it is readable."""
    why: str
    """A sentence: why it is still there."""


@final
@dataclass(frozen=True, slots=True)
class ExitUsage:
    """What a worker used in its life. Each figure is None where nothing honest told it.

    Source: the cgroup, or /proc/pid/stat read between exit and reap, or the last sample of its usage; never
    `ru_maxrss`, which a vforked child inherits from its parent (getrusage(2)).
    """

    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """What a rank's tree uses now."""

    cpu_seconds: float
    rss_bytes: int
    threads: int
    descriptors: int
    processes: int


@final
@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a worker printed, as a subscriber sees it."""

    rank: int
    attempt: int
    std: Std
    number: int
    """Counted from 1 in its stream; an unfinished line and its completion share one number."""
    text: str
    """Decoded as UTF-8 with replacement; without prefix and newline."""
    at: datetime
    """When the supervisor read its end, aware UTC."""
    partial: bool = False
    """Whether the line is not finished yet (a prompt, a progress bar)."""
    truncated: bool = False
    """Whether the view holds only the beginning; the file has the whole line."""
    skipped: int = 0
    """How many lines this subscription missed directly before this one."""


@final
@dataclass(frozen=True, slots=True)
class LineMatch:
    """A line that `wait_for_line` was waiting for."""

    line: LogLine
    match: re.Match[str]

    @property
    def text(self) -> str:
        """The matched text, `match[0]`."""
        return self.match[0]


@final
@dataclass(frozen=True, slots=True)
class RunProcsResult:
    """How a run ended.

    Source: `torch.distributed.elastic.multiprocessing.api.RunProcsResult`; the first four fields are torch's.
    """

    return_values: dict[int, Any] = field(default_factory=dict)
    """By rank, of every rank that returned; None for a command that succeeded."""
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    """By rank; victims and ranks that the caller stopped are not among them."""
    stdouts: dict[int, str] = field(default_factory=dict)
    """Paths by rank, `""` where the stream has no file."""
    stderrs: dict[int, str] = field(default_factory=dict)
    outcome: Outcome = "succeeded"
    exits: dict[int, ExitStatus] = field(default_factory=dict)
    """By rank, of every rank that was started and has ended."""
    victims: dict[int, ExitStatus] = field(default_factory=dict)
    """By rank, of those that were stopped because another rank failed."""
    survivors: tuple[Survivor, ...] = ()
    attempts: int = 1
    """How many there were; with `RestartPolicy(scope="rank")` those of the rank that had the most."""
    history: tuple[dict[int, ProcessFailure], ...] = ()
    """By attempt, the last one included: its failures by rank. Those older than the newest 100 attempts of what
    restarts together keep the first line of their message, and neither tail nor error file data."""
    gave_up: str = ""
    """Why it was not started again, a sentence; `""` where no restart was asked for."""
    lost_bytes: int = 0
    """Bytes of output that could not be written to files."""
    pieces: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By log file: the pieces that rotation left, oldest first, the current one last."""
    name: str = "run"
    """The run's."""
    journal_lost_bytes: int = 0
    """Bytes of events that could not be written to the journal."""

    def is_failed(self) -> bool:
        """Whether the outcome is `"failed"`."""
        return self.outcome == "failed"

    @property
    def root_cause(self) -> ProcessFailure | None:
        """The failure that the supervisor observed first; None when there is none."""
        return min(self.failures.values(), key=lambda failure: failure.monotonic_ns, default=None)

    def raise_for_failures(self, name: str | None = None) -> None:
        """Raise what went wrong; return when nothing did, or when the run was stopped by its caller.

        Args:
            name: what the report calls the run; None takes its own name.

        Raises:
            ChildFailedError: if the outcome is `"failed"`; its cause is the root cause's own exception, if it has one.
        """
        if self.is_failed():
            cause = self.root_cause.exception if self.root_cause else None
            raise ChildFailedError(
                name or self.name, self.failures, survivors=self.survivors, victims=self.victims, gave_up=self.gave_up
            ) from cause
