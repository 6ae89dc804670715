"""The last lines of one stream, kept as the chunks they came in, and cursors that read them as lines; pure.

A chunk is kept by reference and cut into lines only where somebody reads, so a stream without readers pays almost
nothing. The left edge always stands at the beginning of a line: of a line whose first chunks were dropped, the
beginning is kept apart.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, final

from .lines import NEWLINE

VIEW_BYTES = 1 << 16
"""How much of a line a view shows; the file has all of it."""
TAIL_BYTES = 1 << 16
"""How much is kept of a stream that nobody reads, give or take a chunk."""
TAIL_LINES = 1000
WINDOW_BYTES = 2 << 20
"""How far a reader may fall behind before it loses lines, give or take a chunk."""
WINDOW_LINES = 20_000
CHUNKS, CHUNK_BYTES = 4096, 64
"""How many chunks are kept at the most: so many, or one for each 64 bytes of the limit. Where a stream is read byte by
byte its chunks take far more than its bytes."""
LOSSLESS_BYTES = 8 << 20
"""How much is kept for a reader that must lose nothing while the worker is no longer held back."""


class RawLine(NamedTuple):
    """A line as a cursor found it."""

    number: int
    """Counted from 1."""
    data: bytes
    """Without newline."""
    at_ns: int
    """When its last byte was read, nanoseconds since the epoch."""
    partial: bool
    truncated: bool
    skipped: int
    """Lines this cursor missed directly before."""


class Chunk(NamedTuple):
    """What was read at once."""

    start: int
    """Its place in the stream, in bytes."""
    data: bytes
    lines: int
    """How many lines end in it."""
    at_ns: int


@final
class Tail:
    """The newest chunks of a stream."""

    def __init__(self) -> None:
        self.dropped = 0
        """How many chunks were dropped; the first one kept has this index."""
        self.chunks: deque[Chunk] = deque()
        self.head = b""
        """Beginning of the line that the left edge cuts."""
        self.head_truncated = False
        self.first_number = 1
        """Number of the first line that is kept."""
        self.size = 0
        """Bytes of the stream so far."""
        self.lines = 0
        """Lines that ended so far."""
        self.ended = False

    @property
    def kept_bytes(self) -> int:
        """Bytes of the chunks kept."""
        return self.size - self.chunks[0].start if self.chunks else 0

    def append(self, data: bytes, lines: int, at_ns: int) -> None:
        """Add a chunk in which `lines` lines end."""
        self.chunks.append(Chunk(self.size, data, lines, at_ns))
        self.size += len(data)
        self.lines += lines

    def trim(self, most_bytes: int, most_lines: int, keep_from: int | None = None) -> None:
        """Drop the oldest chunks as long as what stays is at least a limit's worth.

        Args:
            keep_from: chunks that reach beyond this place are kept, however many.
        """
        while len(self.chunks) > 1:
            oldest = self.chunks[0]
            after = oldest.start + len(oldest.data)
            enough = (
                self.size - after >= most_bytes
                or self.lines - self.first_number + 1 - oldest.lines >= most_lines
                or len(self.chunks) > max(CHUNKS, most_bytes // CHUNK_BYTES)
            )
            if not enough or (keep_from is not None and keep_from < after):
                return
            self._drop(oldest)

    def _drop(self, oldest: Chunk) -> None:
        cut = oldest.data.rfind(NEWLINE) + 1
        before, truncated = (b"", False) if cut else (self.head, self.head_truncated)
        room = VIEW_BYTES - len(before)
        self.head = before + oldest.data[cut : cut + room]
        self.head_truncated = truncated or len(oldest.data) - cut > room
        self.first_number += oldest.lines
        self.chunks.popleft()
        self.dropped += 1

    def last(self, count: int) -> list[RawLine]:
        """The last lines, an unfinished one included."""
        cursor = Cursor(self)
        cursor.skip_all_but(count)
        found: list[RawLine] = []
        while (line := cursor.next()) is not None:
            found.append(line)
        unfinished = cursor.unfinished()
        return (found if unfinished is None else [*found, unfinished])[-count:]


@final
class Cursor:
    """A reader's place in a tail; at the left edge, or (`live=True`) at the beginning of the unfinished line."""

    def __init__(self, tail: Tail, *, live: bool = False) -> None:
        self.tail = tail
        self._number = 1
        self._skipped = 0
        self._index = -1
        self._offset = 0
        self._held: bytes | bytearray = b""
        self._truncated = False
        self._at_ns = 0
        self._done = False
        self._to_left_edge()
        if live:
            self.skip_all_but(0)

    @property
    def at_edge(self) -> bool:
        """Whether it stands at the beginning of a chunk."""
        return not self._offset

    @property
    def position(self) -> int:
        """Its place in the stream, in bytes."""
        index = self._index - self.tail.dropped
        if index >= len(self.tail.chunks):
            return self.tail.size
        return self.tail.chunks[max(index, 0)].start + (self._offset if index >= 0 else 0)

    @property
    def next_at_ns(self) -> int:
        """When the chunk under it was read."""
        index = self._index - self.tail.dropped
        return self.tail.chunks[max(index, 0)].at_ns if index < len(self.tail.chunks) else self._at_ns

    @property
    def unread(self) -> int:
        """How many lines it has not given yet, those that it will tell to be skipped included; of an ended stream."""
        unfinished = self.tail.size > 0 and not (self.tail.chunks and self.tail.chunks[-1].data.endswith(NEWLINE))
        return self.tail.lines + (unfinished and not self._done) - (self._number - 1) + self._skipped

    def miss(self, count: int) -> None:
        """Tell of so many lines more that they were skipped before the next one."""
        self._skipped += count

    def skip_all_but(self, count: int) -> None:
        """Go to where the last `count` whole lines begin, if that is further on; looks at no line before them.

        Not for a cursor that has been read from.
        """
        tail, wanted = self.tail, count + 1
        self._skipped = 0
        for back, chunk in enumerate(reversed(tail.chunks), start=1):
            if chunk.lines < wanted:
                wanted -= chunk.lines
                continue
            end = len(chunk.data)
            for _ in range(wanted):
                end = chunk.data.rfind(NEWLINE, 0, end)
            self._number = tail.lines - count + 1
            self._index = tail.dropped + len(tail.chunks) - back
            self._held, self._truncated = b"", False
            self._step(chunk, end + 1)
            return

    def next(self) -> RawLine | None:
        """The next whole line; None when there is none yet. The last line of an ended stream is whole."""
        if self._index < self.tail.dropped:
            self._to_left_edge()
        while (index := self._index - self.tail.dropped) < len(self.tail.chunks):
            chunk = self.tail.chunks[index]
            self._at_ns = chunk.at_ns
            end = chunk.data.find(NEWLINE, self._offset)
            if end >= 0:
                self._hold(chunk.data, end)
                self._step(chunk, end + 1)
                return self._line()
            self._hold(chunk.data, len(chunk.data))
            self._step(chunk, len(chunk.data))
        if self.tail.ended and self._held and not self._done:
            self._done = True
            return self._line()
        return None

    def unfinished(self) -> RawLine | None:
        """The unfinished line as far as it is there, once `next` has nothing; it stays unfinished."""
        if not self._held or self.tail.ended:
            return None
        return self._seen(partial=True)

    def _seen(self, *, partial: bool) -> RawLine:
        return RawLine(
            number=self._number,
            data=bytes(self._held),
            at_ns=self._at_ns,
            partial=partial,
            truncated=self._truncated,
            skipped=self._skipped,
        )

    def _line(self) -> RawLine:
        line = self._seen(partial=False)
        self._number += 1
        self._skipped = 0
        self._held = b""
        self._truncated = False
        return line

    def _hold(self, data: bytes, end: int) -> None:
        room = VIEW_BYTES - len(self._held)
        self._truncated = self._truncated or end - self._offset > room
        part = data[self._offset : min(end, self._offset + room)]
        if not self._held:
            self._held = part
        elif part:  # of a line in many small chunks not all is copied for each
            self._held = self._held if isinstance(self._held, bytearray) else bytearray(self._held)
            self._held += part

    def _step(self, chunk: Chunk, offset: int) -> None:
        self._offset = offset
        if offset >= len(chunk.data):
            self._index += 1
            self._offset = 0

    def _to_left_edge(self) -> None:
        """Take up the first line kept; those before it are skipped."""
        tail = self.tail
        self._skipped += tail.first_number - self._number
        self._number = tail.first_number
        self._index, self._offset = tail.dropped, 0
        self._held, self._truncated = tail.head, tail.head_truncated
