"""Lines out of chunks; pure. The only places where bytes are cut at newlines for a view.

`Prefixed` prepares whole lines for a console, `Matching` picks lines for a filter file. What subscribers see is cut
in `tail`. A file gets its bytes before any of this and is not concerned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

NEWLINE = b"\n"
Piece = bytes | memoryview
"""Part of what a sink writes; a sink writes pieces in order and nothing between them."""
COPIED_BYTES = 1 << 11
"""Less than this is copied in less time than a view of it takes to make."""
MATCH_BYTES = 1 << 20
"""How much of a line a filter looks at and writes."""


@final
class Prefixed:
    r"""Chunks of one stream in, whole lines with a prefix out.

    The prefix is written when the first byte of a line is there, never after the last newline. The cost of a chunk is
    one `replace`, whose growth also counts the lines.

    Example:
        >>> view = Prefixed(b"[0]:")
        >>> view.feed(b"one\ntw"), b"".join(view.take()), view.feed(b"o\n"), b"".join(view.take())
        (1, b'[0]:one\n', 1, b'[0]:two\n')
    """

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self._joint = NEWLINE + prefix
        self._whole: list[Piece] = []
        self.whole_bytes = 0
        """Size of the whole lines that wait to be taken."""
        self.whole_lines = 0
        self.held: list[Piece] = []
        """The unfinished line, its prefix in front; only the prefix when there is none."""
        self.held_bytes = 0
        self._bare_bytes = 0
        self.forget()

    @property
    def unfinished(self) -> bool:
        """Whether a line has begun and not ended."""
        return self.held_bytes > self._bare_bytes

    def renew(self, prefix: bytes) -> None:
        """Let the lines that have not begun yet have another prefix."""
        self.prefix, self._joint = prefix, NEWLINE + prefix
        if not self.unfinished:
            self.forget()

    def feed(self, chunk: bytes) -> int:
        """Take a chunk; return how many lines it ended."""
        shown: bytes = chunk.replace(NEWLINE, self._joint) if self.prefix else chunk
        grown = len(shown) - len(chunk)
        lines = grown // len(self.prefix) if self.prefix else chunk.count(NEWLINE)
        if not lines:
            self.held.append(shown)
            self.held_bytes += len(shown)
            return 0
        cut = len(shown) - len(self.prefix) if chunk.endswith(NEWLINE) else shown.rfind(NEWLINE) + 1
        self._whole += self.held
        self._whole.append(shown[:cut] if cut < COPIED_BYTES else memoryview(shown)[:cut])
        self.whole_bytes += self.held_bytes + cut
        self.whole_lines += lines
        self._hold(shown[cut:])
        return lines

    def take(self) -> list[Piece]:
        """Hand over the whole lines."""
        whole, self._whole = self._whole, []
        self.whole_bytes = self.whole_lines = 0
        return whole

    def end(self) -> None:
        """Count an unfinished line as whole: the stream has ended."""
        if self.unfinished:
            self._whole += [*self.held, NEWLINE]
            self.whole_bytes += self.held_bytes + 1
            self.whole_lines += 1
            self.forget()

    def forget(self) -> None:
        """Drop the unfinished line; what follows is taken for a line of its own."""
        self._hold(self.prefix)

    def take_unfinished(self) -> list[Piece]:
        """Hand over the beginning of a line that is too long to be held; what follows continues it."""
        held, self.held = self.held, []
        self.held_bytes, self._bare_bytes = 0, -1
        return held

    def _hold(self, begun: bytes) -> None:
        """Begin a line, of which perhaps only the prefix is there."""
        self.held = [begun] if begun else []
        self.held_bytes = len(begun)
        self._bare_bytes = len(self.prefix)


@final
class Matching:
    r"""Chunks of one stream in, its lines that hold one of some words out, with a prefix.

    Of a line longer than 1 MiB only that much is looked at and written.

    Source: `duplicate_stdout_filters` of `torch.distributed.elastic.multiprocessing`: any word, in the bare line.

    Example:
        >>> Matching([b"loss"], b"[0]:").feed(b"step 1\nloss 2\nlo")
        [b'[0]:loss 2\n']
    """

    def __init__(self, words: Sequence[bytes], prefix: bytes) -> None:
        self.prefix = prefix
        self._words = words
        self._held: list[bytes] = []
        self._held_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a chunk; return the lines that match, each with its newline."""
        cut = chunk.rfind(NEWLINE) + 1
        if not cut:
            self._hold(chunk)
            return []
        self._hold(chunk[: chunk.find(NEWLINE)])
        first, self._held, self._held_bytes = b"".join(self._held), [], 0
        whole = chunk[chunk.find(NEWLINE) + 1 : cut]
        self._hold(chunk[cut:])
        # One search over the chunk spares the split: most chunks hold no word.
        others = whole.split(NEWLINE)[:-1] if self._matches(whole) else []
        return [self._shown(line) for line in (first, *others) if self._matches(line)]

    def end(self) -> list[bytes]:
        """Take the unfinished line for whole: the stream has ended."""
        line, self._held, self._held_bytes = b"".join(self._held), [], 0
        return [self._shown(line)] if line and self._matches(line) else []

    def _hold(self, part: bytes) -> None:
        room = MATCH_BYTES - self._held_bytes
        if part and room > 0:
            self._held.append(part[:room])
            self._held_bytes += min(len(part), room)

    def _matches(self, text: bytes) -> bool:
        return any(word in text for word in self._words)

    def _shown(self, line: bytes) -> bytes:
        return self.prefix + line[:MATCH_BYTES] + NEWLINE


def rest_of(pieces: Sequence[Piece], written: int) -> list[Piece]:
    """What is left of some pieces when their first `written` bytes are done.

    Example:
        >>> [bytes(piece) for piece in rest_of([b"abc", b"def"], 4)]
        [b'ef']
    """
    for index, piece in enumerate(pieces):
        if written < len(piece):
            return [memoryview(piece)[written:] if written else piece, *pieces[index + 1 :]]
        written -= len(piece)
    return []
