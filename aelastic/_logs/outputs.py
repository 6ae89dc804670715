"""All streams of one attempt: opened before the workers, read while they run, drained after them, closed for certain.

The gang owns an `Outputs`; what it opens it closes.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import final

from aelastic._std import STREAMS, Std
from aelastic._tasks import service

from .console import Console
from .files import FileSink
from .hub import HubStream, LineHub
from .lines import Matching
from .logfile import open_for_append
from .pipes import OutputPipe, open_pipes
from .plan import DEFAULT_BUFFER_BYTES, Plans, Route, StreamPlan
from .prefix import DEFAULT_PREFIX, LinePrefix, Prefix
from .pump import Pump

TAIL_LINES = 40
"""Lines of `tail`."""
OPEN_WITHIN = 5.0
STREAMS_A_TURN = 32
"""So many are made ready in one turn of the loop, which takes a millisecond."""
Key = tuple[int, Std]


@final
class Outputs:
    """The streams of one attempt. Made by `open`; everything is the loop's."""

    def __init__(
        self,
        plans: Plans,
        *,
        name: str,
        prefixes: Mapping[int, str],
        prefix: LinePrefix,
        filters: Mapping[Std, Sequence[str] | None],
        executor: Executor,
        console: Console,
        on_lost: Callable[[int, Std, int, str], None],
        on_broken: Callable[[BaseException], None],
        buffer_bytes: int,
    ) -> None:
        self._plans = plans
        self._name = name
        self._given_prefixes = prefixes
        self._prefix = prefix
        self._host = os.uname().nodename
        self._prefixes: dict[Key, Prefix] = {}
        self._filters = filters
        self._executor = executor
        self._console = console
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._buffer_bytes = buffer_bytes
        self._pipes: dict[Key, OutputPipe] = {}
        self._child_fds: dict[Key, int] = {}
        """Descriptors of files that workers write to themselves, until they are started."""
        self._sinks: dict[Key, FileSink] = {}
        self._filtered: dict[str, FileSink] = {}
        self._pumps: dict[Key, Pump] = {}
        self._openings: dict[int, asyncio.Future[None]] = {}
        self._closing: asyncio.Future[None] | None = None

    @classmethod
    async def open(
        cls,
        plans: Plans,
        *,
        name: str,
        attempt: int,
        prefixes: Mapping[int, str],
        filters: Mapping[Std, Sequence[str] | None],
        executor: Executor,
        console: Console,
        hub: LineHub,
        on_lost: Callable[[int, Std, int, str], None],
        on_broken: Callable[[BaseException], None],
        prefix: LinePrefix = DEFAULT_PREFIX,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    ) -> Outputs:
        """Make the pipes and begin to open the files, which goes on while the first workers are started.

        Args:
            plans: both streams of every rank of the attempt.
            prefixes: by rank, what stands before each line on the console and in the filter files, as it is.
            filters: by stream, the words of the filter file.
            executor: where everything runs that touches the disk.
            on_lost: called with rank, stream, bytes and reason when a file begins to lose output.
            on_broken: called with an error of our own; the streams it hit are at their end.
            prefix: of the ranks without one in `prefixes`.
            buffer_bytes: how much of a stream may wait for its file before its worker is held back.

        Raises:
            OSError: if descriptors run out; nothing is left open then.
            Exception: what a callable `prefix` raises.
        """
        outputs = cls(
            plans,
            name=name,
            prefixes=prefixes,
            prefix=prefix,
            filters=filters,
            executor=executor,
            console=console,
            on_lost=on_lost,
            on_broken=on_broken,
            buffer_bytes=buffer_bytes,
        )
        try:
            await outputs._prepare(hub, attempt)
        except BaseException:
            for pipe in outputs._pipes.values():
                pipe.close()
            raise
        return outputs

    async def _prepare(self, hub: LineHub, attempt: int) -> None:
        piped = [(rank, std) for rank, of_rank in self._plans.items() for std in STREAMS if self._is_piped(rank, std)]
        self._prefixes = {key: self._prefix_of(*key) for key in piped}
        try:
            pipes = open_pipes(len(piped))
        except OSError as error:
            why = f"{self._name}: no pipes for the output of its {len(self._plans)} ranks: {error.strerror}"
            raise OSError(error.errno, why) from None
        self._pipes = dict(zip(piped, pipes, strict=True))
        streams = hub.begin(self._plans, attempt)
        for count, key in enumerate(piped):
            if count % STREAMS_A_TURN == STREAMS_A_TURN - 1:
                await asyncio.sleep(0)
            self._pumps[key] = self._pump(key, streams[key])
        for sink in (*self._filtered.values(), *self._sinks.values()):
            sink.start()
        loop = asyncio.get_running_loop()
        for rank in self._plans:
            if any(self._plans[rank][std].route in (Route.FILE, Route.DISCARD) for std in STREAMS):
                self._openings[rank] = loop.run_in_executor(self._executor, self._open_files, rank)

    def _is_piped(self, rank: int, std: Std) -> bool:
        return self._plans[rank][std].route is Route.PIPE

    def _prefix_of(self, rank: int, std: Std) -> Prefix:
        if rank in self._given_prefixes:
            return Prefix.fixed(self._given_prefixes[rank])
        return Prefix.of(self._prefix, name=self._name, rank=rank, std=std, host=self._host, now_ns=time.time_ns())

    def _pump(self, key: Key, stream: HubStream) -> Pump:
        rank, std = key
        plan, prefix = self._plans[rank][std], self._prefixes[key]
        words = [word.encode("utf-8", "surrogatepass") for word in self._filters.get(std) or ()]
        if plan.path:
            self._sinks[key] = self._sink(plan)
        return Pump(
            self._pipes[key],
            stream,
            file=self._sinks.get(key),
            voice=self._console.voice(std, prefix, plan.path, rank=rank) if plan.console else None,
            matching=Matching(words, prefix.at(0)) if plan.filtered else None,
            prefix=prefix,
            filtered=self._filter_sink(plan) if plan.filtered else None,
            on_broken=self._on_broken,
        )

    def _sink(self, plan: StreamPlan) -> FileSink:
        return FileSink(
            plan.path,
            executor=self._executor,
            buffer_bytes=self._buffer_bytes,
            on_lost=functools.partial(self._on_lost, plan.rank, plan.std),
            on_room=functools.partial(self._has_room, (plan.rank, plan.std)),
            on_broken=self._on_broken,
            rotate=plan.rotate,
            timestamps=plan.timestamps,
        )

    def _filter_sink(self, plan: StreamPlan) -> FileSink:
        """The one filter file of a stream, which all ranks share."""
        if plan.filtered not in self._filtered:
            self._filtered[plan.filtered] = FileSink(
                plan.filtered,
                executor=self._executor,
                buffer_bytes=self._buffer_bytes,
                on_lost=functools.partial(self._on_lost, plan.rank, plan.std),
                on_room=self._look_again,
                on_broken=self._on_broken,
            )
        return self._filtered[plan.filtered]

    def _has_room(self, key: Key) -> None:
        self._pumps[key].look_again()

    def _look_again(self) -> None:
        for pump in self._pumps.values():
            pump.look_again()

    def _open_files(self, rank: int) -> None:
        """Open what one rank's worker writes to itself; blocks."""
        for std in STREAMS:
            plan = self._plans[rank][std]
            try:
                if plan.route is Route.FILE:
                    self._child_fds[rank, std] = open_for_append(plan.path, os.O_WRONLY, nonblocking=False)
                elif plan.route is Route.DISCARD:
                    self._child_fds[rank, std] = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self._not_opened(error, rank, std) from None

    def _not_opened(self, error: OSError, rank: int, std: Std) -> OSError:
        why = f"{self._name} rank {rank}: the file for its {std.label} can't be opened: {error.strerror}"
        return OSError(error.errno, why, self._plans[rank][std].path)

    async def opened(self) -> None:
        """Wait until the files of all piped streams are open; they are opened while the workers are started.

        Raises:
            OSError: if one can't be opened, naming it, run and rank.
        """
        sinks = (*self._filtered.values(), *self._sinks.values())
        if sinks:
            await asyncio.wait([sink.opened for sink in sinks])
        for path, sink in self._filtered.items():
            if (error := sink.opened.result()) is not None:
                why = f"{self._name}: the filter file can't be opened: {error.strerror}"
                raise OSError(error.errno, why, path) from error
        for (rank, std), sink in self._sinks.items():
            if (error := sink.opened.result()) is not None:
                raise self._not_opened(error, rank, std) from error

    async def child_fds(self, rank: int) -> tuple[int, int]:
        """The descriptors to start a worker with: its stdout and its stderr.

        They stay ours; `started` closes them.

        Raises:
            OSError: if a file that the worker writes to itself can't be opened, naming run, rank and file.
        """
        if (opening := self._openings.get(rank)) is not None:
            await asyncio.wait({opening})
            opening.result()
        out, err = (self._child_fd(rank, std) for std in STREAMS)
        return out, err

    def _child_fd(self, rank: int, std: Std) -> int:
        if (rank, std) in self._pipes:
            return self._pipes[rank, std].write_fd
        return self._child_fds.get((rank, std), 1 if std is Std.OUT else 2)

    def started(self, rank: int) -> None:
        """Close our copies of a started worker's descriptors and begin to read."""
        for std in STREAMS:
            fd = self._child_fds.pop((rank, std), None)
            if fd is not None:
                os.close(fd)
            pump = self._pumps.get((rank, std))
            if pump is not None:
                self._pipes[rank, std].close_write()
                pump.start()

    def release(self) -> None:
        """Let lossless readers hold no worker back any more: a stop has begun."""
        for pump in self._pumps.values():
            pump.stream.release()

    async def at_eof(self, rank: int, within: float, hurry: asyncio.Future[None]) -> bool:
        """Wait until nobody holds this rank's pipes any more.

        Args:
            within: seconds.
            hurry: ends the waiting when it is done.

        Returns:
            False when a pipe is still open.
        """
        pumps = self._of(rank)
        for pump in pumps:
            pump.drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within
        ends = {pump.at_eof for pump in pumps}
        while waiting := {end for end in ends if not end.done()}:
            left = deadline - loop.time()
            if left <= 0 or hurry.done():
                return False
            await asyncio.wait({*waiting, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return True

    async def finish(self, rank: int, within: float) -> bool:
        """Read this rank's pipes to their end, or what is there when the time is up; then close its files.

        Args:
            within: seconds.

        Returns:
            False when a pipe was still open; nothing is read from it any more.
        """
        pumps = self._of(rank)
        for pump in pumps:
            pump.drain()
        ends = [pump.at_eof for pump in pumps if not pump.at_eof.done()]
        late = (await asyncio.wait(ends, timeout=within))[1] if ends else ()
        await self._finish(pumps)
        return not late

    async def _finish(self, pumps: Sequence[Pump]) -> None:
        for pump in pumps:
            try:
                pump.take_rest()
            except Exception as error:  # noqa: BLE001  # a bug of ours: reported, and the files are closed all the same
                self._on_broken(error)
        if pumps:
            await asyncio.wait([service(pump.finish(), name="finish") for pump in pumps])

    def _of(self, rank: int) -> list[Pump]:
        return [self._pumps[rank, std] for std in STREAMS if (rank, std) in self._pumps]

    def pipe_inodes(self, rank: int) -> frozenset[int]:
        """The pipes of a rank as /proc/<pid>/fd names them, `pipe:[inode]`."""
        return frozenset(pipe.inode for (of_rank, _), pipe in self._pipes.items() if of_rank == rank)

    def files(self, rank: int) -> tuple[str, str]:
        """The paths of its stdout and stderr, `""` where there is none."""
        out, err = (self._plans[rank][std].path for std in STREAMS)
        return out, err

    def tail(self, rank: int, std: Std) -> tuple[str, ...]:
        """The last lines of a piped stream, up to 40; empty for one that isn't piped."""
        pump = self._pumps.get((rank, std))
        if pump is None:
            return ()
        return tuple(raw.data.decode("utf-8", "replace") for raw in pump.stream.tail.last(TAIL_LINES))

    @property
    def lost_bytes(self) -> int:
        """Bytes of output that are missing from the ranks' files."""
        return sum(sink.lost_bytes for sink in self._sinks.values())

    @property
    def dropped_bytes(self) -> int:
        """Bytes in pieces that `Rotate.keep` removed: not lost, but gone as was asked."""
        return sum(sink.dropped_bytes for sink in self._sinks.values())

    @property
    def pieces(self) -> dict[str, tuple[str, ...]]:
        """By file that is rotated: its pieces, oldest first, the current one last."""
        return {sink.path: sink.pieces() for (rank, std), sink in self._sinks.items() if self._plans[rank][std].rotate}

    async def close(self) -> None:
        """Finish every stream without waiting for its end, and close everything; idempotent, bounded."""
        if self._closing is None:
            self._closing = service(self._close(), name=f"outputs of {self._name}")
        await asyncio.wait({self._closing})
        self._closing.result()

    async def _close(self) -> None:
        openings = list(self._openings.values())
        if openings:
            await asyncio.wait(openings, timeout=OPEN_WITHIN)
        for opening in openings:
            if opening.done() and not opening.cancelled():
                opening.exception()  # whoever started the rank was told
        await self._finish([pump for pump in self._pumps.values() if not pump.finished])
        sinks = [service(sink.finish(), name="finish") for sink in self._filtered.values()]
        if sinks:
            await asyncio.wait(sinks)
        for fd in self._child_fds.values():
            os.close(fd)
        self._child_fds.clear()
