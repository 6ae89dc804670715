"""When a rank is ready, and how its health is watched: conditions and `HealthPolicy`, which check themselves.

Frozen values: a condition is data, and so is what is still missing of it; `_health` finds out what is so.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, final
from urllib.parse import urlsplit

from ._policies import check_seconds
from ._std import Std

Question = Callable[[Any, int], Awaitable[Any]]
"""An async callable `(ctx, rank)` whose answer says whether the rank is ready."""


class Condition:
    """Something that is true of a rank sooner or later; `&` and `|` make one of two.

    Once true it stays true, until the rank is started anew.
    """

    __slots__ = ()

    def __and__(self, other: Condition | Question) -> AllOf:
        return AllOf((self, as_condition(other)))

    def __rand__(self, other: Question) -> AllOf:
        return AllOf((as_condition(other), self))

    def __or__(self, other: Condition | Question) -> AnyOf:
        return AnyOf((self, as_condition(other)))

    def __ror__(self, other: Question) -> AnyOf:
        return AnyOf((as_condition(other), self))

    def leaves(self) -> Iterator[Condition]:
        """The conditions it is made of that can be found out by themselves."""
        yield self

    def is_met(self, met: Collection[Condition]) -> bool:
        """Whether it is true when exactly these leaves are."""
        return self in met

    def missing(self, met: Collection[Condition], told: Mapping[Condition, str]) -> str:  # noqa: ARG002  # of its parts
        """What would have to become true, in words.

        Args:
            told: what was last heard of a leaf.
        """
        last = told.get(self, "")
        return f"{self}{f' (last: {last})' if last else ''}"


@final
@dataclass(frozen=True, slots=True)
class AllOf(Condition):
    """True when every part is."""

    parts: tuple[Condition, ...]

    def leaves(self) -> Iterator[Condition]:
        for part in self.parts:
            yield from part.leaves()

    def is_met(self, met: Collection[Condition]) -> bool:
        return all(part.is_met(met) for part in self.parts)

    def missing(self, met: Collection[Condition], told: Mapping[Condition, str]) -> str:
        return " and ".join(part.missing(met, told) for part in self.parts if not part.is_met(met))


@final
@dataclass(frozen=True, slots=True)
class AnyOf(Condition):
    """True when one part is."""

    parts: tuple[Condition, ...]

    def leaves(self) -> Iterator[Condition]:
        for part in self.parts:
            yield from part.leaves()

    def is_met(self, met: Collection[Condition]) -> bool:
        return any(part.is_met(met) for part in self.parts)

    def missing(self, met: Collection[Condition], told: Mapping[Condition, str]) -> str:
        return f"({' or '.join(part.missing(met, told) for part in self.parts)})"


@final
@dataclass(frozen=True, slots=True)
class Notify(Condition):
    """The rank says `READY=1` to its `NOTIFY_SOCKET`, as `aelastic.worker.ready()` and systemd's programs do.

    Source: sd_notify(3).
    """

    def __str__(self) -> str:
        return "READY=1 on its NOTIFY_SOCKET"


@final
@dataclass(frozen=True, slots=True)
class LinePattern(Condition):
    r"""The rank prints a line in which the pattern is found, an unfinished one (a prompt) included.

    What its groups captured is in `ctx.ready_captures[rank]`: under their names, under `"1"`, `"2"`, ... without.

    Raises:
        TypeError: if the pattern is none of text.
        ValueError: if it is no regular expression.

    Example:
        >>> LinePattern(r"listening on port (?P<port>\d+)")
        LinePattern(regex=re.compile('listening on port (?P<port>\\d+)'), std=<Std.ALL: 3>)
    """

    regex: str | re.Pattern[str]
    """Searched for with `re.search`; compiled."""
    std: Std = field(default=Std.ALL, kw_only=True)
    """In which streams. Each that is named alone must pass through the supervisor (tee or capture)."""

    def __post_init__(self) -> None:
        pattern: Any = self.regex.pattern if isinstance(self.regex, re.Pattern) else self.regex
        if not isinstance(pattern, str):
            raise TypeError(f"LinePattern needs a regular expression for text, not {self.regex!r}")
        try:
            object.__setattr__(self, "regex", re.compile(self.regex))
        except re.error as error:
            raise ValueError(f"LinePattern({pattern!r}) is no regular expression: {error}") from None
        if self.std not in (Std.OUT, Std.ERR, Std.ALL):
            raise ValueError(f"LinePattern({pattern!r}).std must be Std.OUT, Std.ERR or Std.ALL, not {self.std!r}")

    def __str__(self) -> str:
        return f"a line that matches {self.compiled.pattern!r}"

    @property
    def compiled(self) -> re.Pattern[str]:
        """The pattern."""
        return re.compile(self.regex)

    @staticmethod
    def captured(match: re.Match[str]) -> dict[str, str]:
        """What the groups of a match hold, those that took part."""
        names = {number: name for name, number in match.re.groupindex.items()}
        return {
            names.get(number, str(number)): text for number, text in enumerate(match.groups(), 1) if text is not None
        }


@final
@dataclass(frozen=True, slots=True)
class TcpPort(Condition):
    """Something accepts connections there; it is closed again at once.

    Raises:
        TypeError: if the port is no whole number.
        ValueError: if there can be no such port, or the host is empty.
    """

    port: int
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if not 1 <= _whole("TcpPort.port", self.port) <= 65535:
            raise ValueError(f"TcpPort.port must be 1 to 65535, not {self.port}")
        if not self.host:
            raise ValueError("TcpPort.host is empty: name a host, or leave it out for this one")

    def __str__(self) -> str:
        return f"a connection to {self.host} port {self.port}"


@final
@dataclass(frozen=True, slots=True)
class HttpGet(Condition):
    """A GET is answered with one of the expected status codes; redirects are not followed.

    As with Kubernetes' probes, the certificate of an https server is not verified: nothing is sent but the request.

    Raises:
        TypeError: if something has the wrong type.
        ValueError: if the URL is none of http or https, or no status is expected.
    """

    url: str
    expect: Collection[int] | int = field(default=range(200, 400), kw_only=True)
    """Status codes; one alone may stand without a collection. Default 200 to 399."""
    timeout: float = field(default=1.0, kw_only=True)
    """Seconds from the connection to the status line. Default 1."""

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise TypeError(f"HttpGet.url must be a string, not {self.url!r}")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or any(char <= " " or char == "\x7f" for char in self.url):
            raise ValueError(f"HttpGet.url must be like 'http://127.0.0.1:8080/ready', not {self.url!r}")
        object.__setattr__(self, "expect", _status_codes(self.expect))
        object.__setattr__(self, "timeout", _positive("HttpGet.timeout", self.timeout))

    def __str__(self) -> str:
        return f"an answer from {self.url}"

    def expects(self, status: int) -> bool:
        """Whether an answer with this status means ready."""
        return status in self.expect if not isinstance(self.expect, int) else status == self.expect


def _status_codes(expect: object) -> Collection[int]:
    codes = (expect,) if isinstance(expect, int) else expect
    if not isinstance(codes, Collection) or isinstance(codes, (str, bytes)):
        raise TypeError(f"HttpGet.expect must hold status codes such as range(200, 400), not {expect!r}")
    if not codes:
        raise ValueError("HttpGet.expect is empty, so that no answer could be the right one")
    return codes if isinstance(codes, range) else frozenset(_whole("HttpGet.expect", code) for code in codes)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Asked(Condition):
    """An async callable says so. Made of a callable wherever a condition is expected.

    An exception counts as no, and is told when the time is over.
    """

    question: Question

    def __str__(self) -> str:
        return f"a yes of {getattr(self.question, '__qualname__', None) or repr(self.question)}(ctx, rank)"


def as_condition(value: object) -> Condition:
    """A condition as it is, or the one of an async callable.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(value, Condition):
        return value
    if isinstance(value, type) or not callable(value):
        raise TypeError(
            "a condition is Notify(), LinePattern(...), TcpPort(...), HttpGet(...) or an async callable (ctx, rank),"
            f" not {value!r}"
        )
    return Asked(value)


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a whole number, not {value!r}")
    return value


