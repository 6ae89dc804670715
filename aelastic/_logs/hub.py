"""Who reads which lines: `LineHub` for a run, `HubStream` for one stream of one attempt.

The hub wakes readers and says when a stream must wait for a lossless one. It never waits itself, and a stream without
readers costs it nothing but the tail.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import final

from aelastic._failures import LineNotSeen, StreamNotCaptured, with_tail
from aelastic._results import LineMatch
from aelastic._std import STREAMS, Std

from .plan import Plans, Route, StreamPlan
from .subscribers import Lines
from .tail import LOSSLESS_BYTES, TAIL_BYTES, TAIL_LINES, WINDOW_BYTES, WINDOW_LINES, Cursor, Tail

UNREAD_BYTES = 256 << 10
"""How far a lossless reader may be behind before its worker is held back."""
TAIL_SHOWN = 20
"""Lines of the tail in an error's text."""


@final
class HubStream:
    """One stream of one attempt, as the hub knows it. Fed by its pump."""

    def __init__(self, hub: LineHub, rank: int, std: Std, attempt: int) -> None:
        self.rank = rank
        self.std = std
        self.attempt = attempt
        self.tail = Tail()
        self.last_at = 0.0
        """When the last byte came, on the loop's clock."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when `full` is worth another look."""
        self._hub = hub
        self._released = False
        self._has_readers = False
        """Whether there may be some: asking those that may vanish costs more."""
        self._readers: MutableMapping[Lines, Cursor] = {}
        """Held weakly from the first one on."""

    @property
    def full(self) -> bool:
        """Whether a lossless reader is too far behind to read on."""
        if not self._has_readers or self._released:
            return False
        return self.tail.size - self._needed_from >= UNREAD_BYTES

    @property
    def _needed_from(self) -> int:
        """Where the slowest lossless reader is; the end of the stream when there is none."""
        needed = (cursor.position for reader, cursor in self._readers.items() if reader.lossless)
        return min(needed, default=self.tail.size)

    def feed(self, data: bytes, lines: int, at_ns: int, now: float) -> None:
        """Take a chunk in which `lines` lines end, read at `at_ns` (since the epoch) and `now` (the loop's clock)."""
        self.last_at = now
        self.tail.append(data, lines, at_ns)
        if not self._has_readers:
            self.tail.trim(TAIL_BYTES, TAIL_LINES)
            return
        keep_from = self._needed_from if self.tail.kept_bytes < LOSSLESS_BYTES else None
        self.tail.trim(WINDOW_BYTES, WINDOW_LINES, keep_from)
        self._wake_readers()
        self._has_readers = bool(self._readers)

    def release(self) -> None:
        """Let lossless readers hold this stream back no more: its worker has ended, or is being stopped."""
        self._released = True
        self.on_room()

    def end(self) -> None:
        """Say that nothing follows: an unfinished line is whole now."""
        self.tail.ended = True
        self._wake_readers()

    def retire(self) -> None:
        """Keep no more than a tail, since another attempt follows: a reader that sleeps must not add up attempts."""
        keep_from = self._needed_from if self._has_readers and self.tail.kept_bytes < LOSSLESS_BYTES else None
        self.tail.trim(TAIL_BYTES, TAIL_LINES, keep_from)

    def _wake_readers(self) -> None:
        for reader, cursor in list(self._readers.items()):
            reader.has_more(self, cursor)

    def add(self, reader: Lines, *, live: bool) -> None:
        """Let a subscription read this stream.

        Args:
            live: begin at the unfinished line rather than with the oldest line kept.
        """
        if not self._has_readers:
            self._has_readers, self._readers = True, weakref.WeakKeyDictionary(self._readers)
        cursor = self._readers[reader] = Cursor(self.tail, live=live)
        reader.has_more(self, cursor)

    def miss(self, reader: Lines, count: int) -> None:
        """Tell a subscription with its next line that it missed so many of earlier attempts."""
        if (cursor := self._readers.get(reader)) is not None:
            cursor.miss(count)

    def remove(self, reader: Lines) -> int:
        """Forget a subscription; return how many lines it did not read."""
        cursor = self._readers.pop(reader, None)
        if cursor is None:
            return 0
        self.on_room()
        return cursor.unread


