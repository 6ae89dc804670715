"""Everything that can be raised or reported about a bad end: failures and exceptions.

Values only: evidence is read elsewhere and handed in. Each exception builds its own sentence.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from ._exit import ExitStatus, signal_name

if TYPE_CHECKING:
    from ._results import Survivor

Reason = Literal[
    "exited",
    "signaled",
    "raised",
    "no_result",
    "result_lost",
    "status_lost",
    "watchdog",
    "not_ready",
    "start_failed",
    "unkillable",
    "out_of_memory",
]

WIDTH = 100
"""Columns of a failure report."""
TRACEBACK = "Traceback (most recent call last):\n"
TAIL_SHOWN = 12
"""Lines of a worker's tail that a report shows; the failure holds more."""


@final
@dataclass(frozen=True, kw_only=True)
class ProcessFailure:
    """One rank's bad end, with its evidence.

    Source: `torch.distributed.elastic.multiprocessing.errors.ProcessFailure`; the first seven fields are torch's.
    """

    local_rank: int
    pid: int
    exitcode: int
    """As `Popen.returncode`: negative for a signal."""
    error_file: str
    """Path of the worker's error file; `""` when it has none."""
    error_file_data: dict[str, Any] = field(default_factory=dict)
    """The error file as JSON; empty when there is none or it is damaged (then `message` says so)."""
    message: str = ""
    """What the worker said, else what its exit says, in words."""
    timestamp: int = 0
    """Unix seconds, UTC; for display. Order failures by `monotonic_ns`."""
    status: ExitStatus = field(default_factory=lambda: ExitStatus(None, None))
    seconds: float = 0.0
    """How long the worker lived."""
    monotonic_ns: int = 0
    """When it failed, on the host's monotonic clock: as its own error file says, else as the supervisor saw it."""
    tail: tuple[str, ...] = ()
    """The last lines of stderr, else of stdout."""
    exception: BaseException | None = field(default=None, compare=False)
    """A function's exception where it could be rebuilt here."""
    reason: Reason = "exited"

    @property
    def rank(self) -> int:
        """The same number as `local_rank`."""
        return self.local_rank

    @property
    def retriable(self) -> bool | None:
        """What its error file, else its exception, says about another attempt; None when they say nothing."""
        message = self.error_file_data.get("message")
        extra = message.get("extraInfo") if isinstance(message, dict) else None
        places = (place for place in (extra, message, self.error_file_data) if isinstance(place, dict))
        said = [*(place.get("retriable") for place in places), getattr(self.exception, "retriable", None)]
        return next((answer for answer in said if isinstance(answer, bool)), None)

    def abridged(self) -> ProcessFailure:
        """The same without what takes room: the first line of its message, no tail, no data, no exception."""
        first, *_ = [*self.message.splitlines(), ""]
        return dataclasses.replace(self, message=first, tail=(), error_file_data={}, exception=None)

    def signal_name(self) -> str:
        """Name of the signal that killed it; `"<N/A>"` when none did (torch's word)."""
        return signal_name(-self.exitcode) if self.exitcode < 0 else "<N/A>"

    def timestamp_isoformat(self) -> str:
        """`timestamp` in ISO 8601, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC).isoformat(sep="_")

    def describe(self) -> str:
        """One sentence: who, how it ended, after how long."""
        if self.reason == "start_failed":
            return f"rank {self.rank} {self._ending()}"
        return f"rank {self.rank} (pid {self.pid}) {self._ending()} after {_duration(self.seconds)}"

    def _ending(self) -> str:
        match self.reason:
            case "raised":
                return f"raised an exception and {'was ' if self.status.signal else ''}{self.status.describe()}"
            case "no_result":
                return f"{self.status.describe()} without handing back a result"
            case "result_lost":
                return "handed back a result that could not be read"
            case "watchdog":
                return "sent no heartbeat in time and was stopped"
            case "not_ready":
                return "was not ready in time"
            case "start_failed":
                return "could not be started"
            case "unkillable":
                return "outlived SIGKILL"
            case "out_of_memory":
                return f"{self.status.describe()}, probably by the kernel because memory ran out,"
            case "status_lost" | "exited" | "signaled":
                return self.status.describe()


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


class ChildFailedError(Exception):
    """A run failed. The message shows the root cause first, within 100 columns.

    Source: `torch.distributed.elastic.multiprocessing.errors.ChildFailedError`.

    Args:
        name: the run's name.
        failures: by rank; may be empty when only survivors make it a failure.
        gave_up: why it was not started again, a sentence; `""` where no restart was asked for.
    """

    def __init__(
        self,
        name: str,
        failures: Mapping[int, ProcessFailure],
        *,
        survivors: Sequence[Survivor] = (),
        victims: Collection[int] = (),
        gave_up: str = "",
    ) -> None:
        self.name = name
        self.gave_up = gave_up
        self.failures = dict(failures)
        self.survivors = tuple(survivors)
        self.victims = tuple(sorted(victims))
        super().__init__(self.format_msg())

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_child_failed, (self.name, self.failures, self.survivors, self.victims, self.gave_up))

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """Rank and failure of the root cause.

        Raises:
            LookupError: if no rank failed (survivors alone made the run fail).
        """
        if not self.failures:
            raise LookupError(f"{self.name}: no rank failed; survivors: {self.survivors}")
        return min(self.failures.items(), key=lambda item: item[1].monotonic_ns)

    def format_msg(self) -> str:
        """The report as a person reads it."""
        return "\n".join(self._report())

    def _report(self) -> Iterable[str]:
        if self.failures:
            first, root = self.get_first_failure()
            yield f"{self.name} failed: {root.describe()}"
            yield from _evidence(root)
            others = [failure for rank, failure in sorted(self.failures.items()) if rank != first]
            if others:
                yield "Failed after it:"
                yield from _wrapped(other.describe() for other in others)
        else:
            yield f"{self.name} failed: processes of it are still alive"
        if self.victims:
            yield from _wrapped([f"Stopped because of it: {name_ranks(self.victims)}"], indent="")
        for survivor in self.survivors:
            who = f"pid {survivor.pid} of rank {survivor.rank} ({survivor.command})"
            yield from _wrapped([f"Still alive: {who}: {survivor.why}"], indent="")
        if self.gave_up:
            yield from _wrapped([f"Not restarted: {self.gave_up}"], indent="")


def _rebuild_child_failed(
    name: str,
    failures: dict[int, ProcessFailure],
    survivors: tuple[Survivor, ...],
    victims: tuple[int, ...],
    gave_up: str,
) -> ChildFailedError:
    return ChildFailedError(name, failures, survivors=survivors, victims=victims, gave_up=gave_up)


def name_ranks(ranks: Iterable[int]) -> str:
    """Name ranks in words, neighbours as a range.

    Example:
        >>> name_ranks([2]), name_ranks([4, 0, 1, 2, 7, 8])
        ('rank 2', 'ranks 0-2, 4, 7, 8')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    one = len(runs) == 1 and len(runs[0]) == 1
    return f"rank{'' if one else 's'} {', '.join(words)}"


def _evidence(failure: ProcessFailure) -> Iterable[str]:
    yield from _wrapped(_news(failure).splitlines())
    if failure.tail and failure.tail[-1] not in failure.message:
        yield "  last output:"
        yield from _wrapped(failure.tail[-TAIL_SHOWN:], indent="    ")
    if failure.error_file and Path(failure.error_file).is_file():
        yield f"  error file: {failure.error_file}"


def _news(failure: ProcessFailure) -> str:
    """What the message says beyond the headline, each thing once."""
    head, newline, rest = failure.message.partition("\n")
    if head == failure.status.describe():
        return rest
    error, traceback, calls = failure.message.partition("\n" + TRACEBACK)
    if traceback and calls.endswith("\n" + error):  # as Python's own last line
        calls = calls.removesuffix("\n" + error)
        return error + traceback + calls
    return head + newline + rest


def _wrapped(lines: Iterable[str], indent: str = "  ") -> Iterable[str]:
    for line in lines:
        yield from textwrap.wrap(
            line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", drop_whitespace=False,
            replace_whitespace=False, break_on_hyphens=False,
        ) or [""]  # fmt: skip


class SupervisorFailed(Exception):
    """A supervisor has given up: more restarts were needed than its intensity allows. Its cause is the last failure.

    Args:
        message: who needed the last one, and why there was none.
        fallen: name of the run, or of the supervisor below, that was the last to fail.
    """

    def __init__(self, message: str, fallen: str) -> None:
        super().__init__(message)
        self.fallen = fallen

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.args[0], self.fallen))


