"""The console: whole lines from all ranks, streams and runs of this process, one after the other.

`Console` is a run's lease, `Voice` one stream's way to it, `Place` the one writer for what ends in one place: stdout
and stderr share it where they are the same terminal, pipe or file. The writer is a daemon thread, so a console that
hangs holds up neither the loop nor the interpreter's end; it is gone with the last run.

Three rules.
Back-pressure: while 2 MiB wait, streams that are shown are not read. A console that accepts nothing for 0.25 s while
1 MiB waits is stalled: lines are left out and counted, and a marker says so when it moves again.
Unfinished lines: shown after a quiet moment where the console stands at the start of a line. If another stream writes
first, a newline ends it, and the whole line is shown when it is complete.
Long lines: beyond 1 MiB a line is not held in memory but shown as it comes, and holds the console until it ends. It is
broken by a newline, and goes on as a line of its own, when it is quiet for 0.2 s or has gone on for 30 s while others
wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

from aelastic._std import Std

from .lines import NEWLINE, Piece, rest_of
from .prefix import Prefix
from .terminal import MOST_PIECES, Terminal, is_terminal, key_of, terminal_of
from .voice import STALLED_BYTES, Voice

STALLED_AFTER = 0.25
"""Seconds without progress, while `STALLED_BYTES` wait, after which a console is stalled."""
QUIET = 0.2
"""Seconds without a byte after which an unfinished line is shown."""
LONGEST_HOLD = 30.0
BATCH_BYTES = 1 << 20
PROMPT_BYTES = 1 << 16
JOIN_WITHIN = 0.005

Wake = tuple[int, asyncio.AbstractEventLoop, Callable[[], None]]
"""(how many bytes must be done, whose loop, what to call there)."""


@final
class Place:
    """One writer for everything that ends in one place. Its lock guards all of its state but the thread's own."""

    def __init__(self, key: object, terminals: dict[Std, Terminal]) -> None:
        self.key = key
        """Of the register; see `terminal.key_of`."""
        self.lock = threading.Lock()
        self.terminals = terminals
        self.leases = 0
        self.closed = False
        """The other end is gone: everything is left out, silently."""
        self.unfinished: Voice | None = None
        """Whose unfinished line the console stands in."""
        self.holder: Voice | None = None
        self.held_since = 0.0
        self.aside: list[tuple[Std, list[Piece], int]] = []
        """What others said while one held the console."""
        self.aside_bytes = 0
        self._waiting: deque[tuple[Std, list[Piece], int]] = deque()
        self._idle = False
        self._ringer: asyncio.AbstractEventLoop | None = None
        """The loop that will ring the bell in a moment; when others would too, the last of them."""
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._given_bytes = 0
        self._done_bytes = 0
        self._moved_at = 0.0
        self._wakes: list[Wake] = []
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name="aelastic-console", daemon=True)
        self.thread.start()

    @property
    def waiting_bytes(self) -> int:
        """What was given and not written yet."""
        return self._given_bytes - self._done_bytes

    @property
    def stalled(self) -> bool:
        """Whether 1 MiB waits and nothing was accepted for 0.25 s."""
        return self.waiting_bytes >= STALLED_BYTES and time.monotonic() - self._moved_at >= STALLED_AFTER

    def give(self, std: Std, pieces: list[Piece], size: int) -> None:
        """Queue bytes for the writer, from a loop. The lock is held."""
        if not self.waiting_bytes:
            self._moved_at = time.monotonic()
        self._given_bytes += size
        self._waiting.append((std, pieces, size))
        if not self._idle:
            return
        if size >= PROMPT_BYTES:
            self._ring()
        elif (loop := asyncio.get_running_loop()) is not self._ringer:
            # When all that is ready was read: a thread that is woken for one line takes turns with the loop for each.
            self._ringer = loop
            loop.call_soon(self._ring_in_a_moment)

    def _ring_in_a_moment(self) -> None:
        with self.lock:
            self._ringer = None
            self._ring()

    def release(self) -> None:
        """End a hold: what others said meanwhile follows. The lock is held."""
        self.holder = None
        aside, self.aside, self.aside_bytes = self.aside, [], 0
        for said in aside:
            self.give(*said)

    def break_hold(self, now: float) -> None:
        """End the hold of a line that is quiet, or has gone on too long, while others wait. The lock is held."""
        holder = self.holder
        if holder is not None and (now - holder.said_at >= QUIET or now - self.held_since >= LONGEST_HOLD):
            self.end_unfinished(holder.std)
            self.release()

    def end_unfinished(self, std: Std) -> None:
        """Bring the console to the start of a line. The lock is held."""
        if self.unfinished is not None:
            self.unfinished.interrupted = True
            self.unfinished = None
            self.give(std, [NEWLINE], 1)

    def _ring(self) -> None:
        if self._idle:
            self._idle = False
            self._bell.put(None)

    def wake_when(self, at_most: int, wake: Callable[[], None]) -> None:
        """Call back in the running loop once of what waits now no more than `at_most` bytes wait."""
        loop = asyncio.get_running_loop()
        with self.lock:
            mark = self._given_bytes + self.aside_bytes - at_most
            if self._done_bytes < mark and not self.closed:
                self._wakes.append((mark, loop, wake))
                return
        loop.call_soon(wake)

    def stop(self) -> None:
        """Let the thread end, with what it could not write left out."""
        with self.lock:
            self._stopping = True
            idle = not self.waiting_bytes
            self._ring()
        if idle:
            # A matter of microseconds. Where the console accepts nothing, the thread finds out within 50 ms.
            self.thread.join(JOIN_WITHIN)

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._write(*batch)
        finally:
            for terminal in self.terminals.values():
                terminal.close()
            self._shut()

    def _take(self) -> tuple[Std, list[Piece]] | None:
        """Wait for something to write.

        All that waits for one stream goes in one call, up to a bound: each call makes this thread queue for the
        interpreter.
        """
        while True:
            with self.lock:
                if self.closed or (self._stopping and not self._waiting):
                    return None
                if self._waiting:
                    return self._batch()
                self._idle = True
            self._bell.get()

    def _batch(self) -> tuple[Std, list[Piece]]:
        std, first, size = self._waiting.popleft()
        pieces = list(first)
        while self._waiting and self._waiting[0][0] is std and size < BATCH_BYTES and len(pieces) < MOST_PIECES:
            _, more, more_bytes = self._waiting.popleft()
            pieces += more
            size += more_bytes
        return std, pieces

    def _write(self, std: Std, pieces: list[Piece]) -> None:
        while pieces:
            try:
                written = self.terminals[std].write(pieces, lambda: not self._stopping)
            except (OSError, ValueError):  # ValueError: a stream object that its owner closed
                self._shut()
                return
            if not written:
                self._shut()
                return
            pieces = rest_of(pieces, written)
            self._moved(written)

    def _moved(self, written: int) -> None:
        with self.lock:
            self._done_bytes += written
            self._moved_at = time.monotonic()
            if not self._wakes:
                return
            due = [wake for wake in self._wakes if wake[0] <= self._done_bytes]
            self._wakes = [wake for wake in self._wakes if wake[0] > self._done_bytes]
        _call(due)

    def _shut(self) -> None:
        with self.lock:
            self.closed = True
            self._done_bytes = self._given_bytes
            self._waiting.clear()
            self.aside.clear()
            self.aside_bytes = 0
            due, self._wakes = self._wakes, []
        _call(due)


