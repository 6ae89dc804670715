"""The facts a run publishes, each a frozen value with a sentence.

`str(event)` is the line for a log, `event.to_dict()` the line of the journal. Who numbers and delivers them is `_bus`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from ._exit import ExitStatus, signal_name
from ._failures import ProcessFailure
from ._results import ExitUsage, Survivor, Usage
from ._std import Std


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fact, published once. The fields below are filled in by the bus."""

    seq: int = -1
    """0, 1, 2, ... within the run; a gap means that this subscriber was too slow."""
    at: datetime = dataclasses.field(default_factory=lambda: datetime.fromtimestamp(0).astimezone())
    """When it was published, aware UTC."""
    monotonic_ns: int = 0
    """The same instant on the host's monotonic clock, in nanoseconds."""
    name: str = ""
    """The run's name."""
    run_id: str = ""
    attempt: int = 0

    def __str__(self) -> str:
        """The sentence, after the run's name."""
        return f"{self.name}: {self.sentence()}"

    def sentence(self) -> str:
        """What happened, without the run's name."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a line of JSON; `event` holds the class name."""
        return {"event": type(self).__name__} | {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}


_PLAIN = frozenset({str, int, float, bool, type(None)})


def plain(value: Any) -> Any:
    """A value in the words of JSON; what has none becomes its `repr`."""
    if type(value) in _PLAIN:  # nearly always; the patterns below take ten times as long
        return value
    match value:
        case Std():
            return value.label
        case enum.Enum():
            return value.name
        case None | bool() | int() | float() | str():
            return value
        case datetime():
            return value.isoformat()
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            return repr(value)


@final
@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins; nothing has been started yet."""

    nprocs: int
    containment: str
    """The level in force: `"session"` or `"cgroup"`."""
    log_dir: str
    """The run's directory, `""` when logs are off."""

    def sentence(self) -> str:
        where = f", logs in {self.log_dir}" if self.log_dir else ""
        return f"starts {self.nprocs} ranks, contained by {self.containment}{where}"


@final
@dataclass(frozen=True, kw_only=True)
class AttemptStarted(Event):
    """A launch begins: of the whole gang, or of one rank that restarts by itself."""

    rank: int | None = None
    """Whose attempt it is, under `RestartPolicy(scope="rank")`; None for the gang's."""

    def sentence(self) -> str:
        return f"{_attempt_of(self.rank, self.attempt)} begins"


@final
@dataclass(frozen=True, kw_only=True)
class WorkerStarted(Event):
    """A rank's program is running."""

    rank: int
    pid: int

    def sentence(self) -> str:
        return f"rank {self.rank} runs as pid {self.pid}"


@final
@dataclass(frozen=True, kw_only=True)
class WorkerReady(Event):
    """A rank's condition of readiness has become true."""

    rank: int
    pid: int
    seconds: float
    """Since its start."""

    def sentence(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) is ready after {self.seconds:.3f} s"


@final
@dataclass(frozen=True, kw_only=True)
class WatchdogExpired(Event):
    """A worker sent no heartbeat in time, or did not leave a block (`aelastic.worker.expires`): it is killed."""

    rank: int
    pid: int
    seconds: float
    """How long it had."""

    def sentence(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) let its watchdog of {self.seconds:g} s expire"


@final
@dataclass(frozen=True, kw_only=True)
class UsageSampled(Event):
    """What the running ranks use, by rank (`HealthPolicy.usage_every`)."""

    usages: Mapping[int, Usage]

    def sentence(self) -> str:
        cpu, memory = (sum(map(get, self.usages.values())) for get in (_cpu_seconds, _rss_bytes))
        return f"{len(self.usages)} ranks have used {cpu:.1f} s of CPU and hold {memory / 2**20:.0f} MiB"


def _cpu_seconds(usage: Usage) -> float:
    return usage.cpu_seconds


def _rss_bytes(usage: Usage) -> float:
    return usage.rss_bytes