class SignalException(Exception):
    """A signal arrived while its run was in the care of `forward_signals`.

    Source: `torch.distributed.elastic.multiprocessing.api.SignalException`.
    """

    def __init__(self, msg: str, sigval: int) -> None:
        super().__init__(msg)
        self.sigval = sigval


class RankMappingError(ValueError, RuntimeError):
    """A mapping by rank, or a choice of ranks, names others than the run has.

    Args:
        what: the run, and what was given.
        every: whether all ranks have to be there.
    """

    def __init__(
        self, what: str, *, missing: Collection[int], extra: Collection[Any], nprocs: int, every: bool = True
    ) -> None:
        parts = [f"has no entry for {name_ranks(missing)}"] if missing else []
        if extra:
            parts.append(f"has entries for {', '.join(map(repr, extra))}, which are no ranks")
        there = "rank 0" if nprocs == 1 else f"the ranks 0 to {nprocs - 1}"
        wanted = f"its keys must be exactly {there}" if every else f"the run has {there}"
        super().__init__(f"{what} {' and '.join(parts)}: {wanted}")
        self.what = what
        self.missing = tuple(sorted(missing))
        self.extra = tuple(extra)
        self.nprocs = nprocs
        self.every = every

    def of(self, run: str) -> RankMappingError:
        """The same, naming the run it is about."""
        return RankMappingError(
            f"{run}: {self.what}", missing=self.missing, extra=self.extra, nprocs=self.nprocs, every=self.every
        )

    def __reduce__(self) -> tuple[Any, ...]:
        choices = {"missing": self.missing, "extra": self.extra, "nprocs": self.nprocs, "every": self.every}
        return (_rebuild_rank_mapping, (self.what, choices))


def _rebuild_rank_mapping(what: str, choices: dict[str, Any]) -> RankMappingError:
    return RankMappingError(what, **choices)


class StreamNotCaptured(LookupError):
    """Lines were asked of a stream that doesn't pass through the supervisor."""


class LineNotSeen(Exception):
    """The streams ended before a line matched.

    Args:
        message: who waited for what.
        tail: the last lines of the streams that were watched.
    """

    def __init__(self, message: str, tail: Sequence[str] = ()) -> None:
        super().__init__(with_tail(message, tail))
        self.tail = tuple(tail)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.args[0], ()), {"tail": self.tail})


class WorkerNotReady(Exception):
    """A rank ended, or its time was over, before it was ready.

    Args:
        message: who is not ready, and what is missing.
        failures: by rank, as far as they are known; empty when it ended without one.
        tail: the last lines of its output.
    """

    def __init__(self, message: str, failures: Mapping[int, ProcessFailure], tail: Sequence[str] = ()) -> None:
        super().__init__(with_tail(message, tail))
        self.failures = dict(failures)
        self.tail = tuple(tail)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.args[0], self.failures), {"tail": self.tail})


def with_tail(message: str, tail: Sequence[str]) -> str:
    """A message with the last output under it."""
    return "\n".join([message, "last output:", *(f"  {line}" for line in tail)]) if tail else message
