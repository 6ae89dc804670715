"""Read what a failed worker left behind, and make a `ProcessFailure` of it.

Reading is bounded, touches regular files only and never raises: damage is a note on the failure. The functions that
read block, so they are called in threads. `build_failure` is pure.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from ._exit import ExitStatus
from ._failures import ProcessFailure, Reason
from ._returned import NoResult, Raised, Returned, Torn, Unloadable

REPORT_LIMIT_BYTES = 16 << 20
"""A longer error file is not read."""
TAIL_LINES = 40
TAIL_LIMIT_BYTES = 64 << 10
"""How far back from its end a log file is read for its last lines."""
LINE_LIMIT = 2000
"""Characters of a line that a tail keeps."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """What an error file said."""

    message: str = ""
    """The error in its writer's words, without traceback."""
    traceback: str = ""
    """As Python prints it, causes and notes included; `""` where the writer gave none."""
    timestamp: int = 0
    """Unix seconds; 0 when the file has none."""
    monotonic_ns: int = 0
    """The host's monotonic clock when it was written; 0 when the writer was not ours."""
    notes: tuple[str, ...] = ()
    retriable: bool | None = None
    """What the exception said of itself; None when it said nothing."""
    data: dict[str, Any] = field(default_factory=dict)
    """The whole file."""
    damage: str = ""
    """A sentence: why the file could not be read; `""` when it could."""


