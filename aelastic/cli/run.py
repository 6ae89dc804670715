"""`aelastic run`: start n ranks of a command, and exit as their root cause did.

The one place that installs signal actions: this process is the host, and nobody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self, final

from .. import (
    ChildFailedError,
    DefaultLogsSpecs,
    LogsSpecs,
    PContext,
    RestartPolicy,
    RunProcsResult,
    Std,
    start_processes,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAMED_FILES = 16
"""So many log files are named one by one at the end."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `run`."""
    parser = commands.add_parser(
        "run",
        help="start ranks of a command and wait for them",
        description="Start N ranks of COMMAND and wait for them. Exits with the code of the first that failed, 128 and"
        " its signal if one killed it; SIGINT and SIGTERM stop them all, a second one kills them.",
        usage="aelastic run [-n N] [--tee STD] [--redirects STD] [--log-dir DIR] [--name NAME] [--prefix FORMAT]"
        " [--max-restarts N] -- COMMAND...",
    )
    parser.add_argument("-n", "--nprocs", type=count, default=1, metavar="N", help="how many ranks (default: 1)")
    parser.add_argument(
        "-t", "--tee", type=streams, default=Std.NONE, metavar="STD",
        help="streams that go to a file and to this terminal: 1 stdout, 2 stderr, 3 both, or by rank: 0:3,1:1",
    )  # fmt: skip
    parser.add_argument(
        "-r", "--redirects", type=streams, default=Std.NONE, metavar="STD", help="streams that go to a file only"
    )
    parser.add_argument("--log-dir", metavar="DIR", help="where the run's folder is made (default: a temporary one)")
    parser.add_argument("--name", help="what the run is called in reports and prefixes (default: the command's name)")
    parser.add_argument(
        "--prefix", metavar="FORMAT",
        help="what begins each line of a tee, of {name} {rank} {std} {host} {time}: '{time:%%H:%%M:%%S} {rank} '",
    )  # fmt: skip
    parser.add_argument(
        "--max-restarts", type=restarts, default=0, metavar="N",
        help="how often all ranks are started again after a failure (default: 0)",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.set_defaults(call=lambda options: call(parser, options))


def count(text: str) -> int:
    """A number of ranks, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks: give 1 or more")
    return int(text)


def restarts(text: str) -> int:
    """A number of restarts, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of restarts: give 0 or more")
    return int(text)


def streams(text: str) -> Std | dict[int, Std]:
    """A setting of streams, for all ranks or rank by rank."""
    try:
        return Std.from_str(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def call(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run what was asked; the exit code is a shell's."""
    if not options.command:
        parser.error("no command: write it after --, as in 'aelastic run -n 4 -- python3 train.py'")
    try:
        return asyncio.run(supervise(options))
    except (OSError, ValueError, TypeError) as error:
        say(sentence(error))
        return start_code(error)


def sentence(error: Exception) -> str:
    """What went wrong, without the number that only a program reads."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {os.fsdecode(error.filename)}"


def start_code(error: Exception) -> int:
    """What a shell exits with when a command can't be started: 127 not found, 126 not executable."""
    match error:
        case FileNotFoundError():
            return 127
        case PermissionError():
            return 126
        case _:
            return 1


async def supervise(options: argparse.Namespace) -> int:
    """Start, wait, report."""
    closing: list[asyncio.Future[None]] = []
    with Signals() as signals:
        starting = asyncio.ensure_future(start(options))
        signals.call = lambda _first, _count: starting.cancel()
        try:
            ctx = await starting
        except asyncio.CancelledError:
            return 128 + signals.first

        def stop(first: int, count: int) -> None:
            closing.append(asyncio.ensure_future(ctx.close(first if count == 1 else signal.SIGKILL)))

        signals.call = stop
        result = await ctx.wait()
        await asyncio.gather(*closing)
    return report(ctx, result, signals.first)


async def start(options: argparse.Namespace) -> PContext:
    """Start the ranks; the command's own name stands for the run's where none was given."""
    program, *args = options.command
    ranks = range(options.nprocs)
    return await start_processes(
        options.name or os.path.basename(program) or program,
        program,
        args=dict.fromkeys(ranks, tuple(args)),
        logs_specs=destination(options),
        restart=RestartPolicy(max_restarts=options.max_restarts),
    )


def destination(options: argparse.Namespace) -> LogsSpecs | None:
    """Where output goes; None, plain inheritance without a folder, unless anything was asked for."""
    if options.log_dir is None and options.tee == Std.NONE and options.redirects == Std.NONE:
        return None
    prefix = options.prefix or ("[{name}{rank}]:" if options.name else "[{rank}]:")
    return DefaultLogsSpecs(options.log_dir, redirects=options.redirects, tee=options.tee, prefix=prefix)


@final
class Signals:
    """What ends a job, while it is entered; what was ignored before (nohup, a shell's background) stays ignored."""

    def __init__(self) -> None:
        self.first = 0
        """The first that came; 0 while none has."""
        self.call: Callable[[int, int], object] = lambda _first, _count: None
        """Called for each signal with the first number and how many have come."""
        self._count = 0
        self._taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def __enter__(self) -> Self:
        for number in self._taken:
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._taken:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _came(self, number: int) -> None:
        self.first = self.first or number
        self._count += 1
        self.call(self.first, self._count)


def report(ctx: PContext, result: RunProcsResult, signalled: int) -> int:
    """Say on stderr how it ended and where the logs are; return the exit code."""
    try:
        result.raise_for_failures()
    except ChildFailedError as error:
        say(error.format_msg())
    if ctx.log_dir:
        paths = (path for rank in ctx.stdouts for path in (ctx.stdouts[rank], ctx.stderrs[rank]))
        files = [path for path in paths if path and os.path.getsize(path)]
        for path in files[:NAMED_FILES]:
            say(f"  {os.path.relpath(path, ctx.log_dir)} ({os.path.getsize(path)} bytes)")
        if len(files) > NAMED_FILES:
            say(f"  and {len(files) - NAMED_FILES} more")
        say(f"logs of {ctx.name}: {ctx.log_dir}")
    return 128 + signalled if signalled else exit_code(result)


def exit_code(result: RunProcsResult) -> int:
    """The root cause's code as a shell tells it; 1 where the failure has none, such as survivors."""
    if not result.is_failed():
        return 0
    return (result.root_cause.status.shell_code if result.root_cause else 1) or 1


def say(text: str) -> None:
    """Write a line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)
