"""One stream's way to the console: what is said when, by the three rules of `console`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, final

from aelastic._std import Std

from .lines import NEWLINE, Piece, Prefixed
from .prefix import Prefix

if TYPE_CHECKING:
    from .console import Place

WAITING_BYTES = 2 << 20
"""How much may wait for a console before streams are held back: one batch on its way and one to follow."""
STALLED_BYTES = 1 << 20
"""How much waits at least where a console is stalled."""
RECHECK = 0.1
HELD_BYTES = 1 << 20
"""How much of an unfinished line is held in memory."""


@final
class Voice:
    """A stream's place in the conversation. Used from one loop; its `interrupted` is set by others, under the lock."""

    def __init__(self, place: Place, std: Std, prefix: Prefix, path: str) -> None:
        self.std = std
        self.interrupted = False
        """Whether another stream's newline ended the unfinished line, of which a part was shown."""
        self.said_at = 0.0
        self._place = place
        self._prefix = prefix
        self._path = path
        self._view = Prefixed(prefix.at(0))
        self.feed = self._view.feed
        """Takes a chunk; returns how many lines it ended."""
        self._shown = 0
        """How many pieces of the unfinished line are on the console."""
        self._passing = False
        """Whether the unfinished line is too long to be held, so that its beginning is on the console for good."""
        self._skipping = False
        """Whether the rest of the unfinished line is left out."""
        self._left_out = 0
        """Lines left out since the last marker."""
        self._recheck: asyncio.TimerHandle | None = None
        self._waits_for_room = False

    @property
    def unfinished(self) -> bool:
        """Whether a line has begun that could be shown in a quiet moment."""
        return self._view.unfinished

    @property
    def full(self) -> bool:
        """Whether the stream should not be read on for now."""
        place = self._place
        if place.waiting_bytes < WAITING_BYTES and place.holder is None:
            return False
        if place.closed or place.stalled:
            return False
        return place.waiting_bytes >= WAITING_BYTES or self._waits_for_holder()

    def _waits_for_holder(self) -> bool:
        place = self._place
        if place.holder is None or place.holder is self:
            return False
        return place.aside_bytes >= WAITING_BYTES or self._view.held_bytes > HELD_BYTES

    def wake_when_room(self, wake: Callable[[], None]) -> None:
        """Call back when `full` is worth another look, however often this is asked meanwhile; perhaps in vain.

        Args:
            wake: the stream's one way to look again.
        """
        if self._recheck is None:  # the end of a hold and a stall announce themselves to nobody
            self._recheck = asyncio.get_running_loop().call_later(RECHECK, self._looked_again, wake)
        if self._waits_for_holder():
            with self._place.lock:
                self._place.break_hold(time.monotonic())
        elif not self._waits_for_room:
            self._waits_for_room = True
            self._place.wake_when(WAITING_BYTES // 2, functools.partial(self._has_room, wake))

    def _looked_again(self, wake: Callable[[], None]) -> None:
        self._recheck = None
        wake()

    def _has_room(self, wake: Callable[[], None]) -> None:
        self._waits_for_room = False
        wake()

    def renew(self, at_ns: int) -> None:
        """Let what begins now have the prefix of this time, nanoseconds since the epoch, where it tells the time."""
        if self._prefix.changes:
            self._view.renew(self._prefix.at(at_ns))

    def say(self) -> None:
        """Put out what is whole, and of a line too long to be held what is there."""
        view = self._view
        if not view.whole_lines and view.held_bytes <= HELD_BYTES:
            return
        with self._place.lock:
            if view.held_bytes <= HELD_BYTES and self._is_plain():
                size = view.whole_bytes
                self._place.give(self.std, view.take(), size)
                return
            self.said_at = time.monotonic()
            self._say()

    def hush(self) -> bool:
        """Show the unfinished line, after a quiet moment, where the console stands at the start of a line.

        Returns:
            Whether to ask again later, because the console is busy.
        """
        place = self._place
        with place.lock:
            if place.holder is self:
                self._pass_on()
                if place.aside:
                    place.break_hold(time.monotonic())
            elif self._may_show_unfinished():
                if place.waiting_bytes:
                    return True
                self._put([*self._marker(), *self._view.held[self._shown :]])
                self._shown = len(self._view.held)
                place.unfinished = self
            return False

    def _may_show_unfinished(self) -> bool:
        place = self._place
        if place.closed or place.holder is not None or self.interrupted or self._skipping:
            return False
        return place.unfinished is None or place.unfinished is self

    def finish(self) -> None:
        """Say the last line, whether or not it has a newline, and how much was left out."""
        if self._recheck is not None:
            self._recheck.cancel()
        self._view.end()
        with self._place.lock:
            self._say()
            if self._left_out and not self._place.closed:
                self._put(self._marker())
            if self._place.unfinished is self:
                self._place.end_unfinished(self.std)
            if self._place.holder is self:
                self._place.release()

    def _say(self) -> None:
        if self._place.closed:
            self._view.take()
            self._view.forget()
            return
        if self._view.whole_lines:
            self._say_whole()
        if self._view.held_bytes > HELD_BYTES:
            self._say_long()

    def _say_whole(self) -> None:
        lines, whole = self._view.whole_lines, self._view.take()
        if self._skipping:
            lines, whole = lines - 1, _after_first_line(whole)
            self._skipping = False
        if self._place.stalled:
            self._leave_out(lines)
        elif lines:
            self._put([*self._marker(), *self._continuing(whole)])
        self._shown = 0
        self.interrupted = self._passing = False
        if self._place.holder is self:
            self._place.release()

    def _is_plain(self) -> bool:
        """Whether nothing but whole lines is to be said: the case that costs least is nearly every case."""
        place = self._place
        if self._shown or self._passing or self._skipping or self._left_out or self.interrupted or place.closed:
            return False
        return place.holder is None and place.unfinished is None and place.waiting_bytes < STALLED_BYTES

    def _say_long(self) -> None:
        place = self._place
        if self._skipping or place.stalled:
            self._leave_out(0 if self._skipping else 1)
            self._view.take_unfinished()
            self._skipping, self._shown, self._passing = True, 0, False
            if place.holder is self:
                place.release()
        elif place.holder is None or place.holder is self:
            if place.holder is None:
                place.holder, place.held_since = self, self.said_at
            self._pass_on()
            if place.aside:
                place.break_hold(self.said_at)

    def _pass_on(self) -> None:
        """Put out what is there of a line that is too long to be held."""
        pieces = self._continuing(self._view.take_unfinished())
        if pieces:
            self._put([*self._marker(), *pieces])
            self._place.unfinished = self
        self._shown, self._passing, self.interrupted = 0, True, False

    def _continuing(self, pieces: list[Piece]) -> list[Piece]:
        """What of the line's pieces is to be said: what is on the console already is not, unless it was interrupted."""
        if self._passing and self._place.unfinished is not self:
            return [self._view.prefix, *pieces]
        return pieces[self._shown :] if self._place.unfinished is self else pieces

    def _put(self, pieces: list[Piece]) -> None:
        place, size = self._place, sum(map(len, pieces))
        if place.holder is not None and place.holder is not self:
            place.break_hold(time.monotonic())
        if place.holder is not None and place.holder is not self:
            place.aside.append((self.std, pieces, size))
            place.aside_bytes += size
            return
        continues = place.unfinished is self and (self._shown or self._passing)
        if not continues:
            place.end_unfinished(self.std)
        place.unfinished = None
        place.give(self.std, pieces, size)

    def _leave_out(self, lines: int) -> None:
        self._left_out += lines

    def _marker(self) -> list[Piece]:
        if not self._left_out:
            return []
        what = "1 line was" if self._left_out == 1 else f"{self._left_out} lines were"
        self._left_out = 0
        where = f"; everything is in {self._path}" if self._path else ""
        return [self._view.prefix, f"({what} left out here: the console was stalled{where})\n".encode()]


def _after_first_line(pieces: list[Piece]) -> list[Piece]:
    for index, piece in enumerate(pieces):
        end = bytes(piece).find(NEWLINE) + 1
        if end:
            return [memoryview(piece)[end:], *pieces[index + 1 :]]
    return []
