"""`aelastic logs`: show what a run left in its folder, in the order of time where that is known."""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import final

from .. import Std
from .stream import UNTIMED, FileLine, Stream, pieces

HINTS = 8
POLL = 0.1
"""Seconds between two looks of --follow: another process writes, and files have no event to wait for."""
TAIL_BYTES = 1 << 16
"""How much of the journal's end is read to find the run's; the guard may have written after it."""
_FILE = re.compile(r"attempt_(\d+)/(\d+)/(stdout|stderr)\.log")
_AGO = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_STDS = {"out": Std.OUT, "err": Std.ERR, "all": Std.ALL}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `logs`."""
    parser = commands.add_parser(
        "logs",
        help="show the logs of a run",
        description="Show the lines of a run: in the order of time where it was written with a time index, else stream"
        " after stream.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder, as 'aelastic run' named it")
    parser.add_argument("--rank", type=ranks, metavar="R[,R...]", help="only these ranks")
    parser.add_argument("--std", choices=sorted(_STDS), default="all", help="only this stream (default: all)")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run has finished")
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help="only what is younger: 10m, 2h, or a time in ISO 8601"
    )
    parser.set_defaults(call=call)


def ranks(text: str) -> frozenset[int]:
    """Ranks separated by commas."""
    try:
        return frozenset(int(rank) for rank in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} names no ranks: write 0 or 0,3") from None


def moment(text: str) -> datetime:
    """A time of day, local unless it says otherwise, or how long ago."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 10m, 2h, or 2031-05-01T12:00:00Z") from None


def call(options: argparse.Namespace) -> int:
    """Show what was asked for; the exit code is 1 when there is no such run."""
    shelf = Shelf(options.run_dir, options.rank, _STDS[options.std])
    if not shelf.attempts():
        print(f"{options.run_dir} is no run's folder: it has no attempt_0 in it{shelf.hint()}", file=sys.stderr)
        return 1
    if options.rank is not None and not options.follow and (unknown := options.rank - shelf.ranks()):
        names = ", ".join(map(str, sorted(unknown)))
        known = ", ".join(map(str, sorted(shelf.ranks())))
        print(f"{options.run_dir} has no rank {names}; it has {known}", file=sys.stderr)
        return 1
    try:
        show(shelf, options.since, follow=options.follow)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    finally:
        shelf.close()
    return 0


def show(shelf: Shelf, since: datetime | None, *, follow: bool) -> None:
    """Write the lines, and those to come."""
    while True:
        ended = not follow or finished(shelf.run_dir)  # asked before the files are read: nothing comes after it
        for line in shelf.lines(since, whole=not ended):
            sys.stdout.buffer.write(prefix(line) + line.data + b"\n")
        sys.stdout.flush()
        if ended:
            return
        time.sleep(POLL)


def prefix(line: FileLine) -> bytes:
    """Rank and, for stderr, its stream."""
    return f"[{line.rank}{'' if line.std is Std.OUT else ' err'}]:".encode()


def finished(run_dir: str) -> bool:
    """Whether the run's journal tells its end: its last event, or that its supervisor died and was cleaned up after."""
    try:
        with open(os.path.join(run_dir, "events.jsonl"), "rb") as journal:
            journal.seek(max(0, journal.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = journal.read().splitlines()
    except FileNotFoundError:
        return False
    return any(map(_is_end, reversed(lines)))


def _is_end(line: bytes) -> bool:
    if b"RunFinished" not in line and b"SupervisorDied" not in line:
        return False
    try:
        event = json.loads(line)
    except ValueError:  # still being written, or its beginning was not read
        return False
    kept = event.get("policy") == "keep"  # its workers go on, and nobody will tell their end
    return event.get("event") == "RunFinished" or (event.get("event") == "SupervisorDied" and not kept)


@final
class Shelf:
    """The chosen streams of a run, those that appear later too."""

    def __init__(self, run_dir: str, chosen: frozenset[int] | None, std: Std) -> None:
        self.run_dir = run_dir
        self._chosen = chosen
        self._std = std
        self._streams: dict[tuple[int, int, Std], tuple[str, Stream]] = {}

    def attempts(self) -> list[str]:
        """The folders of the attempts that are there."""
        names = os.listdir(self.run_dir) if os.path.isdir(self.run_dir) else []
        return [name for name in names if re.fullmatch(r"attempt_\d+", name)]

    def ranks(self) -> frozenset[int]:
        """The ranks of all attempts."""
        found = (os.listdir(os.path.join(self.run_dir, attempt)) for attempt in self.attempts())
        return frozenset(int(name) for names in found for name in names if name.isdecimal())

    def hint(self) -> str:
        """What to name instead, where the folder is one of runs."""
        if not os.path.isdir(self.run_dir):
            return ""
        paths = sorted(os.path.join(self.run_dir, name) for name in os.listdir(self.run_dir))
        runs = [path for path in paths if os.path.isdir(os.path.join(path, "attempt_0"))]
        return f"; there are runs in it: {', '.join(runs[:HINTS])}" if runs else ""

    def lines(self, since: datetime | None, *, whole: bool) -> Iterator[FileLine]:
        """What there is to read now, merged by time; lines without a time come first, stream after stream.

        Args:
            since: lines without a time are shown if their file was written since.
            whole: leave unfinished last lines for the next time.
        """
        self._look()
        found = [
            stream.lines(whole=whole)
            for _, (path, stream) in sorted(self._streams.items())
            if since is None or _written(path) >= since
        ]
        for line in heapq.merge(*found, key=lambda line: line.at):
            if since is None or line.at is UNTIMED or line.at >= since:
                yield line

    def _look(self) -> None:
        for attempt in self.attempts():
            for folder, _, names in os.walk(os.path.join(self.run_dir, attempt)):
                for name in names:
                    self._add(os.path.join(folder, re.sub(r"\.log\..*", ".log", name)))

    def _add(self, path: str) -> None:
        match = _FILE.fullmatch(os.path.relpath(path, self.run_dir))
        if match is None:
            return
        attempt, rank, std = int(match[1]), int(match[2]), _STDS[match[3].removeprefix("std")]
        if std in self._std and (self._chosen is None or rank in self._chosen):
            key = (attempt, rank, std)
            self._streams.setdefault(key, (path, Stream(path, attempt=attempt, rank=rank, std=std)))

    def close(self) -> None:
        """Close every file; idempotent."""
        for _, stream in self._streams.values():
            stream.close()


def _written(path: str) -> datetime:
    newest = pieces(path)[-1:]
    return datetime.fromtimestamp(os.path.getmtime(newest[0]), UTC) if newest else UNTIMED
