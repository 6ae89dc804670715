"""Whether a rank is ready: finds out what its condition is made of, each part by the means that it has.

What is said and printed is waited for; what must be asked is asked every `interval` seconds until it is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, final

from .._conditions import Asked, Condition, HttpGet, LinePattern, Notify, Question, TcpPort
from .._failures import StreamNotCaptured
from .._results import LogLine
from .._std import Std
from .probes import ask_port, ask_server, why

END_WITHIN = 1.0
"""Seconds that a callable which is told to end is waited for."""


class Reader(Protocol):
    """A subscription to lines."""

    def __aiter__(self) -> AsyncIterator[LogLine]: ...

    def close_nowait(self) -> None:
        """End it: until then it holds the worker back for what is not read."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Senses:
    """What a rank is observed with, given by the floors above."""

    lines: Callable[[int, Std], Reader]
    """By rank and streams: its lines from the first one on, unfinished ones included."""
    ask: Callable[[Question, int], Awaitable[Any]]
    """Asks a callable about a rank."""
    threads: Executor
    """For what may block."""


@final
class Readiness:
    """The way of one worker to being ready. Belongs to the running loop.

    Args:
        on_ready: called once, when the condition is true.
    """

    def __init__(
        self, rank: int, condition: Condition, interval: float, senses: Senses, on_ready: Callable[[], None]
    ) -> None:
        self.captures: dict[str, str] = {}
        """What line patterns captured."""
        self._rank = rank
        self._condition = condition
        self._interval = interval
        self._senses = senses
        self._on_ready = on_ready
        self._met: set[Condition] = set()
        self._told: dict[Condition, str] = {}
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []
        patterns = [leaf for leaf in self._leaves if isinstance(leaf, LinePattern)]
        self._readers = {leaf: self._reader(leaf) for leaf in patterns}

    def _reader(self, leaf: LinePattern) -> Reader:
        try:
            return self._senses.lines(self._rank, leaf.std)
        except StreamNotCaptured as error:
            raise StreamNotCaptured(f"{leaf} can't be waited for: {error}") from None

    @property
    def _leaves(self) -> tuple[Condition, ...]:
        return tuple(dict.fromkeys(self._condition.leaves()))

    def begin(self) -> None:
        """Look for everything from now on; the rank has been started."""
        loop = asyncio.get_running_loop()
        finders: dict[Condition, Coroutine[Any, Any, None]] = {}
        for leaf in self._leaves:
            match leaf:
                case LinePattern():
                    finders[leaf] = self._read(leaf, self._readers[leaf])
                case TcpPort() | HttpGet() | Asked():
                    finders[leaf] = self._ask_until_yes(leaf)
        self._tasks = [loop.create_task(finder, name=f"rank {self._rank}: {leaf}") for leaf, finder in finders.items()]

    def notified(self) -> None:
        """Learn that the rank has said READY=1."""
        self._is_met(Notify())

    def missing(self) -> str:
        """What is still to become true, in words."""
        return self._condition.missing(self._met, self._told)

    def _is_met(self, leaf: Condition) -> None:
        self._met.add(leaf)
        if not self._over and self._condition.is_met(self._met):
            self.stop()
            self._on_ready()

    async def _read(self, leaf: LinePattern, reader: Reader) -> None:
        async for line in reader:
            if (match := leaf.compiled.search(line.text)) is not None:
                self.captures |= leaf.captured(match)
                break
        else:
            return  # it was closed
        reader.close_nowait()
        self._is_met(leaf)

    async def _ask_until_yes(self, leaf: TcpPort | HttpGet | Asked) -> None:
        while answer := await self._ask(leaf):
            self._told[leaf] = answer
            await asyncio.sleep(self._interval)
        self._is_met(leaf)

    async def _ask(self, leaf: TcpPort | HttpGet | Asked) -> str:
        match leaf:
            case TcpPort():
                return await ask_port(leaf, self._senses.threads)
            case HttpGet():
                return await ask_server(leaf, self._senses.threads)
        try:
            return "" if await self._senses.ask(leaf.question, self._rank) else "no"
        except Exception as error:  # noqa: BLE001  # the user's code: a client that finds no server yet raises anything
            return f"{type(error).__name__}: {why(error)}"
        except asyncio.CancelledError:
            if self._over:
                raise
            return "what it waited for was cancelled"  # by itself: nobody has told us to end

    def stop(self) -> None:
        """Look no more; idempotent, also while no loop runs."""
        self._over = True
        for reader in self._readers.values():
            reader.close_nowait()
        for task in self._tasks:
            task.cancel()

    async def end(self) -> None:
        """Look no more, and wait until nobody does; idempotent, bounded."""
        self.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_WITHIN)
