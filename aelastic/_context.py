"""The caller's handle on a run: `PContext`, and `Starting`, which is one that has not begun.

A context holds nothing of its own: every question goes to the run. Cancelling a wait stops the waiting only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Generator
from types import TracebackType
from typing import Any, Self, final, overload

from ._bus import Events, Stream
from ._logs import Lines
from ._policies import check_signal, check_timeout
from ._readiness import wait_ready
from ._results import LineMatch, RunProcsResult, Usage
from ._run import Run
from ._std import Std
from ._tasks import outlast


class PContext:
    """A started run. Get one from `start_processes`.

    Use it as an async context manager, and it is closed on the way out, whatever happens in the body.

    Source: `torch.distributed.elastic.multiprocessing.PContext`, made to be awaited.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.name = run.spec.name
        self.nprocs = run.spec.nprocs
        self.run_id = run.run_id

    def __repr__(self) -> str:
        state = "running" if self.result is None else self.result.outcome
        return f"<{type(self).__name__} {self.name!r} of {self.nprocs} ranks, {state}>"

    @property
    def log_dir(self) -> str:
        """Directory of this run; `""` when logs are off."""
        return self._run.log_dir

    @property
    def attempt(self) -> int:
        """Number of the current attempt, 0 for the first."""
        return self._run.bus.attempt

    @property
    def result(self) -> RunProcsResult | None:
        """How the run ended; None while it runs."""
        return self._run.result

    @property
    def stdouts(self) -> dict[int, str]:
        """Paths by rank, of the current attempt; `""` where the stream has no file."""
        return self._run.round.stdouts

    @property
    def stderrs(self) -> dict[int, str]:
        """Paths by rank, of the current attempt; `""` where the stream has no file."""
        return self._run.round.stderrs

    @property
    def error_files(self) -> dict[int, str]:
        """Paths by rank, of the current attempt; `""` where error files are off."""
        return self._run.round.error_files

    @property
    def ready_captures(self) -> dict[int, dict[str, str]]:
        """By rank, what `LinePattern` captured in the current attempt; ranks without any are left out."""
        return self._run.round.ready_captures()

    def pids(self) -> dict[int, int]:
        """Process ids by rank, of the ranks whose process is running."""
        return self._run.round.pids()

    @overload
    async def wait(self, timeout: None = None) -> RunProcsResult: ...
    @overload
    async def wait(self, timeout: float) -> RunProcsResult | None: ...
    async def wait(self, timeout: float | None = None) -> RunProcsResult | None:
        """Wait for the result; any number of tasks may.

        Args:
            timeout: seconds; 0 asks without waiting; None or a negative number waits for ever.

        Returns:
            1. The result: every rank has succeeded, or one has failed and the rest were stopped, or it was closed.
            2. None when the time is over.

        Raises:
            Exception: if the supervision itself broke, which is a bug of this library.

        Cancellation: stops only the waiting.
        """
        finished = self._run.finished
        seconds = check_timeout(f"{self.name}: timeout", timeout)
        if seconds != 0:
            await asyncio.wait({finished}, timeout=seconds)
        return finished.result() if finished.done() else None

    def events(self, *, replay: bool = True) -> Events:
        """Subscribe to what happens.

        Args:
            replay: whether the events that have already happened come first.

        Returns:
            An async iterator that ends after `RunFinished`. Every subscriber gets every event, in order; one that
            falls 10,000 events behind misses the oldest, which `Event.seq` shows.
        """
        return self._run.bus.subscribe(replay=replay)

    def lines(
        self,
        *,
        ranks: Collection[int] | None = None,
        std: Std = Std.ALL,
        lossless: bool = False,
        partials: bool = False,
        replay: bool = True,
    ) -> Lines:
        """Subscribe to the lines of the streams that pass through the supervisor (tee, capture, filters).

        Args:
            ranks: which ranks; None for all.
            std: which streams.
            lossless: hold the worker back rather than lose a line, until the subscription is closed or dropped.
            partials: show a line that stays unfinished for 0.2 s, and again when it is whole, under the same number.
            replay: whether the tail kept in memory comes first.

        Raises:
            RankMappingError: if a rank is none of this run.
            StreamNotCaptured: if none of the chosen streams is piped, or `OUT` or `ERR` was asked for and is not.
        """
        return self._run.hub.lines(
            ranks=self._ranks("lines(ranks=)", ranks), std=std, lossless=lossless, partials=partials, replay=replay
        )

    async def wait_for_line(
        self,
        pattern: str | re.Pattern[str],
        *,
        rank: int | None = None,
        std: Std = Std.ALL,
        timeout: float | None = None,
    ) -> LineMatch:
        """Wait until a line matches, the kept tail and unfinished lines (prompts) included.

        Args:
            pattern: searched for with `re.search`.
            rank: whose lines; None for any.
            timeout: seconds; None waits until the streams end.

        Raises:
            TimeoutError: at the timeout, with the tail.
            LineNotSeen: if the streams end first, with the tail.
            StreamNotCaptured: as `lines`.
        """
        ranks = self._ranks("wait_for_line(rank=)", None if rank is None else [rank])
        return await self._run.hub.wait_for_line(pattern, ranks=ranks, std=std, timeout=timeout)

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until every rank is ready, as `HealthPolicy.ready` says; at once where that is None.

        A rank that was ready counts until it fails. A run that may still restart is waited for.

        Args:
            timeout: seconds; None waits as long as it may still become true.

        Raises:
            TimeoutError: at the timeout, with what is missing; nobody is harmed.
            WorkerNotReady: if a rank ended first, or was not ready within `HealthPolicy.ready_timeout`.

        Cancellation: stops only the waiting.
        """
        await wait_ready(self._run, timeout)

    async def dump_stacks(self, *, ranks: Collection[int] | None = None) -> dict[int, str]:
        """The stacks of all threads of all Python processes of each rank, as text.

        Functions and programs that use `record` show them even while C code holds the interpreter; other Python
        programs are read by py-spy, where it is installed and allowed. Where there are none, the text says why.

        Args:
            ranks: which ranks; None for those that are running.

        Raises:
            RankMappingError: if a rank is none of this run.
        """
        chosen = self.pids() if ranks is None else self._ranks("dump_stacks(ranks=)", ranks)
        return {} if self._run.ward is None else await self._run.ward.dump_stacks(tuple(chosen))

    async def usage(self) -> dict[int, Usage]:
        """What each running rank's tree uses now; ranks that have ended are left out."""
        return {} if self._run.ward is None else await self._run.ward.meter.read()

    def send_signal(self, sig: int, *, ranks: Collection[int] | None = None) -> None:
        """Signal the process group of each rank; ranks that have ended are left out silently.

        Args:
            ranks: which ranks; None for all.

        Raises:
            RankMappingError: if a rank is none of this run.
            ValueError: if there is no such signal.

        Publishes:
            WorkerSignaled: for each group that was reached.
        """
        number = check_signal("send_signal: sig", sig)
        self._run.round.send_signal(number, self._ranks("send_signal(ranks=)", ranks))

    async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
        """Stop the run and wait until nothing of it is left.

        Idempotent; may be called from several tasks. It takes at most the stop policy's steps and its drain.

        Args:
            death_sig: in place of the first step's signal.
            timeout: seconds after the first signal, in place of the first step's. A later close with arguments
                replaces the steps that are left.

        Cancellation: held off until the run has ended, then raised.
        """
        given = death_sig is not None or timeout is not None
        steps = self._run.spec.stop.overridden(death_sig, timeout) if given else None
        self._run.stop(steps, "its context was closed")
        await outlast(self._run.finished)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _ranks(self, what: str, ranks: Collection[int] | None) -> tuple[int, ...]:
        return self._run.spec.ranks(what, ranks)


