"""What stands before each line on the console and in the filter files; pure.

A prefix is a format string or a callable. One that tells no time is made once for each stream; any other is made anew
for what is read at one time, so that it tells when the first byte of its line was read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import final

from aelastic._std import Std

DEFAULT_PREFIX = "[{name}{rank}]:"
"""Default of `LogsDest.prefix`; torch's."""
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
"""Foregrounds of SGR (ECMA-48) in the order of ranks. No red among them: it reads as an error."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LineOrigin:
    """Where lines come from: what a prefix may tell."""

    name: str
    """The run's."""
    rank: int
    std: Std
    host: str
    time: datetime
    """When the first byte of the line was read; aware, in the host's local time."""


EPOCH = datetime.fromtimestamp(0, UTC)

LinePrefix = str | Callable[[LineOrigin], str]
"""`"{time:%H:%M:%S} {rank} {std} "`, of the fields of `LineOrigin`, or a callable that is given one."""


def check_prefix(prefix: object) -> LinePrefix:
    """Return a prefix, or say what is wrong with it.

    Raises:
        TypeError: if it is neither a string nor a callable.
        ValueError: if it names an unknown field, or has a newline in it.
    """
    if callable(prefix):
        return prefix
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a format string or a callable, not {prefix!r}")
    try:
        _text(prefix, LineOrigin(name="", rank=0, std=Std.OUT, host="", time=EPOCH))
    except (LookupError, AttributeError, ValueError) as error:
        fields = "its fields are {name} {rank} {std} {host} {time}"
        raise ValueError(f"prefix {prefix!r} can't be used: {error!r}; {fields}") from None
    return prefix


def _text(prefix: LinePrefix, origin: LineOrigin) -> str:
    if isinstance(prefix, str):
        text = prefix.format(
            name=origin.name, rank=origin.rank, std=origin.std.label, host=origin.host, time=origin.time
        )
    else:
        text = prefix(origin)
        if not isinstance(text, str):
            raise TypeError(f"prefix: {prefix!r} must return a string, not {text!r}")
    if "\n" in text:
        raise ValueError(f"prefix: {text!r} has a newline in it; lines are shown as lines")
    return text


@final
class Prefix:
    """The prefix of one stream.

    Args:
        make: called with a time of reading, in nanoseconds since the epoch.
        changes: whether what it makes depends on the time.
    """

    def __init__(self, make: Callable[[int], bytes], *, changes: bool) -> None:
        self.at = make
        self.changes = changes

    @classmethod
    def fixed(cls, text: str) -> Prefix:
        """One that is always the same."""
        data = text.encode()
        return cls(lambda _: data, changes=False)

    @classmethod
    def of(cls, prefix: LinePrefix, *, name: str, rank: int, std: Std, host: str, now_ns: int) -> Prefix:
        """The prefix of one stream.

        Args:
            now_ns: a time to try it with.

        Raises:
            TypeError: if a callable returns no string.
            ValueError: if it has a newline in it.
            Exception: what a callable raises.
        """

        def make(at_ns: int) -> bytes:
            time = datetime.fromtimestamp(at_ns / 1e9, UTC).astimezone()
            return _text(prefix, LineOrigin(name=name, rank=rank, std=std, host=host, time=time)).encode()

        if isinstance(prefix, str) and "{time" not in prefix:
            return cls.fixed(_text(prefix, LineOrigin(name=name, rank=rank, std=std, host=host, time=EPOCH)))
        make(now_ns)
        return cls(make, changes=True)

    def coloured(self, rank: int) -> Prefix:
        """The same in its rank's colour, for a terminal."""
        begin, end = b"\x1b[%dm" % COLOURS[rank % len(COLOURS)], b"\x1b[0m"

        def make(at_ns: int) -> bytes:
            text = self.at(at_ns)
            return begin + text + end if text else text

        if self.changes:
            return Prefix(make, changes=True)
        first = make(0)
        return Prefix(lambda _: first, changes=False)