@final
class LineHub:
    """The lines of one run, over all its attempts.

    Args:
        name: the run's, for error texts.
    """

    def __init__(self, name: str) -> None:
        self.finished = False
        self._name = name
        self._plans: dict[int, Mapping[Std, StreamPlan]] = {}
        self._streams: dict[tuple[int, Std], HubStream] = {}
        self._readers: weakref.WeakSet[Lines] = weakref.WeakSet()

    def begin(self, plans: Plans, attempt: int) -> dict[tuple[int, Std], HubStream]:
        """Take up the piped streams of an attempt.

        Args:
            plans: of the ranks that it starts.

        Returns:
            By rank and stream, what their pumps feed.
        """
        self._plans.update(plans)
        streams = {
            (rank, std): HubStream(self, rank, std, attempt)
            for rank, of_rank in plans.items()
            for std in STREAMS
            if of_rank[std].route is Route.PIPE
        }
        for key in streams:
            if key in self._streams:
                self._streams[key].retire()
        self._streams = {key: stream for key, stream in self._streams.items() if key[0] not in plans} | streams
        for reader in list(self._readers):
            for key, stream in streams.items():
                if reader.chosen(*key):
                    reader.follow(stream, live=False)
        return streams

    def look_again(self) -> None:
        """Let the streams that wait for a lossless reader see whether it is still there."""
        for stream in self._streams.values():
            stream.on_room()

    def finish(self) -> None:
        """Say that no attempt follows: subscriptions end after their last line."""
        self.finished = True
        for reader in list(self._readers):
            reader.wake()

    def lines(
        self,
        *,
        ranks: Collection[int] | None = None,
        std: Std = Std.ALL,
        lossless: bool = False,
        partials: bool = False,
        replay: bool = True,
    ) -> Lines:
        """Subscribe to lines; see `PContext.lines`.

        Raises:
            StreamNotCaptured: if none of the chosen streams is piped.
        """
        chosen = frozenset(self._plans) if ranks is None else frozenset(ranks)
        picked = [stream for (rank, each), stream in self._streams.items() if rank in chosen and each in std]
        if not picked:
            raise StreamNotCaptured(self._why_not_captured(chosen, std))
        reader = Lines(self, lambda rank, each: rank in chosen and each in std, lossless=lossless, partials=partials)
        if lossless:
            # A subscription that is dropped must not hold its workers for ever, and may be collected in any thread.
            weakref.finalize(reader, _look_again, asyncio.get_running_loop(), weakref.ref(self)).atexit = False
        self._readers.add(reader)
        for stream in picked:
            reader.follow(stream, live=not replay)
        return reader

    def _why_not_captured(self, ranks: Collection[int], std: Std) -> str:
        plans = [
            self._plans[rank][each] for rank in sorted(ranks) if rank in self._plans for each in STREAMS if each in std
        ]
        where = "; ".join(map(_whereabouts, plans[:4])) or "no such rank"
        names = {Std.OUT: "Std.OUT", Std.ERR: "Std.ERR"}.get(std, "Std.ALL")
        return (
            f"{self._name}: there are no lines to read, since they don't pass through the supervisor: {where}."
            f" Set capture={names} or tee={names} in DefaultLogsSpecs"
        )

    async def wait_for_line(
        self,
        pattern: str | re.Pattern[str],
        *,
        ranks: Collection[int] | None = None,
        std: Std = Std.ALL,
        timeout: float | None = None,
    ) -> LineMatch:
        """Wait until a line matches; see `PContext.wait_for_line`.

        Raises:
            LineNotSeen: if the streams end first.
            TimeoutError: after `timeout` seconds.
            StreamNotCaptured: if none of the chosen streams is piped.
        """
        compiled = re.compile(pattern)
        # Lossless, since "each new line" is looked at; it reads as fast as it can.
        async with self.lines(ranks=ranks, std=std, lossless=True, partials=True) as reader:
            who = f"{self._name}: no line matched {compiled.pattern!r}"
            try:
                async with asyncio.timeout(timeout):
                    found = await _first_match(reader, compiled)
            except TimeoutError:
                raise TimeoutError(with_tail(f"{who} within {timeout:g} s", self._tail(reader.chosen))) from None
            if found is None:
                raise LineNotSeen(f"{who} before the streams ended", self._tail(reader.chosen))
            return found

    def _tail(self, chosen: Callable[[int, Std], bool]) -> list[str]:
        raws = [raw for key, stream in self._streams.items() if chosen(*key) for raw in stream.tail.last(TAIL_SHOWN)]
        raws.sort(key=lambda raw: raw.at_ns)
        return [raw.data.decode("utf-8", "replace") for raw in raws[-TAIL_SHOWN:]]


async def _first_match(reader: Lines, pattern: re.Pattern[str]) -> LineMatch | None:
    # What is there is searched before any wait, so that a timeout of 0 asks.
    while (line := reader.next_nowait()) is not None:
        if (match := pattern.search(line.text)) is not None:
            return LineMatch(line, match)
    async for line in reader:
        if (match := pattern.search(line.text)) is not None:
            return LineMatch(line, match)
    return None


def _look_again(loop: asyncio.AbstractEventLoop, hub: weakref.ref[LineHub]) -> None:
    def look() -> None:
        if (left := hub()) is not None:
            left.look_again()

    if not loop.is_closed():
        loop.call_soon_threadsafe(look)


def _whereabouts(plan: StreamPlan) -> str:
    who = f"{plan.std.label} of rank {plan.rank}"
    match plan.route:
        case Route.FILE:
            return f"{who} goes straight to the file {plan.path}"
        case Route.DISCARD:
            return f"{who} is discarded"
        case _:
            return f"{who} is inherited from this process"
