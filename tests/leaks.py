"""What a test could leave behind, looked at from outside: `Snapshot.take()` before, `left_since` after.

Nothing here knows how the library works; /proc and the interpreter are asked.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

LINEAGE = "AELASTIC_LINEAGE"
OURS = f"tests-{uuid.uuid4().hex}"
"""In the lineage of every process that descends from this test session, however it got away."""
STARTED = 19
"""Where `starttime` stands in `_stat`."""
DEADLINE = 10.0
"""Seconds within which what was ending must have ended; a net, nothing sleeps that long when all is well."""


def mark_lineage() -> None:
    """Put this session into the lineage that workers inherit."""
    os.environ[LINEAGE] = f"{os.environ.get(LINEAGE) or ':'}{OURS}:"


@dataclass(frozen=True)
class Snapshot:
    """What this process has at one instant."""

    processes: frozenset[tuple[int, str]]
    """Children of ours, zombies too, and whoever carries our lineage: pid and command."""
    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[threading.Thread]
    signals: tuple[tuple[int, Any], ...]
    """What each signal does; under 0: what is blocked."""
    wakeup: int

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            processes=frozenset(processes()),
            descriptors=frozenset(descriptors()),
            threads=frozenset(threading.enumerate()),
            signals=(
                *((number, signal.getsignal(number)) for number in sorted(signal.valid_signals())),
                (0, frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, []))),
            ),
            wakeup=_wakeup_fd(),
        )

    def differences(self, before: Snapshot) -> list[str]:
        """Each difference from an earlier snapshot in a sentence."""
        return [
            *(f"process {pid} is left: {command}" for pid, command in sorted(self.processes - before.processes)),
            *(f"descriptor {fd} is left: {what}" for fd, what in sorted(self.descriptors - before.descriptors)),
            *(f"descriptor {fd} was closed: {what}" for fd, what in sorted(before.descriptors - self.descriptors)),
            *(f"thread {thread.name} is left" for thread in self.threads - before.threads if thread.is_alive()),
            *(
                f"signal {number} was {old} and is {new}"
                for (number, old), (_, new) in zip(before.signals, self.signals, strict=True)
                if old != new
            ),
            *([f"the wakeup descriptor was {before.wakeup} and is {self.wakeup}"] * (before.wakeup != self.wakeup)),
        ]


def left_since(before: Snapshot) -> list[str]:
    """What is different once everything that was ending has ended; [] when nothing is.

    On 3.11 asyncio's thread of each child ends a moment after the exit was reported; so does a default executor's.
    """
    deadline = time.monotonic() + DEADLINE
    while (found := Snapshot.take().differences(before)) and time.monotonic() < deadline:
        time.sleep(0.002)
    return found


def processes() -> Iterator[tuple[int, str]]:
    """Our children and everything that descends from this session: pid and command."""
    me, tracker = os.getpid(), tracker_ids()[0]
    ours = int(_stat(me)[STARTED])
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or (pid := int(entry)) in (me, tracker) or not (stat := _stat(pid)):
            continue
        state, parent, started = stat[0].decode(), int(stat[1]), int(stat[STARTED])
        # Who is older than this session doesn't descend from it; a zombie shows no environment.
        descends = started >= ours and state not in "XZ" and OURS.encode() in _read(pid, "environ")
        if parent == me or descends:
            command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")
            yield pid, f"{state} {command[:200]}"


def descriptors() -> Iterator[tuple[int, str]]:
    """Our open descriptors, each with what it is."""
    tracker = tracker_ids()[1]
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the one that listed them
            continue
        if int(entry) != tracker:
            yield int(entry), target


def tracker_ids() -> tuple[int | None, int | None]:
    """Pid and descriptor of multiprocessing's tracker, which is the interpreter's own and lives as long as it."""
    tracker: Any = resource_tracker._resource_tracker
    return tracker._pid, tracker._fd


def kill_descendants() -> None:
    """End what a failed test left, so that the next one doesn't suffer for it."""
    for pid, _ in list(processes()):
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        except (ProcessLookupError, ChildProcessError, PermissionError):
            continue


def lives(pid: int) -> bool:
    """Whether a process of ours has this number, and is no zombie; a freed one is soon somebody else's."""
    return bool(stat := _stat(pid)) and stat[0] not in (b"X", b"Z") and OURS.encode() in _read(pid, "environ")


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/pid/stat from the state on (proc_pid_stat(5)); [] when it is gone."""
    return _read(pid, "stat").rpartition(b") ")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it ended meanwhile, or is somebody else's
        return b""


def _wakeup_fd() -> int:
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd
