"""A run as a supervisor's child, and what any child is to its supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol, final

from ._failures import ChildFailedError
from ._readiness import is_ready
from ._results import RunProcsResult
from ._run import Run


class Child(Protocol):
    """What a supervisor keeps: a run, or a supervisor below it."""

    name: str

    @property
    def down(self) -> asyncio.Future[None]:
        """Done when nothing of it runs, and its supervisor is to decide; another one after each restart."""

    @property
    def may_rise(self) -> bool:
        """Whether it can be started again at all."""

    @property
    def is_ready(self) -> bool:
        """Whether all of it is ready, or over."""

    def describe(self) -> str:
        """How it fell, a sentence."""

    def cause(self) -> BaseException | None:
        """Its failure as an error."""

    async def bring_down(self, why: str) -> None:
        """Stop it, to be started again; returns when nothing of it is left."""

    async def bring_up(self, why: str, *, ready: bool, hurry: asyncio.Future[None]) -> bool:
        """Start it again, if it is down.

        Args:
            ready: whether to wait until it is ready.
            hurry: ends the waiting when it is done.

        Returns:
            False when it is down again, or the waiting was ended.
        """

    async def end(self, why: str, *, gave_up: str) -> None:
        """Stop it for good.

        Args:
            gave_up: why there is no restart although it fell, for its result; `""` where it didn't fall.
        """

    def runs(self) -> Iterator[Run]:
        """The runs in it that are not over."""


@final
class KeptRun:
    """A run that has started.

    Args:
        fell: called each time it is to be started again.
        gone: called when it is over.
    """

    def __init__(self, run: Run, fell: Callable[[Child], None], gone: Callable[[Child], None]) -> None:
        self.name = run.spec.name
        self._run = run
        self._fell = fell
        self._gone = gone
        self._recalled = False
        run.finished.add_done_callback(self._finished)
        self._attend()

    def _attend(self) -> None:
        self._run.down.add_done_callback(self._came_down)

    def _came_down(self, _down: asyncio.Future[None]) -> None:
        if not self._run.finished.done() and not self._recalled:
            self._fell(self)

    def _finished(self, finished: asyncio.Future[RunProcsResult]) -> None:
        if finished.exception() is None:
            self._gone(self)
        else:
            self._fell(self)

    @property
    def down(self) -> asyncio.Future[None]:
        return self._run.down

    @property
    def may_rise(self) -> bool:
        return not self._run.finished.done() and not self._run.round.survived

    @property
    def is_ready(self) -> bool:
        return self._run.finished.done() or is_ready(self._run)

    def describe(self) -> str:
        root = self._run.round.root_cause
        return f"{self.name}: {root.describe() if root else 'it has ended'}"

    def cause(self) -> BaseException | None:
        finished = self._run.finished
        if finished.done() and (broken := finished.exception()) is not None:
            return broken
        result = self._run.result
        if result is None or not result.is_failed():
            return None
        return ChildFailedError(
            self.name, result.failures, survivors=result.survivors, victims=result.victims, gave_up=result.gave_up
        )

    async def bring_down(self, why: str) -> None:
        if not self.down.done():
            self._recalled = True
            self._run.recall(why)
            await asyncio.wait({self.down})

    async def bring_up(self, why: str, *, ready: bool, hurry: asyncio.Future[None]) -> bool:
        run = self._run
        if run.down.done() and self.may_rise:
            self._recalled = False
            run.go_on(why)
            self._attend()
        while ready and not (self.is_ready or run.down.done() or hurry.done()):
            await run.bus.news(run.down, hurry)
        return run.finished.done() or not (run.down.done() or hurry.done())

    async def end(self, why: str, *, gave_up: str) -> None:
        if gave_up:
            self._run.give_up(gave_up)
        else:
            self._run.stop(None, why)
        await asyncio.wait({self._run.finished})

    def runs(self) -> Iterator[Run]:
        if not self._run.finished.done():
            yield self._run
