"""The rules of restarting: is there another attempt, and how soon? Pure; time and chance are arguments.

Theory of operation: a budget belongs to what restarts together, a gang or a rank. It is asked once for each attempt
that ended by itself, and answers with a restart, with the reason why there is none, or with rest, where none was asked
for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, final

from ._failures import ProcessFailure
from ._policies import Backoff, RestartPolicy

Strategy = Literal["one_for_one", "one_for_all", "rest_for_one"]
"""Which children of a supervisor restart when one has fallen: that one, all, or that one and those started after it."""
T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again."""

    delay: float
    """Seconds to wait first."""
    reason: str
    """What ended, a sentence."""


@final
@dataclass(frozen=True, slots=True)
class GiveUp:
    """It would be started again, and can't be."""

    reason: str
    """Why not, a sentence."""


@final
@dataclass(frozen=True, slots=True)
class Rest:
    """It is not to be started again: it succeeded, or nobody asked for restarts."""


Decision = Restart | GiveUp | Rest


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What there is to know of an attempt that ended by itself."""

    failures: Mapping[int, ProcessFailure]
    """By rank; empty when it succeeded."""
    seconds: float = 0.0
    """How long it lived, if it succeeded; a failure tells its own time."""
    survived: bool = False
    """Whether processes of it are left, although everything was tried."""

    @property
    def succeeded(self) -> bool:
        """Whether no rank failed and nothing is left."""
        return not self.failures and not self.survived

    @property
    def root_cause(self) -> ProcessFailure | None:
        """The first failure."""
        return min(self.failures.values(), key=lambda failure: failure.monotonic_ns, default=None)

    @property
    def lived(self) -> float:
        """Seconds until it failed or succeeded."""
        return self.root_cause.seconds if self.root_cause else self.seconds


@final
class Intensity:
    """How many restarts there may be, for ever or within a sliding window, and when they were.

    Args:
        window: seconds; None counts for ever.
    """

    def __init__(self, most: int, window: float | None) -> None:
        self._most = most
        self._window = window
        self._instants: deque[float] = deque()

    def has_room(self, now: float) -> bool:
        """Whether there may be another one; what doesn't count any more is forgotten."""
        while self._window is not None and self._instants and now - self._instants[0] >= self._window:
            self._instants.popleft()
        return len(self._instants) < self._most

    def spend(self, now: float) -> None:
        """Count one."""
        self._instants.append(now)

    def __str__(self) -> str:
        within = "" if self._window is None else f" within {self._window:g} s"
        return f"{_restarts(self._most)}{within}"


@final
class Budget:
    """The restarts of one gang or one rank: those it had, and what the next would cost."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._intensity = Intensity(policy.max_restarts, policy.window)
        self._delays = Delays(policy.backoff)

    def decide(self, ended: Ended, *, now: float, chance: float) -> Decision:
        """Decide what follows an attempt that ended by itself; a restart is paid for at once.

        Args:
            now: on any clock that doesn't jump, the same each time.
            chance: from 0 to 1, for the jitter.
        """
        if not self._policy.max_restarts or (ended.succeeded and self._policy.when == "failure"):
            return Rest()
        if (obstacle := self._obstacle(ended, now)) is not None:
            return GiveUp(obstacle)
        self._intensity.spend(now)
        return Restart(self._delays.next(ended.lived, chance), _what_happened(ended))

    def _obstacle(self, ended: Ended, now: float) -> str | None:
        """Why there can be no restart, a sentence; None when there can."""
        if ended.survived:
            return "processes of it are still alive"
        for rank, failure in sorted(ended.failures.items()):
            if failure.retriable is False:
                return f"rank {rank} said itself that it is not retriable"
        ask = self._policy.retriable
        for rank, failure in sorted(ended.failures.items()):
            if ask is not None and not ask(failure):
                return f"RestartPolicy.retriable said no to the failure of rank {rank}"
        if self._intensity.has_room(now):
            return None
        return f"its budget of {self._intensity} is spent (RestartPolicy.max_restarts)"


@final
class Delays:
    """The waiting times of a backoff, one after the other."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._next = backoff.initial

    def next(self, lived: float, chance: float) -> float:
        """How long to wait now.

        Args:
            lived: seconds that the last attempt was well.
            chance: from 0 to 1, the share of the jitter that is left out.
        """
        backoff = self._backoff
        if lived >= backoff.reset_after:
            self._next = backoff.initial
        delay = self._next
        self._next = min(delay * backoff.factor, backoff.maximum)
        return delay * (1 - backoff.jitter * chance)


def affected(strategy: Strategy, children: Sequence[T], fallen: T) -> list[T]:
    """Which children of a supervisor restart when one has fallen, in the order of their starts.

    Example:
        >>> affected("rest_for_one", ["db", "cache", "web"], "cache")
        ['cache', 'web']
    """
    match strategy:
        case "one_for_one":
            return [fallen]
        case "one_for_all":
            return list(children)
        case "rest_for_one":
            return list(children[children.index(fallen) :])


def _restarts(count: int) -> str:
    return "1 restart" if count == 1 else f"{count} restarts"


def _what_happened(ended: Ended) -> str:
    return ended.root_cause.describe() if ended.root_cause else f"it had ended well after {ended.seconds:.1f} s"
