"""What /proc tells about a process, read once and judged elsewhere. Linux; the standard library only.

Nothing here decides or signals. A process that ends while it is read counts as gone. What the kernel doesn't let us
read (another user's environment) reads as empty. Imported by the guard, so it imports next to nothing itself.

Source: proc(5), pidfd_open(2).
"""

from __future__ import annotations

import errno
import os
import select
import time

LINEAGE = b"AELASTIC_LINEAGE"
"""The variable that holds the ids of all runs a process came from, as `:outer:inner:`."""
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
BOOT_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The first exists on Linux only, as /proc does."""
CHUNK = 64 * 1024


class Member:
    """One process as /proc showed it at one moment. `(pid, started)` is its identity."""

    __slots__ = ("group", "lineage", "parent", "pid", "session", "started", "state")

    def __init__(self, pid: int, state: str, parent: int, group: int, session: int, started: int, lineage: str) -> None:
        self.pid = pid
        self.state = state
        """The kernel's letter: R, S, D, T, t, Z, X, I."""
        self.parent = parent
        self.group = group
        self.session = session
        self.started = started
        """Clock ticks since boot, which tell a process from a later one of the same pid."""
        self.lineage = lineage
        """`:outer:inner:`; empty when its environment doesn't show one, or was not read."""

    @property
    def identity(self) -> tuple[int, int]:
        """(pid, start ticks): never shared by two processes."""
        return self.pid, self.started

    @property
    def alive(self) -> bool:
        """False for what has ended and only waits to be collected."""
        return self.state not in "ZX"

    def carries(self, run_id: str) -> bool:
        """Whether the process shows that it came from this run."""
        return f":{run_id}:" in self.lineage

    def __repr__(self) -> str:
        return (
            f"Member(pid={self.pid}, state={self.state}, parent={self.parent}, group={self.group}, "
            f"session={self.session}, started={self.started}, lineage={self.lineage!r})"
        )


def pids() -> list[int]:
    """Every process that this process can see, the newest first; empty where there is no /proc.

    Newest first, because who flees by forking and exiting always has the newest pid: read last, it would be gone.
    """
    found = [int(name) for name in names("/proc") if name.isdigit()]
    last = last_pid()
    return sorted(found, key=lambda pid: (pid > last, -pid))


def last_pid() -> int:
    """The pid that was given out last; 0 when that isn't told. Numbers are given out upwards, then from the start."""
    words = read("/proc/loadavg").split()
    return int(words[-1]) if words else 0


def members(*, lineage: bool = True) -> list[Member]:
    """Read every process of the machine: 30 microseconds each, half without the lineage; never on an event loop."""
    found = (read_member(pid, lineage=lineage) for pid in pids())
    return [member for member in found if member is not None]


def read_member(pid: int, *, lineage: bool = True, since: int = 0) -> Member | None:
    """Read one process.

    Args:
        lineage: whether its environment is read too.
        since: start ticks; the environment of what is older is not read.

    Returns:
        None when there is no such process any more.
    """
    member = _read_stat(pid)
    if lineage and member is not None and member.started >= since:
        member.lineage = read_variable(pid, LINEAGE)
    return member


def _read_stat(pid: int) -> Member | None:
    stat = read(f"/proc/{pid}/stat")
    # The command's name stands in brackets and may hold brackets and spaces itself: fields count from the last one.
    fields = stat[stat.rfind(b")") + 2 :].split()
    if len(fields) < 20:
        return None
    return Member(
        pid=pid,
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        started=int(fields[19]),
        lineage="",
    )


def started_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it is gone."""
    member = read_member(pid, lineage=False)
    return None if member is None else member.started


def open_pidfd(pid: int) -> int:
    """A descriptor of the process; -1 when it is gone, none is left, or the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return -1


def inode_of(pidfd: int) -> int:
    """A number that no other process gets until the next boot; 0 before Linux 6.9, where all pidfds share one."""
    it = os.fstat(pidfd)
    try:
        with select.epoll() as other:
            return 0 if it.st_dev == os.fstat(other.fileno()).st_dev else it.st_ino
    except OSError:  # no descriptor left to compare with
        return 0


def read_variable(pid: int, name: bytes) -> str:
    """A variable as the process was exec'd with it; empty when it has none, or we may not read it."""
    environ = b"\0" + read(f"/proc/{pid}/environ")
    start = environ.find(b"\0" + name + b"=")
    if start < 0:
        return ""
    start += len(name) + 2
    end = environ.find(b"\0", start)
    return os.fsdecode(environ[start:] if end < 0 else environ[start:end])


def is_being_executed(pid: int) -> bool:
    """Whether it is in the midst of execve(2), where it shows neither command line nor environment.

    That takes 0.1 to 10 ms, some of them after the `Popen` that started it has returned.
    """
    return not read(f"/proc/{pid}/environ") and not read(f"/proc/{pid}/cmdline") and started_ticks(pid) is not None


def cgroup_of(pid: int | str) -> str:
    """The name of its cgroup of version 2, as seen from ours; empty where there is none, or the process is gone."""
    for line in os.fsdecode(read(f"/proc/{pid}/cgroup")).splitlines():
        if line.startswith("0::"):
            return line[3:].removesuffix(" (deleted)")
    return ""


def command_of(pid: int) -> str:
    """The command line with spaces between, else the short name in square brackets, else empty."""
    line = read(f"/proc/{pid}/cmdline").rstrip(b"\0").replace(b"\0", b" ")
    if line:
        return os.fsdecode(line)
    name = read(f"/proc/{pid}/comm").strip()
    return f"[{os.fsdecode(name)}]" if name else ""


def wait_channel(pid: int) -> str:
    """The kernel function a process sleeps in; empty when it doesn't sleep, or we may not know."""
    channel = os.fsdecode(read(f"/proc/{pid}/wchan").strip())
    return "" if channel == "0" else channel


def now_ticks() -> int:
    """This moment on the clock of `Member.started`, rounded down."""
    return int(time.clock_gettime(BOOT_CLOCK) * TICKS_A_SECOND)


class Shortages:
    """How often no descriptor was left to read with: what was seen meanwhile may not be all there is."""

    count = 0

    def note(self, error: OSError) -> None:
        """Count an error, if it means that."""
        self.count += error.errno in (errno.EMFILE, errno.ENFILE)


shortages = Shortages()
"""Those of this process."""


def names(folder: str) -> list[str]:
    """What is in a folder of /proc; empty when it is gone or forbidden."""
    try:
        return os.listdir(folder)
    except OSError as error:
        shortages.note(error)
        return []


def read(path: str) -> bytes:
    """A whole file of /proc, whose size is never known before; empty when it is gone or forbidden."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        shortages.note(error)
        return b""
    try:
        content = b""
        while chunk := os.read(fd, CHUNK):
            content += chunk
        return content
    except OSError:
        return b""
    finally:
        os.close(fd)
