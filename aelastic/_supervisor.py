"""Several runs under one roof, as OTP's supervisors keep theirs.

Theory of operation: a child is a run, or a supervisor below. It falls when it has come down by itself and is to be
started again; falls are taken one after the other. The children that the strategy names are brought down in reverse
order, and up again in order, each when the one before it is ready. If one falls meanwhile, the rest waits for its turn.
When more falls come than the intensity allows, that is the supervisor's own fall: it is told to the one above, or ends
everything and the block that entered it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, final, get_args

from ._bus import Events, Stream
from ._context import PContext
from ._failures import SupervisorFailed
from ._kept import Child, KeptRun
from ._policies import check_seconds
from ._restart import Intensity, Strategy, affected
from ._run import Run
from ._start import start_processes
from ._tasks import ServiceTask, outlast, service


@final
class Supervisor:
    """Keeps runs: starts them in order, restarts them together, stops them in reverse.

    A run falls when its own `RestartPolicy` has given it up (at once, without one): it has failed, or has ended at all
    with `when="always"`. Its restart is a further attempt of the same run: context, events and logs go on, and its own
    budget begins anew. A run that has succeeded, or that its context closed, is left alone from then on.

    When more restarts are needed than `intensity` within `period`, everything is ended in reverse order, the body of
    the `async with` is cancelled, and `SupervisorFailed` raised in its place.

    Args:
        strategy: what restarts when a run has fallen: `"one_for_one"` (default) that run, `"one_for_all"` all of them,
            `"rest_for_one"` that one and those that were started after it.
        intensity: how many restarts there may be within `period`. Default 5; 0 allows none.
        period: seconds, a sliding window. Default 60.

    Raises:
        SupervisorFailed: (at the end of the block) if the intensity was spent.
        TypeError: if a number is none.
        ValueError: if a value is unknown or can't be meant.

    Source: Erlang/OTP `supervisor`.

    Example:
        >>> async def main():
        ...     async with Supervisor(strategy="rest_for_one") as sup:
        ...         db = await sup.start("db", "true", {0: ()})
        ...         web = await sup.start("web", "true", {0: (), 1: ()}, after=db)
        ...         await sup.wait()
        ...         return (await web.wait()).outcome
        >>> asyncio.run(main())
        'succeeded'
    """

    def __init__(self, *, strategy: Strategy = "one_for_one", intensity: int = 5, period: float = 60.0) -> None:
        if strategy not in get_args(Strategy):
            raise ValueError(f"Supervisor: strategy must be one of {', '.join(get_args(Strategy))}, not {strategy!r}")
        if isinstance(intensity, bool) or not isinstance(intensity, int):
            raise TypeError(f"Supervisor: intensity must be a whole number, not {intensity!r}")
        if intensity < 0:
            raise ValueError(f"Supervisor: intensity must be 0 or more, not {intensity}")
        if not check_seconds("Supervisor: period", period):
            raise ValueError("Supervisor: period must be longer than 0 seconds, or no restart would ever count")
        self.name = "supervisor"
        self._strategy = strategy
        self._limits = (intensity, float(period))
        self._intensity = Intensity(*self._limits)
        self._stream = Stream()
        self._lock = asyncio.Lock()
        """Held by who brings children down or up."""
        self._falls: asyncio.Queue[Child | None] = asyncio.Queue()
        self._children: list[Child] = []
        self._left: list[Child] = []
        """Those that an interrupted restart has left down."""
        self._culprit: Child | None = None
        """Whose fall was the supervisor's own."""
        self._tell_above: Callable[[Child], None] | None = None
        """Tells the supervisor above of a fall of this one."""
        self._task: ServiceTask[None] | None = None
        self._closing: ServiceTask[None] | None = None
        self._ending = False
        self._body: asyncio.Task[Any] | None = None
        self._cancellations = 0
        self._error: SupervisorFailed | None = None

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is not None:
            raise RuntimeError("this supervisor was entered already: make another one")
        self._hurry: asyncio.Future[None] = loop.create_future()
        """Done when a restart under way shall wait for nobody."""
        self._down: asyncio.Future[None] = loop.create_future()
        self._task = service(self._supervise(), name=self.name, on_cancel=self._leave)

    async def start(self, *args: Any, after: PContext | Iterable[PContext] = (), **options: Any) -> PContext:
        """Start a run and keep it.

        Args:
            args: as for `start_processes`.
            after: contexts that are waited for until they are ready.
            options: as for `start_processes`.

        Returns:
            The context of the started run. It goes on over all restarts, and ends with the run.

        Raises:
            RuntimeError: if the supervisor was not entered, or is ending.
            Exception: as `start_processes` does; what could not be started is not kept.
        """
        self._check_office()
        for context in (after,) if isinstance(after, PContext) else tuple(after):
            await context.wait_ready()
        self._check_office()
        run, context = start_processes(*args, **options).begin(self._stream)
        await run.wait_started()
        if self._ending:
            await context.close()
            self._check_office()
        self._children.append(KeptRun(run, self._fell, self._gone))
        return context

    async def nest(self, *, strategy: Strategy = "one_for_one", intensity: int = 5, period: float = 60.0) -> Supervisor:
        """Keep another supervisor below this one: when its intensity is spent, that is one fall here.

        Its children are restarted with it, and its events go into this one's stream too. It ends with this one.

        Args:
            strategy: and the others: as for `Supervisor`.
        """
        self._check_office()
        below = Supervisor(strategy=strategy, intensity=intensity, period=period)
        below._tell_above, below._stream.onward = self._fell, self._stream
        below._begin()
        self._children.append(below)
        return below

    def _check_office(self) -> None:
        if self._task is None:
            raise RuntimeError("the supervisor was not entered: use 'async with Supervisor(...) as sup'")
        if self._ending:
            raise RuntimeError("the supervisor is ending, and starts nothing any more")

    def events(self, *, replay: bool = True) -> Events:
        """Subscribe to the events of all runs, in the order in which they come; ends with the supervisor.

        Args:
            replay: whether the events that have already happened come first; the newest 10,000 are kept.
        """
        return self._stream.subscribe(replay=replay)

    async def wait(self) -> None:
        """Wait until every run is over, those included that are started meanwhile.

        Cancellation: stops only the waiting.
        """
        while ends := [run.finished for run in self.runs()]:
            await asyncio.wait(ends)

    async def close(self) -> None:
        """End all runs, the newest first, and wait until nothing of them is left. Idempotent.

        Cancellation: held off until then, then raised.
        """
        if self._task is not None:
            await outlast(self._close(""))

    def _close(self, gave_up: str) -> ServiceTask[None]:
        if self._closing is None:
            self._closing = service(self._end(gave_up), name=f"end of {self.name}")
        self._leave()
        return self._closing

    def _leave(self) -> None:
        """Restart nothing any more; the runs end by themselves where a loop ends."""
        self._ending = True
        self._let_wait_nobody()
        self._falls.put_nowait(None)

    def _let_wait_nobody(self) -> None:
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def _end(self, gave_up: str) -> None:
        for child in reversed(self._children[:]):
            await child.end("its supervisor ends", gave_up=gave_up if child is self._culprit else "")
        if self._task is not None:
            await asyncio.wait({self._task})
        if not self._down.done():
            self._down.set_result(None)
        self._stream.close()

    def _fell(self, child: Child) -> None:
        self._falls.put_nowait(child)

    def _gone(self, child: Child) -> None:
        if child is not self._culprit:  # which is looked for when everything ends
            self._children.remove(child)

    async def _supervise(self) -> None:
        while (child := await self._falls.get()) is not None and not self._ending:
            if not child.down.done():
                continue  # it was restarted with another one meanwhile
            if child.may_rise and self._intensity.has_room(now := asyncio.get_running_loop().time()):
                self._intensity.spend(now)
                await self._restart(child)
            else:
                await self._fall(child)

    async def _restart(self, fallen: Child) -> None:
        why = fallen.describe()
        async with self._lock:
            chosen = affected(self._strategy, self._children, fallen)
            for child in reversed(chosen):
                await child.bring_down(why)
            await self._raise([child for child in self._children if child in chosen or child in self._left], why)

    async def _raise(self, children: Sequence[Child], why: str, *, ready: bool = False) -> bool:
        """Bring children up in order; whether all went well."""
        self._left = list(children)
        while self._left:
            child, *rest = self._left
            if self._hurry.done() or not await child.bring_up(why, ready=ready or bool(rest), hurry=self._hurry):
                return False
            self._left = rest
        return True

    async def _fall(self, child: Child) -> None:
        """Be at the end of one's means."""
        self._culprit = child
        why = f"{self._intensity} of its supervisor were not enough" if child.may_rise else "it can't be started again"
        if self._tell_above is not None:
            await self.bring_down(why)
            self._tell_above(self)
            return
        self._error = SupervisorFailed(f"the supervisor gave up: {child.describe()}; {why}", child.name)
        self._close(why)
        if self._body is not None:
            self._body.cancel()

    # As the entrance of a block

    async def __aenter__(self) -> Self:
        self._begin()
        self._body = asyncio.current_task()
        self._cancellations = self._body.cancelling() if self._body is not None else 0
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        body, self._body = self._body, None
        cancelled = error if isinstance(error, asyncio.CancelledError) else None
        try:
            await self.close()
            await asyncio.sleep(0)  # where the body ended just as it was cancelled, the cancellation comes here
        except asyncio.CancelledError as another:
            cancelled = another
        if self._error is None:
            if cancelled is not None:
                raise cancelled
            return
        self._error.__cause__ = None if self._culprit is None else self._culprit.cause()
        by_others = body is asyncio.current_task() and body is not None and body.uncancel() > self._cancellations
        if by_others and cancelled is not None:
            raise cancelled
        if error is not None and error is not cancelled and not isinstance(error, asyncio.CancelledError):
            error.add_note(str(self._error))
            return
        raise self._error

    # As the child of another supervisor

    @property
    def down(self) -> asyncio.Future[None]:
        """Done when nothing runs below it, and the one above is to decide."""
        return self._down

    @property
    def may_rise(self) -> bool:
        """Whether everything below it can be started again."""
        return not self._ending and all(child.may_rise for child in self._children)

    @property
    def is_ready(self) -> bool:
        """Whether everything below it is ready."""
        return all(child.is_ready for child in self._children)

    def describe(self) -> str:
        """How it fell, a sentence."""
        return f"a supervisor below gave up: {self._culprit.describe() if self._culprit else 'it was brought down'}"

    def cause(self) -> BaseException | None:
        """What made it fall."""
        return None if self._culprit is None else self._culprit.cause()

    async def bring_down(self, why: str) -> None:
        """Stop everything, to be started again."""
        self._let_wait_nobody()
        async with self._lock:
            for child in reversed(self._children[:]):
                await child.bring_down(why)
            if not self._down.done():
                self._down.set_result(None)

    async def bring_up(self, why: str, *, ready: bool, hurry: asyncio.Future[None]) -> bool:
        """Start everything again in order, with a new intensity."""
        if self._down.done() and not self._ending:
            await self._rise(why, hurry)
        while ready and not (self.is_ready or self._down.done() or hurry.done()):
            await self._stream.news(self._down, hurry)
        return not (self._down.done() or hurry.done())

    async def _rise(self, why: str, hurry: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        async with self._lock:
            self._down, self._hurry = loop.create_future(), loop.create_future()
            self._intensity, self._culprit = Intensity(*self._limits), None
            hurry.add_done_callback(self._hurried)
            await self._raise(self._children[:], why)
            hurry.remove_done_callback(self._hurried)

    def _hurried(self, _hurry: asyncio.Future[None]) -> None:
        self._let_wait_nobody()

    async def end(self, why: str, *, gave_up: str) -> None:  # noqa: ARG002  # a child's signature
        """Stop everything for good."""
        await asyncio.wait({self._close(gave_up)})

    def runs(self) -> Iterator[Run]:
        """The runs below it that are not over."""
        for child in self._children:
            yield from child.runs()