@final
@dataclass(frozen=True, kw_only=True)
class WorkerExited(Event):
    """A worker's own process has ended; what it left behind may not have."""

    rank: int
    pid: int
    status: ExitStatus
    seconds: float
    """How long it lived."""
    usage: ExitUsage

    def sentence(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) {self.status.describe()} after {self.seconds:.3f} s"


@final
@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """A rank ended badly, with its evidence."""

    rank: int
    failure: ProcessFailure

    def sentence(self) -> str:
        first, *_ = [*self.failure.message.splitlines(), ""]
        return f"{self.failure.describe()}{': ' + first if first else ''}"


@final
@dataclass(frozen=True, kw_only=True)
class StopRequested(Event):
    """The gang is being stopped."""

    reason: str

    def sentence(self) -> str:
        return f"stops: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class WorkerSignaled(Event):
    """A signal of ours was sent to a worker, or to what it left behind."""

    rank: int
    pid: int
    signal: int
    reason: str

    def sentence(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) was sent {signal_name(self.signal)}: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class WorkerUnkillable(Event):
    """A worker outlived SIGKILL and the time after it."""

    rank: int
    pid: int
    state: str
    """The kernel's state and, where readable, the wait channel."""

    def sentence(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) outlived SIGKILL in state {self.state}"


@final
@dataclass(frozen=True, kw_only=True)
class SurvivorsLeft(Event):
    """Processes of a rank are still alive although everything was tried."""

    rank: int
    survivors: tuple[Survivor, ...]

    def sentence(self) -> str:
        pids = ", ".join(str(survivor.pid) for survivor in self.survivors)
        return f"rank {self.rank} left processes that outlived SIGKILL: pid {pids}"


@final
@dataclass(frozen=True, kw_only=True)
class OutputLost(Event):
    """A sink began to lose output; the total is in the result."""

    rank: int
    std: Std
    lost_bytes: int
    reason: str

    def sentence(self) -> str:
        return f"rank {self.rank} lost {self.lost_bytes} bytes of {self.std.label}: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class JournalLost(Event):
    """The run's journal began to lose events; the total is in the result. Subscribers still get all of them."""

    lost_bytes: int
    reason: str

    def sentence(self) -> str:
        return f"the journal lost {self.lost_bytes} bytes: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class OutputHeld(Event):
    """A worker's pipe was still open when the time to drain ran out."""

    rank: int
    holders: tuple[int, ...]
    """Pids of the processes that hold it, as far as they could be found."""

    def sentence(self) -> str:
        who = ", ".join(map(str, self.holders)) or "unknown"
        return f"rank {self.rank} has ended, but its output is still held open by pid {who}"


@final
@dataclass(frozen=True, kw_only=True)
class GuardLost(Event):
    """The guard process died; another was started."""

    pid: int
    reason: str

    def sentence(self) -> str:
        return f"the guard (pid {self.pid}) was lost: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class AttemptFinished(Event):
    """Every rank of an attempt has ended."""

    succeeded: bool
    rank: int | None = None
    """As in `AttemptStarted`."""

    def sentence(self) -> str:
        return f"{_attempt_of(self.rank, self.attempt)} {'succeeded' if self.succeeded else 'did not succeed'}"


def _attempt_of(rank: int | None, attempt: int) -> str:
    return f"attempt {attempt}" if rank is None else f"attempt {attempt} of rank {rank}"


@final
@dataclass(frozen=True, kw_only=True)
class RestartScheduled(Event):
    """Another attempt follows the one that has ended, unless a stop comes first."""

    delay: float
    """Seconds until then."""
    reason: str
    rank: int | None = None
    """As in `AttemptStarted`."""

    def sentence(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank} "
        return f"{who}restarts in {self.delay:.3g} s as attempt {self.attempt + 1}: {self.reason}"


@final
@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run is over; this is its last event."""

    succeeded: bool
    gave_up: str = ""
    """Why it was not started again, a sentence; `""` where no restart was asked for."""

    def sentence(self) -> str:
        why = f"; it was not restarted: {self.gave_up}" if self.gave_up else ""
        return f"{'succeeded' if self.succeeded else 'did not succeed'}{why}"
