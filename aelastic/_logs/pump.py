"""The pump: reads one worker's stream, chunk by chunk, and hands each chunk on.

File sink first; then lines to console, filter file and subscribers, without waiting for the disk. While a sink is full
the pump doesn't read, and the worker feels it. A sink's failure is the sink's own affair; an error of ours is not.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import final

from .files import FileSink
from .hub import HubStream
from .lines import NEWLINE, Matching
from .pipes import OutputPipe
from .prefix import Prefix
from .turns import TICK, TURN, Turns
from .voice import Voice

CHUNK_BYTES = 1 << 16
"""Larger reads into fresh objects are slower: the kernel has to find their pages first."""
TURN_BYTES = 1 << 20
SHORT_BYTES = 1 << 12
"""A read shorter than this has emptied the pipe, most likely: asking again would cost more than the next event."""
LAST_BYTES = 4 << 20
"""How much is taken at the most when time is up while somebody still writes."""
QUIET = 0.2
BUSY_BYTES = 1 << 14
"""A stream of which a look finds more is waited for again, so that its pipe is never full between two looks."""
IDLE_LOOKS = 10
"""How often a stream is looked at in vain before it is waited for again."""


@final
class Pump:
    """One piped stream. All methods are the loop's.

    Args:
        pipe: closed by the pump.
        file: None for a stream without one.
        voice: None for a stream that isn't shown.
        matching: picks lines for `filtered`.
        prefix: of the lines of `filtered`.
        on_broken: called with an error of our own; the stream is then at its end.
    """

    def __init__(
        self,
        pipe: OutputPipe,
        stream: HubStream,
        *,
        file: FileSink | None = None,
        voice: Voice | None = None,
        matching: Matching | None = None,
        prefix: Prefix | None = None,
        filtered: FileSink | None = None,
        on_broken: Callable[[BaseException], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.stream = stream
        self.file = file
        self.at_eof: asyncio.Future[None] = loop.create_future()
        """Done when everybody has closed the other end, or nothing more will be read."""
        self._pipe = pipe
        self._voice = voice
        self._matching = matching
        self._prefix = prefix if prefix is not None and prefix.changes else None
        self._filtered = filtered
        self._sinks = [sink for sink in (file, filtered, stream, voice) if sink is not None]
        self._on_broken = on_broken
        self._loop = loop
        self._turns = Turns.of_running_loop()
        self._listening = False
        self._looked_at = False
        """Whether it is read with every tick instead of being waited for."""
        self._idle_looks = 0
        self._woken_at = 0.0
        """When it was last waited for and little came, on the loop's clock."""
        self._draining = False
        self._paused = False
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._read_at = 0.0
        self.finished = False
        """Whether nothing is read any more, and all is handed on."""
        stream.on_room = self.look_again

    def start(self) -> None:
        """Begin to read."""
        self._listen()

    def _listen(self) -> None:
        if not self._listening and not self._looked_at and not self.at_eof.done():
            self._listening = True
            self._loop.add_reader(self._pipe.read_fd, self._turns.ready, self)

    def _unlisten(self) -> None:
        self._turns.forget(self)
        if self._looked_at:
            self._looked_at = False
            self._turns.leave_alone(self)
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._pipe.read_fd)

    def read(self, until: float) -> bool:
        """Take a turn; see `turns.Reader`."""
        if self.at_eof.done():
            return False
        try:
            if (blocker := self._blocker()) is not None:
                self._pause(blocker)
                return False
            return self._read(until, TURN_BYTES)
        except Exception as error:  # noqa: BLE001  # a bug of ours in any sink must fail the run, not only this callback
            self._break(error)
            return False

    def _blocker(self) -> FileSink | HubStream | Voice | None:
        """Who can take no more for now."""
        for sink in self._sinks:
            if sink.full:
                return sink
        return None

    def _pause(self, blocker: FileSink | HubStream | Voice) -> None:
        self._unlisten()
        self._paused = True
        if blocker is self._voice:  # the others call `look_again` by themselves
            blocker.wake_when_room(self.look_again)

    def drain(self) -> None:
        """Be prompt about the end, and hold back for no lossless reader: the worker has ended."""
        self._draining = True
        if self._looked_at:
            self._unlisten()
            self._listen()
        self.stream.release()

    def look_again(self) -> None:
        """Read on if nothing is full any more."""
        if not self._paused or self.finished:
            return
        self._paused = False
        if (blocker := self._blocker()) is not None:
            self._pause(blocker)
        else:
            self._listen()
            self._turns.ready(self)

    def _read(self, until: float, most: int) -> bool:
        """Read until the pipe is empty, the time is up, or enough is read; return whether there may be more."""
        fd, at_ns, now, size = self._pipe.read_fd, time.time_ns(), self._loop.time(), 0
        if self._prefix is not None:
            self._renew_prefixes(at_ns, self._prefix)
        chunk = b""
        try:
            while size < most:
                chunk = os.read(fd, CHUNK_BYTES)
                if not chunk:
                    self._end()
                    return False
                size += len(chunk)
                self._hand_on(chunk, at_ns, now)
                if len(chunk) < SHORT_BYTES or time.perf_counter() >= until:
                    break
        except BlockingIOError:
            return False
        finally:
            if size:
                self._after_turn(now)
            if size < SHORT_BYTES or self._looked_at:
                self._settle_how_to_wait(size, now)
        return len(chunk) >= SHORT_BYTES

    def _settle_how_to_wait(self, size: int, now: float) -> None:
        """Choose between being woken for each line and being looked at with every tick; see `turns`."""
        if self._looked_at:
            self._idle_looks = 0 if size else self._idle_looks + 1
            if self._idle_looks >= IDLE_LOOKS or size >= BUSY_BYTES or not self._turns.pays:
                self._unlisten()
                self._listen()
        elif size and self._listening and not self._draining:
            soon, self._woken_at = now - self._woken_at < TICK, now
            if soon and self._turns.woken_again(self, now):
                self._unlisten()
                self._looked_at, self._idle_looks = True, 0
                self._turns.look_at(self)

    def _renew_prefixes(self, at_ns: int, prefix: Prefix) -> None:
        if self._voice is not None:
            self._voice.renew(at_ns)
        if self._matching is not None:
            self._matching.prefix = prefix.at(at_ns)

    def _hand_on(self, chunk: bytes, at_ns: int, now: float) -> None:
        if self.file is not None:
            self.file.put(chunk, at_ns)
        lines = chunk.count(NEWLINE) if self._voice is None else self._voice.feed(chunk)
        if self._matching is not None:
            self._filter(self._matching.feed(chunk), at_ns)
        self.stream.feed(chunk, lines, at_ns, now)

    def _filter(self, lines: list[bytes], at_ns: int) -> None:
        if lines and self._filtered is not None:
            self._filtered.put(b"".join(lines), at_ns)

    def _after_turn(self, now: float) -> None:
        self._read_at = now
        if self._voice is not None:
            self._voice.say()
            if self._voice.unfinished and self._quiet_timer is None:
                self._quiet_timer = self._loop.call_later(QUIET, self._quiet)

    def _quiet(self) -> None:
        """Show an unfinished line, if nothing came since the timer was set; else look again when it may be so."""
        self._quiet_timer = None
        if self._voice is None or self.finished or not self._voice.unfinished:
            return
        due = self._read_at + QUIET
        if self._loop.time() < due:
            self._quiet_timer = self._loop.call_at(due, self._quiet)
        elif self._voice.hush():
            self._quiet_timer = self._loop.call_later(QUIET, self._quiet)

    def _end(self) -> None:
        if not self.at_eof.done():
            self._unlisten()
            self.at_eof.set_result(None)

    def _break(self, error: BaseException) -> None:
        self._end()
        self._on_broken(error)

    def take_rest(self) -> None:
        """Read what is there now, and no more after it; the other end may still be open."""
        try:
            if not self.at_eof.done():
                self._read(time.perf_counter() + 10 * TURN, LAST_BYTES)
        finally:
            self._end()

    async def finish(self) -> None:
        """Hand on the last line, write and close the file; bounded, idempotent. Nothing is read after it."""
        if self.finished:
            return
        self.finished = True
        self._end()
        self._pipe.close()
        if self._quiet_timer is not None:
            self._quiet_timer.cancel()
        if self._voice is not None:
            self._voice.finish()
        if self._matching is not None:
            self._filter(self._matching.end(), time.time_ns())
        self.stream.end()
        if self.file is not None:
            await self.file.finish()
