"""What a caller may choose about workers and their end: frozen values that check themselves.

A policy is data; `_gang` and `_process` act on it.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, final

from ._exit import signal_name

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
class WorkerOptions:
    """What is in force in every worker before the program's first instruction.

    Options that fork and exec alone can't set (`umask`, `user`, `group`, `groups`, `nice`, `rlimits`, `cpus`) go
    through one exec'd trampoline, a bare Python interpreter that replaces itself with the command: about 12 ms of CPU
    a worker. Without them, no trampoline runs.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value can't be meant.
    """

    cwd: str | os.PathLike[str] | None = None
    """Working directory; None (default) keeps the host's."""
    stdin: str | os.PathLike[str] = "null"
    """`"null"` (default): /dev/null; `"inherit"`: the host's; anything else: the path of a file to read."""
    umask: int | None = None
    """0 to 0o777; None (default) keeps the host's."""
    user: str | int | None = None
    """Name or number; its groups are set with it, unless `groups` says otherwise."""
    group: str | int | None = None
    """Name or number; None (default) means the user's own group, if there is a `user`."""
    groups: Collection[str | int] | None = None
    """Supplementary groups; None (default) means the user's, if there is a `user`."""
    nice: int | None = None
    """An increment, as nice(2); None (default) changes nothing."""
    rlimits: Mapping[int, int | tuple[int, int]] | None = None
    """`resource.RLIMIT_*` to a limit, or to (soft, hard)."""
    cpus: Collection[int] | Mapping[int, Collection[int]] | None = None
    """The processors a worker may run on: one set for all ranks, or a mapping by rank."""
    inherit_env: bool = True
    """Whether the host's environment is laid under `envs`; False starts from an empty one."""
    unset_env: Collection[str] = ()
    """Names taken out of what is inherited."""
    pass_fds: Collection[int] = ()
    """Descriptors of the host that every worker gets, under the same numbers."""
    forkserver_preload: Collection[str] = ()
    """Modules that a fork server imports before it forks the first worker."""

    def __post_init__(self) -> None:
        self._check_paths()
        if self.umask is not None and not 0 <= _whole("umask", self.umask) <= 0o777:
            raise ValueError(f"WorkerOptions.umask must be 0 to 0o777, not {self.umask!r}")
        if self.nice is not None:
            _whole("nice", self.nice)
        for what in ("groups", "unset_env", "pass_fds", "forkserver_preload"):
            value = getattr(self, what)
            if isinstance(value, (str, bytes)):
                raise TypeError(f"WorkerOptions.{what} must be a collection, not the one string {value!r}")
            if value is not None:
                object.__setattr__(self, what, tuple(value))
        for fd in self.pass_fds:
            if _whole("pass_fds", fd) < 0:
                raise ValueError(f"WorkerOptions.pass_fds holds {fd}, which is no descriptor")
        self._check_rlimits()
        self._check_cpus()

    def _check_paths(self) -> None:
        for what in ("cwd", "stdin"):
            value = getattr(self, what)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise TypeError(f"WorkerOptions.{what} must be a path, not {value!r}")
            if value is not None and "\0" in os.fspath(value):
                raise ValueError(f"WorkerOptions.{what} holds a NUL byte: {value!r}")

    def _check_rlimits(self) -> None:
        if self.rlimits is None:
            return
        pairs: dict[int, int | tuple[int, int]] = {}
        for which, limit in self.rlimits.items():
            values: Any = limit if isinstance(limit, tuple) else (limit, limit)
            if len(values) != 2 or not all(isinstance(value, int) for value in values):
                raise TypeError(f"WorkerOptions.rlimits[{which}] must be a number or (soft, hard), not {limit!r}")
            pairs[_whole("rlimits", which)] = limit
        object.__setattr__(self, "rlimits", MappingProxyType(pairs))

    def _check_cpus(self) -> None:
        if self.cpus is None:
            return
        by_rank = isinstance(self.cpus, Mapping)
        sets = dict(self.cpus) if isinstance(self.cpus, Mapping) else {0: self.cpus}
        frozen = {rank: frozenset(_whole("cpus", cpu) for cpu in cpus) for rank, cpus in sets.items()}
        for rank, cpus in frozen.items():
            if not cpus:
                where = f" for rank {rank}" if by_rank else ""
                raise ValueError(f"WorkerOptions.cpus is empty{where}: a worker needs one processor at least")
        object.__setattr__(self, "cpus", MappingProxyType(frozen) if by_rank else frozen[0])

    def cpus_of(self, rank: int) -> frozenset[int] | None:
        """The processors of one rank; None when nothing was chosen for it."""
        cpus = self.cpus.get(rank) if isinstance(self.cpus, Mapping) else self.cpus
        return None if cpus is None else frozenset(cpus)


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"WorkerOptions.{what} must hold whole numbers, not {value!r}")
    return value


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
    Every other signal is followed by SIGCONT, so that a stopped process can obey."""
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
    """How a worker's tree is held together. `"auto"` (default) takes a cgroup where one is delegated to this process,
    else the session."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_steps(self.steps))
        for what in ("drain", "orphan_grace"):
            object.__setattr__(self, what, check_seconds(f"StopPolicy.{what}", getattr(self, what)))
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
        seconds = seconds if timeout is None else check_seconds("timeout", max(timeout, 0))
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
        checked.append((number, check_seconds(f"StopPolicy.steps after {signal_name(number)}", step[1])))
    if not checked or checked[-1][0] != signal.SIGKILL:
        raise ValueError("StopPolicy.steps must end with SIGKILL, which no process can ignore")
    return tuple(checked)
