"""What a caller may choose about output, stops and restarts: frozen values that check themselves.

A policy is data; `_restart` decides by it, `_gang` and `_process` act on it.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, final

from ._exit import signal_name
from ._failures import ProcessFailure

Containment = Literal["auto", "session", "cgroup"]
Step = tuple[int, float]
"""A signal, and how many seconds to wait after it."""

DEFAULT_STEPS: tuple[Step, ...] = ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0))


def check_seconds(what: str, value: object) -> float:
    """Return a duration as a float, or say what is wrong with it.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative or not a number of seconds at all (NaN).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number of seconds, not {value!r}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{what} must be 0 seconds or more, not {value!r}")
    return float(value)


def check_bounded(what: str, value: object) -> float:
    """Return a duration that ends, or say what is wrong with it; raises as `check_seconds`."""
    seconds = check_seconds(what, value)
    if math.isinf(seconds):
        raise ValueError(f"{what} must end some time, not {value!r}: a stop is bounded")
    return seconds


def check_timeout(what: str, value: object) -> float | None:
    """Return how long to wait, None for ever (as a negative number says too); raises as `check_seconds`."""
    if value is None or (isinstance(value, (int, float)) and value < 0):
        return None
    return check_seconds(what, value)


def check_signal(what: str, value: object) -> int:
    """Return a signal's number, or say that there is no such signal.

    Raises:
        TypeError: if it is no integer.
        ValueError: if this system has no signal of that number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a signal such as signal.SIGTERM, not {value!r}")
    if value not in signal.valid_signals():
        raise ValueError(f"{what} must be a signal of this system, not {value!r}")
    return int(value)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Cut a log file into pieces while it is written; a line is never split.

    Raises:
        ValueError: if a size or count is too small, or the compression is unknown.
    """

    max_bytes: int
    """A piece is closed before the line that would make it longer than this."""
    keep: int
    """How many full pieces stay beside the current one, 1 or more; older ones are removed."""
    compress: Literal["gzip"] | None = None
    """`"gzip"` compresses each full piece; None (default) leaves it as it is."""

    def __post_init__(self) -> None:
        for what, value in (("max_bytes", self.max_bytes), ("keep", self.keep)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Rotate.{what} must be a whole number, not {value!r}")
            if value < 1:
                raise ValueError(f"Rotate.{what} must be 1 or more, not {value}")
        if self.compress not in (None, "gzip"):
            raise ValueError(f"Rotate.compress must be None or 'gzip', not {self.compress!r}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StopPolicy:
    """How workers are stopped, and what a stop leaves time for.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if the steps don't end with SIGKILL, or a value is unknown or negative.

    Example:
        >>> import signal
        >>> StopPolicy(steps=((signal.SIGINT, 5.0), (signal.SIGKILL, 1.0))).bound
        6.0
    """

    steps: tuple[Step, ...] = DEFAULT_STEPS
    """(signal, seconds to wait after it); the last is SIGKILL. Default: SIGTERM, 30 s, SIGKILL, 5 s.
    Every other signal is followed by SIGCONT, so that a stopped process can obey. A function that has returned leaves
    its process as long as the first step lasts to end by itself (threads that are no daemons, child processes, exit
    hooks), one that failed leaves it `drain` seconds; then the steps are taken."""
    drain: float = 2.0
    """Seconds to read on, after a worker's exit, while something still holds its pipe. Default 2."""
    on_failure: Literal["stop", "continue"] | float = "stop"
    """What a failure means for the others: `"stop"` (default) them at once, a number of seconds to let them end by
    themselves first, or `"continue"`."""
    dump_stacks: bool = False
    """Whether stacks go to the rank's stderr before the last step. Default False."""
    on_supervisor_death: Literal["stop", "kill", "keep"] = "stop"
    """What happens to the workers when the supervisor dies: `"stop"` (default) sends the first step's signal and,
    after `orphan_grace`, SIGKILL; `"kill"` sends SIGKILL at once; `"keep"` leaves them."""
    orphan_grace: float = 1.0
    """Seconds between the two signals of `on_supervisor_death="stop"`. Default 1."""
    containment: Containment = "auto"
    """How a worker's tree is held together. `"session"`: by what its processes can't well shed, their session, group,
    parents, and the run's id in their environment. `"cgroup"`: by a cgroup (version 2) for each worker, below this
    process's own, which nothing gets out of; a start costs 10 ms of CPU more for each rank, and is refused where no
    such cgroup can be made. `"auto"` (default) takes cgroups only where this process's own was delegated to it (in a
    systemd unit: `Delegate=yes`) and a process can be moved, else the session. `RunStarted` tells which it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_steps(self.steps))
        for what in ("drain", "orphan_grace"):
            object.__setattr__(self, what, check_bounded(f"StopPolicy.{what}", getattr(self, what)))
        if not isinstance(self.on_failure, str):
            object.__setattr__(self, "on_failure", check_seconds("StopPolicy.on_failure", self.on_failure))
        elif self.on_failure not in ("stop", "continue"):
            raise ValueError(f"StopPolicy.on_failure must be 'stop', 'continue' or seconds, not {self.on_failure!r}")
        if self.on_supervisor_death not in ("stop", "kill", "keep"):
            raise ValueError(
                f"StopPolicy.on_supervisor_death must be 'stop', 'kill' or 'keep', not {self.on_supervisor_death!r}"
            )
        if self.containment not in ("auto", "session", "cgroup"):
            raise ValueError(f"StopPolicy.containment must be 'auto', 'session' or 'cgroup', not {self.containment!r}")

    @property
    def bound(self) -> float:
        """Seconds that all steps take together at the most."""
        return sum(seconds for _, seconds in self.steps)

    def overridden(self, death_sig: int | None, timeout: float | None) -> tuple[Step, ...]:
        """The steps, with the first one's signal and time replaced where given.

        Args:
            death_sig: None keeps the signal; SIGKILL leaves only the last step.
            timeout: seconds after the first signal; None keeps the policy's, below 0 counts as 0.
        """
        first, seconds = self.steps[0]
        first = first if death_sig is None else check_signal("death_sig", death_sig)
        seconds = seconds if timeout is None else check_timeout("timeout", timeout) or 0.0
        if first == signal.SIGKILL:
            return ((signal.SIGKILL, seconds if timeout is not None else self.steps[-1][1]),)
        return ((first, seconds), *(self.steps[1:] or DEFAULT_STEPS[-1:]))


def check_steps(steps: object) -> tuple[Step, ...]:
    """Return stop steps in their plain form, or say what is wrong with them.

    Raises:
        TypeError: if they are not pairs of a signal and seconds.
        ValueError: if there are none, or the last is not SIGKILL.
    """
    if not isinstance(steps, (tuple, list)):
        raise TypeError(f"StopPolicy.steps must be a tuple of (signal, seconds), not {steps!r}")
    checked: list[Step] = []
    for step in steps:
        if not isinstance(step, (tuple, list)) or len(step) != 2:
            raise TypeError(f"StopPolicy.steps must hold pairs of (signal, seconds), not {step!r}")
        number = check_signal("StopPolicy.steps", step[0])
        checked.append((number, check_bounded(f"StopPolicy.steps after {signal_name(number)}", step[1])))
    if not checked or checked[-1][0] != signal.SIGKILL:
        raise ValueError("StopPolicy.steps must end with SIGKILL, which no process can ignore")
    return tuple(checked)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long a restart waits: longer after each one, until what was restarted has kept up for a while.

    Raises:
        TypeError: if a field is no number.
        ValueError: if a value can't be meant.

    Example:
        >>> Backoff(initial=0.0).maximum  # restarts at once, every time
        30.0
    """

    initial: float = 0.5
    """Seconds before the first restart. Default 0.5."""
    factor: float = 2.0
    """What each further delay is multiplied with, 1 or more. Default 2."""
    maximum: float = 30.0
    """Seconds that no delay exceeds. Default 30."""
    jitter: float = 0.1
    """The part of each delay, 0 to 1, of which a random share is left out, so that what failed together doesn't come
    back together. Default 0.1: a delay of 10 s becomes 9 to 10 s."""
    reset_after: float = 60.0
    """After so many seconds without failure the next delay is the first again. Default 60."""

    def __post_init__(self) -> None:
        for what in ("initial", "factor", "maximum", "jitter", "reset_after"):
            object.__setattr__(self, what, check_seconds(f"Backoff.{what}", getattr(self, what)))
        if self.factor < 1 or math.isinf(self.factor):
            raise ValueError(f"Backoff.factor must be 1 or more, not {self.factor:g}: delays don't become shorter")
        if math.isinf(self.maximum) or self.maximum < self.initial:
            raise ValueError(
                f"Backoff.maximum must be a number of seconds, and no less than initial={self.initial:g},"
                f" not {self.maximum:g}"
            )
        if self.jitter > 1:
            raise ValueError(f"Backoff.jitter must be a part from 0 to 1, not {self.jitter:g}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Whether, how often and how soon what has ended is started again.

    When the budget is spent, the result is that of the last attempt. A start that fails (the command is gone, there
    can be no further process) spends the budget like a failure, the first start included: `start_processes` then
    raises the error of the last one.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value can't be meant.

    Example:
        >>> daemon = RestartPolicy(max_restarts=5, window=60.0, scope="rank", when="always")
        >>> daemon.backoff.initial
        0.5
    """

    max_restarts: int = 0
    """How many restarts there may be: of the gang, or with `scope="rank"` of each rank. Default 0."""
    window: float | None = None
    """Seconds in which they are counted, a sliding window; None (default) counts them for ever."""
    scope: Literal["gang", "rank"] = "gang"
    """What is restarted: `"gang"` (default) all ranks together, after all have ended (OTP's one_for_all); `"rank"` the
    one that ended, the others untouched (one_for_one), with budget, window and backoff of each rank's own."""
    when: Literal["failure", "always"] = "failure"
    """`"failure"` (default), or `"always"`: after a success too; a gang then restarts when all its ranks have ended."""
    backoff: Backoff = field(default_factory=Backoff)
    """How long each restart waits. Default: 0.5 s, doubled up to 30 s, as new after 60 s without failure."""
    retriable: Callable[[ProcessFailure], bool] | None = None
    """Says of each failure whether another attempt may help; one that may not ends the run. None (default): all may.
    An error file that says `"retriable": false` has the last word."""

    def __post_init__(self) -> None:
        if isinstance(self.max_restarts, bool) or not isinstance(self.max_restarts, int):
            raise TypeError(f"RestartPolicy.max_restarts must be a whole number, not {self.max_restarts!r}")
        if self.max_restarts < 0:
            raise ValueError(f"RestartPolicy.max_restarts must be 0 or more, not {self.max_restarts}")
        if self.window is not None:
            object.__setattr__(self, "window", check_seconds("RestartPolicy.window", self.window))
            if self.window == 0:
                raise ValueError("RestartPolicy.window must be longer than 0 seconds, or no restart would ever count")
        if self.scope not in ("gang", "rank"):
            raise ValueError(f"RestartPolicy.scope must be 'gang' or 'rank', not {self.scope!r}")
        if self.when not in ("failure", "always"):
            raise ValueError(f"RestartPolicy.when must be 'failure' or 'always', not {self.when!r}")
        if not isinstance(self.backoff, Backoff):
            raise TypeError(f"RestartPolicy.backoff must be a Backoff, not {self.backoff!r}")
        if self.retriable is not None and not callable(self.retriable):
            raise TypeError(f"RestartPolicy.retriable must be a function of a failure, not {self.retriable!r}")
