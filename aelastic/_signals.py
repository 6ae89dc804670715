"""Signals of the host, passed on to a run while a block lasts: `forward_signals`.

Nothing is installed unless a block asks for it, and what was there is back after the last one. The stop itself is the
run's own `close`.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Collection
from types import FrameType, TracebackType
from typing import Any, ClassVar, Protocol, Self, final

from ._exit import signal_name
from ._failures import SignalException
from ._policies import check_signal
from ._tasks import ServiceTask, outlast, service

USUAL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Closable(Protocol):
    """What is stopped when a signal comes: a `PContext`."""

    name: str

    async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
        """Stop it with that signal, and return when nothing of it is left."""


def forward_signals(ctx: Closable, signals: Collection[int] = USUAL) -> Forwarding:
    """Stop a run with the signal that its host receives while the block lasts, and raise `SignalException` from it.

    The first signal cancels the body and begins the stop, with this signal in place of the first step's; the block is
    left when the run has ended. Another signal meanwhile goes straight to SIGKILL; the wait for the end stays. A
    signal that is ignored (`nohup`) stays ignored. Blocks may be nested and may overlap in several tasks: a signal
    reaches the runs of all of them. A handler that the host gave its loop for the same signal
    (`loop.add_signal_handler`) is called as well; one that was set by `signal.signal`, such as the one that
    `asyncio.run` has for Ctrl-C, is not. Both are back afterwards.

    Args:
        ctx: a started run. Leaving the block without a signal leaves it running.
        signals: which ones.

    Raises:
        RuntimeError: (when entered) outside the main thread, where Python gets no signals, or if a signal has an
            action that was not set from Python and so could not be put back.
        ValueError: if one is no signal, or none that can be caught.
        SignalException: (when left) if a signal came; an exception of the body is its cause.

    Cancellation: held off while the run is stopped, then raised in place of `SignalException`.

    Source: `SignalException` and its use in `torch.distributed.elastic.multiprocessing`.

    Example:
        >>> import asyncio, os, signal
        >>> from aelastic import SignalException, start_processes
        >>> async def main():
        ...     async with start_processes("nap", "sleep", {0: "60"}) as ctx:
        ...         async with forward_signals(ctx):
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...             await ctx.wait()
        >>> try:
        ...     asyncio.run(main())
        ... except SignalException as error:
        ...     print(error)
        nap was stopped by SIGTERM
    """
    return Forwarding(ctx, tuple(signals))


@final
class Forwarding:
    """One block of `forward_signals`."""

    def __init__(self, ctx: Closable, signals: tuple[int, ...]) -> None:
        self._ctx = ctx
        self._signals = signals
        self._caught: list[int] = []
        self._stopping: list[ServiceTask[None]] = []
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cancelling = 0
        self._cancelled = False
        self._left = False

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("this forward_signals block was entered already: make another one")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"{self._ctx.name}: forward_signals works in the main thread only, where Python gets its signals;"
                " use it there, or call close() from a handler of your own"
            )
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        try:
            for number in self._signals:
                _Care.begin(check_signal(f"{self._ctx.name}: forward_signals", number), self)
        except BaseException:
            _Care.end(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if not self._caught:
            _Care.end(self)
        if not self._caught:  # asked again: a signal may have come until the line above
            return
        try:
            self._heed()
            failed = await self._ended(task)
        finally:
            self._left = True
            _Care.end(self)
        first = self._caught[0]
        cause = failed if isinstance(error, asyncio.CancelledError) else error or failed
        raise SignalException(f"{self._ctx.name} was stopped by {signal_name(first)}", first) from cause

    async def _ended(self, task: asyncio.Task[Any] | None) -> BaseException | None:
        """Wait for the end of the run; what its close raised, if it did.

        Raises:
            asyncio.CancelledError: if anybody else cancelled the task as well.
        """
        interrupted: asyncio.CancelledError | None = None
        failed: BaseException | None = None
        for stopping in self._stopping:  # grows while it is gone through
            try:
                await outlast(stopping)
            except asyncio.CancelledError as cancelled:
                interrupted = cancelled
            except Exception as raised:  # noqa: BLE001  # told as the cause: the signal is what ended the block
                failed = raised
        left = 0 if task is None else (task.uncancel() if self._cancelled else task.cancelling())
        if left > self._cancelling:
            raise interrupted or asyncio.CancelledError
        return failed

    def arrived(self, number: int) -> None:
        """Take note of a signal, in the middle of whatever the main thread does."""
        self._caught.append(number)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._heed)

    def _heed(self) -> None:
        """Stop the run for each signal that came, and interrupt the body at the first."""
        for number in [] if self._left else self._caught[len(self._stopping) :]:
            step = signal.SIGKILL if self._stopping else number
            name = f"stop {self._ctx.name} by {signal_name(number)}"
            self._stopping.append(service(self._ctx.close(death_sig=step), name=name))
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()


@final
class _Care:
    """One signal in the care of one or more blocks: what it did before, and whom it reaches now."""

    taken: ClassVar[dict[int, _Care]] = {}
    """By signal; only the main thread comes here."""

    def __init__(self, number: int) -> None:
        before = signal.getsignal(number)
        if before is None:
            raise RuntimeError(
                f"{signal_name(number)} has an action that was not set from Python and could not be put back:"
                " leave it out of forward_signals"
            )
        self.blocks: list[Forwarding] = []
        self._number = number
        self._before = before
        try:
            signal.signal(number, self._arrived)
        except OSError as error:
            raise ValueError(f"{signal_name(number)} can't be forwarded: no process can catch it") from error

    @classmethod
    def begin(cls, number: int, block: Forwarding) -> None:
        """Let a signal reach a block, unless it is ignored."""
        if number in cls.taken:
            care = cls.taken[number]
        elif signal.getsignal(number) == signal.SIG_IGN:
            return
        else:
            care = cls.taken[number] = cls(number)
        care.blocks.append(block)

    @classmethod
    def end(cls, block: Forwarding) -> None:
        """Take a block out everywhere; the last one of a signal puts the former action back."""
        for number, care in list(cls.taken.items()):
            care.blocks = [each for each in care.blocks if each is not block]
            if not care.blocks:
                del cls.taken[number]
                care.restore()

    def restore(self) -> None:
        """Put the former action back, unless the host has set another meanwhile."""
        if signal.getsignal(self._number) == self._arrived:
            signal.signal(self._number, self._before)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        for block in self.blocks:
            block.arrived(number)
