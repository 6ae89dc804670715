"""Tasks that only their owner ends, and waiting that outlasts cancellation.

A run must finish its teardown although `asyncio.run` cancels every task at its end, and although a caller is
cancelled again and again. Neither policy nor I/O lives here.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any, TypeVar, final

import anyio

T = TypeVar("T")
BACKEND = "anyio._backends._asyncio"
"""What a scope of anyio's needs. While nobody has loaded it none is entered, and loading it takes 14 ms of the loop."""


@final
class ServiceTask(asyncio.Task[T]):
    """A task into which no cancellation is thrown: `cancel()` asks its owner instead.

    A native `Task.cancel()` breaks even a shield when it comes twice, and `asyncio.run` cancels inner tasks and
    shields alike, then waits for all of them. So the question is passed to `on_cancel`, and whoever cancelled waits
    until the service has ended in its own time. Inside a service nothing may rely on `Task.cancel`: no
    `asyncio.timeout`, no cancel scope; use `asyncio.wait(..., timeout=...)`.
    """

    on_cancel: Callable[[], None] | None = None

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002  # asyncio's signature
        """Pass the request on in the loop's next turn; always False, because nothing is thrown into the task.

        `asyncio.run` cancels while no loop is running, and then turns it again.
        """
        loop = self.get_loop()
        if not (self.done() or loop.is_closed()):
            loop.call_soon(self._ask)
        return False

    def _ask(self) -> None:
        if self.on_cancel is not None and not self.done():
            self.on_cancel()


def service(coro: Coroutine[Any, Any, T], *, name: str, on_cancel: Callable[[], None] | None = None) -> ServiceTask[T]:
    """Start a service in the running loop.

    Args:
        coro: what to run; its owner has a way of its own to end it.
        name: shown in asyncio's debug output.
        on_cancel: called in the loop after anyone has cancelled the task.
    """
    task = ServiceTask(coro, loop=asyncio.get_running_loop(), name=name)
    task.on_cancel = on_cancel
    return task


async def outlast(
    future: asyncio.Future[T],
    *,
    on_cancel: Callable[[], None] | None = None,
    end: asyncio.Future[Any] | None = None,
) -> T:
    """Wait for a bounded future however often the caller is cancelled.

    Args:
        future: never cancelled from here.
        on_cancel: called at the first cancellation; it makes the future end soon. Without it the wait is shielded
            from the start, since ending is already under way.
        end: what a cancelled caller waits for in place of `future`, which may be done as the cancellation comes.

    Returns:
        The future's result, if nobody cancelled the caller.

    Cancellation:
        Raised after the future (or `end`) is done; what that ended with is then left aside.
    """
    cancelled = await _until_done(future) if on_cancel is not None else None
    awaited: asyncio.Future[Any] = future
    if cancelled is not None and on_cancel is not None:
        on_cancel()
        awaited = end or future
    # anyio's shield holds off anyio's scopes (they would cancel us on every turn of the loop); a native cancel
    # goes through it, so it is caught and kept.
    with anyio.CancelScope(shield=True) if BACKEND in sys.modules else nullcontext():
        while not awaited.done():
            cancelled = await _until_done(awaited) or cancelled
    if cancelled is not None:
        for each in (future, awaited):
            if each.done() and not each.cancelled():
                each.exception()  # seen: the cancellation is what the caller is told
        raise cancelled
    return future.result()


async def first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait until one of these is done, a turn of the loop at the least; none is cancelled.

    Args:
        timeout: seconds at the most; None waits for ever.
    """
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    timer = None if timeout is None else loop.call_later(timeout, _wake, woken)
    wake = functools.partial(_wake, woken)
    for future in futures:
        future.add_done_callback(wake)
    try:
        await woken  # a third of what asyncio.wait takes, which every worker would pay at its start
    finally:
        for future in futures:
            future.remove_done_callback(wake)
        if timer is not None:
            timer.cancel()


def _wake(woken: asyncio.Future[None], _done: object = None) -> None:
    if not woken.done():
        woken.set_result(None)


async def _until_done(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    try:
        await asyncio.wait({future})
    except asyncio.CancelledError as error:
        return error
    return None