def _positive(what: str, value: object) -> float:
    seconds = check_seconds(what, value)
    if not seconds:
        raise ValueError(f"{what} must be more than 0 seconds")
    return seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """When ranks are ready, and how it is noticed that one is stuck.

    Whatever is chosen, each worker then has a `NOTIFY_SOCKET` (sd_notify(3)): `READY=1`, `STATUS=`, `STOPPING=1`,
    `WATCHDOG=1`, `EXTEND_TIMEOUT_USEC=`, `ERRNO=` and `BARRIER=1` mean what they mean to systemd.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a value can't be meant.

    Example:
        >>> HealthPolicy(ready=Notify() & TcpPort(5432), ready_timeout=30).condition_of(0)
        AllOf(parts=(Notify(), TcpPort(port=5432, host='127.0.0.1')))
    """

    ready: Condition | Question | Mapping[int, Condition | Question | None] | None = None
    """One condition for all ranks, or one for each in a mapping. None (default), and a rank that the mapping leaves
    out: running is ready."""
    ready_timeout: float | None = None
    """Seconds from a worker's start; one that is not ready then has failed (`not_ready`). None (default): no limit.
    `EXTEND_TIMEOUT_USEC=` moves the end."""
    watchdog: float | None = None
    """Seconds between two heartbeats at the most; a worker that is late is killed (`watchdog`). Counted from ready, or
    from the start where `ready` is None. None (default): no watchdog."""
    interval: float = 0.1
    """Seconds between two questions to a port, a server or a callable. Default 0.1."""
    start_order: Literal["parallel", "sequential"] = "parallel"
    """`"parallel"` (default) starts all ranks at once; `"sequential"` each when the one before is ready, or has ended
    well. The start then lasts until the last one is started; it is over when a rank fails, unless
    `StopPolicy.on_failure="continue"` goes on with the next."""
    usage_every: float | None = None
    """Seconds between two `UsageSampled` events. None (default): none."""

    def __post_init__(self) -> None:
        for what in ("ready_timeout", "watchdog", "usage_every", "interval"):
            if getattr(self, what) is not None or what == "interval":
                object.__setattr__(self, what, _positive(f"HealthPolicy.{what}", getattr(self, what)))
        if self.start_order not in ("parallel", "sequential"):
            raise ValueError(f"HealthPolicy.start_order must be 'parallel' or 'sequential', not {self.start_order!r}")
        if isinstance(self.ready, Mapping):
            by_rank = {rank: None if value is None else _ready(value) for rank, value in self.ready.items()}
            object.__setattr__(self, "ready", MappingProxyType(by_rank))
        elif self.ready is not None:
            object.__setattr__(self, "ready", _ready(self.ready))
        if self.ready is None and self.ready_timeout is not None:
            raise ValueError("HealthPolicy.ready_timeout has nothing to wait for: set HealthPolicy.ready")

    @property
    def ranks(self) -> Collection[int]:
        """The ranks that it names; empty when it speaks of all."""
        return tuple(self.ready) if isinstance(self.ready, Mapping) else ()

    def condition_of(self, rank: int) -> Condition | None:
        """When a rank is ready; None where running is ready."""
        value = self.ready.get(rank) if isinstance(self.ready, Mapping) else self.ready
        return None if value is None else as_condition(value)


def _ready(value: object) -> Condition:
    try:
        return as_condition(value)
    except TypeError as error:
        raise TypeError(f"HealthPolicy.ready: {error}") from None