def _call(due: list[Wake]) -> None:
    for _, loop, wake in due:
        with contextlib.suppress(RuntimeError):  # its loop was closed meanwhile, and nobody waits any more
            loop.call_soon_threadsafe(wake)


@final
class Console:
    """A run's lease of the console: `sys.stdout` and `sys.stderr` as they were when it was made.

    Costs nothing until a stream is shown.
    """

    _places: dict[object, Place] = {}  # noqa: RUF012  # the one register of this process, guarded by the lock below
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._streams: dict[Std, Any] = {Std.OUT: sys.stdout, Std.ERR: sys.stderr}
        self._leased: dict[Std, tuple[Place, bool]] = {}
        """By stream: its place, and whether it shows colours."""

    def voice(self, std: Std, prefix: Prefix, path: str, *, rank: int = 0) -> Voice | None:
        """Give a stream its way to the console; None when the host has no such stream, or it is closed.

        Args:
            prefix: shown in its rank's colour on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb says no.
            path: the stream's file, for the marker.
        """
        if not self.lease(std):
            return None
        place, coloured = self._leased[std]
        return Voice(place, std, prefix.coloured(rank) if coloured else prefix, path)

    def lease(self, std: Std) -> bool:
        """See that a stream of the host has its writer; False when the host has no such stream, or it is closed."""
        if std not in self._leased:
            try:
                self._lease(std, self._streams[std])
            except (OSError, ValueError):
                return False
        return std in self._leased

    def _lease(self, std: Std, stream: Any) -> None:
        if stream is None:
            return
        coloured = is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        key = key_of(stream)
        with self._lock:
            place = self._places.get(key)
            if place is None or place.closed:
                terminal = terminal_of(stream)
                try:
                    place = self._places[key] = Place(key, {std: terminal})
                except RuntimeError:  # no thread is left
                    terminal.close()
                    raise
            elif std not in place.terminals:
                place.terminals[std] = terminal_of(stream)
            place.leases += 1
            self._leased[std] = (place, coloured)

    async def settled(self, within: float) -> bool:
        """Wait until what was said so far is written, or left out for good.

        Args:
            within: seconds.

        Returns:
            False when the time ran out.
        """
        loop = asyncio.get_running_loop()
        done = [loop.create_future() for _ in self._distinct()]
        for future, place in zip(done, self._distinct(), strict=True):
            place.wake_when(0, functools.partial(_resolve, future))
        return not done or not (await asyncio.wait(done, timeout=within))[1]

    def close(self) -> None:
        """Give the lease back; with the last one of a place its thread ends. Idempotent, never blocks.

        What is not written yet is left out: see `settled`.
        """
        leased, self._leased = self._leased, {}
        for place, _ in leased.values():
            with self._lock:
                place.leases -= 1
                if place.leases:
                    continue
                if self._places.get(place.key) is place:
                    del self._places[place.key]
            place.stop()

    def _distinct(self) -> list[Place]:
        return list(dict.fromkeys(place for place, _ in self._leased.values()))


def _forked() -> None:
    """Begin anew in a forked child, where the threads that write are not, and what they held stays held."""
    Console._places = {}  # noqa: SLF001  # of this file
    Console._lock = threading.Lock()  # noqa: SLF001


os.register_at_fork(after_in_child=_forked)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