def read_error_file(path: str) -> ErrorReport | None:
    """Read a worker's error file, in any of the shapes that torch and we write.

    Returns:
        1. None when there is no file (or `path` is `""`),
        2. a report with `damage` when it can't be read,
        3. what it says otherwise.
    """
    if not path:
        return None
    try:
        content = _read_regular(path, limit=REPORT_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return ErrorReport(damage=f"the error file {path} could not be read: {error.strerror}")
    if len(content) > REPORT_LIMIT_BYTES:
        return ErrorReport(damage=f"the error file {path} was not read: it is longer than {REPORT_LIMIT_BYTES} bytes")
    return parse_report(content, path)


def parse_report(content: bytes, path: str) -> ErrorReport:
    """Understand an error file's bytes; `path` is for the sentence about damage."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = str(error) if content else "it is empty"
        return ErrorReport(damage=f"the error file {path} is damaged: {what}")
    if not isinstance(data, dict) or "message" not in data:
        return ErrorReport(damage=f"the error file {path} is damaged: it holds no message")
    message = data["message"]
    if not isinstance(message, dict):
        return ErrorReport(message=str(message), timestamp=_number(data.get("timestamp")), data=data)
    extra = message.get("extraInfo")
    extra = extra if isinstance(extra, dict) else {}
    notes = extra.get("notes")
    retriable = extra.get("retriable")
    return ErrorReport(
        message=str(message.get("message", "")),
        traceback=str(extra.get("py_callstack", "")),
        timestamp=_number(extra.get("timestamp")),
        monotonic_ns=_number(extra.get("monotonic_ns")),
        notes=tuple(map(str, notes)) if isinstance(notes, list) else (),
        retriable=retriable if isinstance(retriable, bool) else None,
        data=data,
    )


def _number(value: object) -> int:
    try:
        return max(int(value), 0) if isinstance(value, (int, float, str)) else 0
    except (ValueError, OverflowError):
        return 0


def _read_regular(path: str, *, limit: int, tail: bool = False, begin: int = 0) -> bytes:
    # O_NONBLOCK: a pipe in the file's place must not hold us up before we see that it is one.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file")
        start = max(begin, status.st_size - limit) if tail else begin
        file.seek(start)
        content = bytearray()
        while len(content) < limit and (chunk := file.read(limit - len(content))):
            content += chunk
        if start > begin and b"\n" in content:
            del content[: content.index(b"\n") + 1]  # the first line is only the end of one
        return bytes(content)


def tail_of_file(path: str, *, lines: int = TAIL_LINES, begin: int = 0) -> tuple[str, ...]:
    """The last lines of a log file, decoded with replacement; empty when it can't be read.

    Args:
        path: a regular file; anything else has no tail.
        lines: how many at the most.
        begin: offset in bytes before which the file is not this worker's.
    """
    if not path or lines <= 0:
        return ()
    try:
        content = _read_regular(path, limit=TAIL_LIMIT_BYTES, tail=True, begin=begin)
    except OSError:
        return ()
    return tuple(map(_shown, content.removesuffix(b"\n").split(b"\n")[-lines:])) if content else ()


def _shown(line: bytes) -> str:
    # A progress bar overwrites itself: what stood last is what a person saw.
    seen = line.rstrip(b"\r").rpartition(b"\r")[2]
    return seen.decode("utf-8", "replace")[:LINE_LIMIT]


@final
@dataclass(frozen=True, slots=True)
class OomKills:
    """How often the kernel has killed for lack of memory, as one counter tells it."""

    kills: int
    where: str
    """What the counter counts: a cgroup's path, or the machine."""


def count_oom_kills(cgroup_root: str = "/sys/fs/cgroup", proc: str = "/proc") -> OomKills | None:
    """Read the nearest counter of out-of-memory kills around this process.

    Returns:
        The cgroup's count where there is one, else the machine's; None where the kernel shows neither.

    Source: cgroups(7) `memory.events`, `memory.oom_control`; proc_vmstat(5) `oom_kill`.
    """
    for line in _lines(f"{proc}/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for folder, name in ((cgroup_root, "memory.events"), (f"{cgroup_root}/memory", "memory.oom_control")):
            if controllers not in ("", "memory"):
                continue
            kills = _counter(f"{folder}{path.rstrip('/')}/{name}", "oom_kill")
            if kills is not None:
                return OomKills(kills, f"the cgroup {path}")
    kills = _counter(f"{proc}/vmstat", "oom_kill")
    return None if kills is None else OomKills(kills, "this machine")


def _counter(path: str, name: str) -> int | None:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value)
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def out_of_memory_hint(
    status: ExitStatus, before: OomKills | None, after: OomKills | None, *, own_kills: int = 0
) -> str:
    """A sentence when a SIGKILL was probably the kernel's, for lack of memory; else `""`.

    Args:
        own_kills: in the worker's own cgroup, which leaves no doubt.
    """
    if status.signal != signal.SIGKILL:
        return ""
    if own_kills:
        before, after = OomKills(0, "its cgroup"), OomKills(own_kills, "its cgroup")
    if before is None or after is None or before.where != after.where:
        return ""
    kills = after.kills - before.kills
    if kills <= 0:
        return ""
    times = "once" if kills == 1 else f"{kills} times"
    return f"the kernel killed {times} for lack of memory in {after.where} while this worker ran"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was found on disk and in the kernel about a worker's end."""

    error_file: str = ""
    report: ErrorReport | None = None
    tail: tuple[str, ...] = ()
    """The last lines of its stderr file, else of its stdout file."""
    oom_kills: OomKills | None = None
    """The counter after its end."""
    own_oom_kills: int = 0
    """How often the kernel killed in the worker's own cgroup, where that is told."""


def read_evidence(error_file: str, stdout: str = "", stderr: str = "", cgroup: str = "") -> Evidence:
    """Gather what a worker left; blocks, and never raises.

    Args:
        error_file: path of its error file, `""` when it has none.
        stdout: path of the file that holds its stdout, `""` when there is none.
        stderr: likewise.
        cgroup: folder of the worker's own cgroup, `""` when it has none.
    """
    return Evidence(
        error_file=error_file,
        report=read_error_file(error_file),
        tail=tail_of_file(stderr) or tail_of_file(stdout),
        oom_kills=count_oom_kills(),
        own_oom_kills=(_counter(f"{cgroup}/memory.events", "oom_kill") or 0) if cgroup else 0,
    )


def build_failure(
    *,
    rank: int,
    pid: int,
    status: ExitStatus | None,
    returned: Returned,
    evidence: Evidence,
    started_ns: int,
    exit_ns: int,
    told_ns: int = 0,
    tail: Sequence[str] = (),
    oom_before: OomKills | None = None,
    reason: Reason | None = None,
    message: str = "",
    exit_at: float | None = None,
) -> ProcessFailure:
    """Make a failure of its evidence.

    Args:
        rank: who.
        pid: the worker's process.
        status: how it ended; None when it is still alive after everything was tried.
        returned: what came from a function; `Value(None)` for a command.
        evidence: what was found.
        started_ns: monotonic nanoseconds at its spawn.
        exit_ns: monotonic nanoseconds at which its end was seen; 0 when it was not.
        told_ns: monotonic nanoseconds at which what the function handed back was here; 0 when nothing was.
        tail: the last lines of its output as the supervisor saw them; the evidence's when empty.
        oom_before: the counter before its start.
        reason: what only the supervisor can know (`watchdog`, `not_ready`); None reads it off the evidence.
        message: what the supervisor has to say, before anything else.
        exit_at: the end as Unix seconds; now when None.

    Returns:
        The failure, placed in time by the worker's own error file where that lies between start and exit, else by
        what it handed back.
    """
    ended = status or ExitStatus(None, None)
    report = evidence.report
    exit_ns = exit_ns or time.monotonic_ns()
    hint = out_of_memory_hint(ended, oom_before, evidence.oom_kills, own_kills=evidence.own_oom_kills)
    own_ns, damage = (report.monotonic_ns, report.damage) if report else (0, "")
    return ProcessFailure(
        local_rank=rank,
        pid=pid,
        exitcode=ended.returncode,
        error_file=evidence.error_file,
        error_file_data=report.data if report else {},
        message="\n".join(filter(None, [message, *_said(status, returned, report), hint, damage])),
        timestamp=(report.timestamp if report else 0) or int(time.time() if exit_at is None else exit_at),
        status=ended,
        seconds=max(exit_ns - started_ns, 0) / 1e9,
        monotonic_ns=own_ns if started_ns <= own_ns <= exit_ns else min(told_ns or exit_ns, exit_ns),
        tail=tuple(tail) or evidence.tail,
        exception=returned.exception if isinstance(returned, Raised) else None,
        reason=reason or _reason(status, returned, report, hint),
    )


def failure_of_start(rank: int, error: OSError) -> ProcessFailure:
    """Make a failure of a start that did not succeed; its pid is 0, and it has no status."""
    return ProcessFailure(
        local_rank=rank,
        pid=0,
        exitcode=ExitStatus(None, None).returncode,
        error_file="",
        message=str(error),
        timestamp=int(time.time()),
        monotonic_ns=time.monotonic_ns(),
        exception=error,
        reason="start_failed",
    )


def _reason(status: ExitStatus | None, returned: Returned, report: ErrorReport | None, hint: str) -> Reason:
    if status is None:
        return "unkillable"
    if status.signal is not None and not isinstance(returned, Raised | Unloadable):
        return "out_of_memory" if hint else "signaled"
    match returned:
        case Raised():
            return "raised"
        case Unloadable() | Torn():
            return "result_lost"
        case NoResult() if status.ok:
            return "no_result"
    if not status.known:
        return "status_lost"
    return "raised" if report and report.traceback else "exited"


def _said(status: ExitStatus | None, returned: Returned, report: ErrorReport | None) -> Sequence[str]:
    """What is told first: the worker's own words, else what its end says."""
    match returned:
        case Unloadable(reason=reason, traceback=traceback):
            return (reason, traceback.rstrip("\n"))
        case Torn(reason=reason):
            return (reason,)
    if report and (report.message or report.traceback):
        return (report.message, report.traceback.rstrip("\n"))
    match returned:
        case Raised(traceback=traceback):
            return (traceback.rstrip("\n").rpartition("\n")[2], traceback.rstrip("\n"))
        case NoResult() if status is not None and status.ok:
            return ("its process exited with code 0 before the function returned, as os._exit(0) does",)
    return (status.describe() if status else "outlived SIGKILL",)
