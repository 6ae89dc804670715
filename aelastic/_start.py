"""The door function `start_processes`: checks what it is given and hands it to a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._child.mainmodule import check_not_being_prepared
from ._conditions import HealthPolicy
from ._context import Starting
from ._logs import LogsSpecs
from ._options import WorkerOptions
from ._policies import RestartPolicy, StopPolicy
from ._run import Run
from ._spec import StartMethod, check


def start_processes(
    name: str,
    entrypoint: str | Callable[..., Any],
    args: Mapping[int, tuple[Any, ...]],
    envs: Mapping[int, Mapping[str, str]] | None = None,
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: StartMethod = "spawn",
    *,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    options: WorkerOptions | None = None,
    stop: StopPolicy | None = None,
    restart: RestartPolicy | None = None,
    health: HealthPolicy | None = None,
    journal: bool = True,
) -> Starting:
    """Start `n` copies of a command or a function, one for each key of `args`, and supervise them in this loop.

    Calling does nothing yet. `ctx = await start_processes(...)` checks, starts and returns a `PContext`;
    `async with start_processes(...) as ctx:` also closes it on the way out.

    Args:
        name: what the run is called in prefixes, events and errors.
        entrypoint: a command, looked up along the worker's PATH (with a slash: relative to the worker's `cwd`), or a
            callable, `async def` included.
        args: exactly the ranks 0..n-1 to their arguments. For a command each argument is passed as `str(arg)`, bytes
            and paths as they are; a bare string in place of a tuple is one argument.
        envs: the same ranks to variables, laid over the inherited environment; None for none.
        logs_specs: where output goes, such as `DefaultLogsSpecs(tee=Std.ALL)`; None inherits both streams.
        log_line_prefixes: by rank, for lines on the console; `LogsDest.prefix`, by default `[{name}{rank}]:`, where
            nothing is given.
        start_method: how a function's worker is made: a fresh interpreter (`"spawn"`), a fork of a server of the run's
            own (`"forkserver"`) or of this process (`"fork"`); the README says what differs. A command doesn't care.
        duplicate_stdout_filters: lines of tee'd stdout that hold any of these also go to one file for all ranks.
        duplicate_stderr_filters: the same for stderr.
        options: what is in force in every worker before its first instruction.
        stop: how workers are stopped.
        restart: whether, how often and how soon what has ended is started again; None never does.
        health: when ranks are ready, and how it is noticed that one is stuck.
        journal: whether the run's directory gets an `events.jsonl`.

    Returns:
        A `Starting`; it can be used once.

    Raises:
        RankMappingError: (in the await, like all below, before anything was started) if a mapping has wrong ranks.
        TypeError: if something has the wrong type.
        ValueError: if a value can't be meant, or a string holds a NUL byte.
        StreamNotCaptured: if a `LinePattern` looks at a stream that doesn't pass through the supervisor.
        RuntimeError: if a worker that is importing the main module asks for it.
        OSError: of the errno's own class, naming run and rank, if one can't be started, and no restart is left for it;
            the others are gone then.

    Cancellation: what was started is taken down first.

    Source: `torch.distributed.elastic.multiprocessing.start_processes`.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     ctx = await start_processes("greet", "true", args={0: (), 1: ()})
        ...     return (await ctx.wait()).outcome
        >>> asyncio.run(main())
        'succeeded'
    """

    def make() -> Run:
        if sys.platform == "win32":
            raise NotImplementedError("aelastic supervises POSIX processes; Windows is not supported")
        spec = check(
            name,
            entrypoint,
            args,
            envs,
            log_line_prefixes,
            start_method,
            duplicate_stdout_filters=duplicate_stdout_filters,
            duplicate_stderr_filters=duplicate_stderr_filters,
            options=options,
            stop=stop,
            restart=restart,
            health=health,
        )
        if logs_specs is not None and not isinstance(logs_specs, LogsSpecs):
            raise TypeError(f"{name}: logs_specs must be a LogsSpecs such as DefaultLogsSpecs(), not {logs_specs!r}")
        if not isinstance(journal, bool):
            raise TypeError(f"{name}: journal must be True or False, not {journal!r}")
        check_not_being_prepared(name)
        return Run(spec, logs_specs, journal=journal)

    return Starting(make)