@final
class SubprocessContext(PContext):
    """A run of a command. Source: torch's class of the same name."""


@final
class MultiprocessContext(PContext):
    """A run of a function. Source: torch's class of the same name."""


@final
class Starting:
    """A run that has not begun: await it, or enter it with `async with`. It can be used once.

    Cancellation: a cancelled start takes down what it had started, and raises then.
    """

    def __init__(self, make: Callable[[], Run]) -> None:
        self._make: Callable[[], Run] | None = make
        self._context: PContext | None = None

    def __await__(self) -> Generator[Any, None, PContext]:
        return self._open().__await__()

    async def _open(self) -> PContext:
        run, context = self.begin()
        await run.wait_started()
        return context

    def begin(self, onward: Stream | None = None) -> tuple[Run, PContext]:
        """Make the run and begin it.

        Args:
            onward: of a supervisor, which gets the run's events and decides what follows when it has come down.
        """
        if self._make is None:
            raise RuntimeError("this start was used already: call start_processes again for another run")
        make, self._make = self._make, None
        run = make()
        run.kept, run.bus.onward = onward is not None, onward
        context = SubprocessContext(run) if run.spec.is_command else MultiprocessContext(run)
        run.context = context
        run.begin()
        return run, context

    async def __aenter__(self) -> PContext:
        self._context = await self._open()
        return self._context

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context is not None:
            await self._context.close()
