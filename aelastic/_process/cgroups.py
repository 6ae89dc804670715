"""The cgroups of a run: one for each worker, in a folder below this process's own. Linux, cgroups of version 2.

Here it is decided whether a run has any, and what they tell is read; `census` finds who is in them, `tree` kills by
them. A worker enters its own before its program is executed (`_child/trampoline.py`), so all that comes from it is born
in there, and whatever it makes of group, session, parent and environment, it is found and ended.

That is not free, so it is taken only where somebody asked for it, by `StopPolicy.containment="cgroup"`, or, with
`"auto"`, by delegating our cgroup to us: entering takes a trampoline (8 ms of CPU) and the kernel's leave to change
the hierarchy (5 to 13 ms, most of it once for starts that come together).

Source: cgroups(7), systemd's CGROUP_DELEGATION: the attribute `user.delegate` (`trusted.delegate` before version 251).
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from typing import final

from .._child import cgroupfs, procfs
from .._policies import Containment
from .._results import ExitUsage

DELEGATED = ("user.delegate", "trusted.delegate")
TRIAL = "trial"
"""Folder of the process that tries whether one can be moved."""
TRIAL_SECONDS = 5.0
REMEDY = (
    "run it where a cgroup is delegated (in a systemd unit: Delegate=yes), or choose StopPolicy.containment='session'"
)


@final
class Cgroups:
    """The folder of one run and those of its ranks. Its methods block: for threads.

    Args:
        parent: the folder of our own cgroup.
        run_id: tells the run's folder from all others.
        asked: whether the caller asked for them, so that the session will not do.
    """

    def __init__(self, parent: str, run_id: str, *, asked: bool) -> None:
        self.folder = f"{parent}/aelastic-{run_id}"
        self._run_id = run_id
        self._asked = asked

    def open(self, who: str) -> bool:
        """Make the run's folder, and try whether a process can be moved into one below it.

        Returns:
            False when that can't be, and nobody asked for it; nothing is left then.

        Raises:
            OSError: of the errno's class, saying what is missing and what to do; nothing is left then.
        """
        try:
            os.mkdir(self.folder)
            os.mkdir(f"{self.folder}/{TRIAL}")
            self._try_to_move()
        except OSError as error:
            self.close()
            if self._asked:
                raise _unavailable(who, f"in {os.path.dirname(self.folder)} none can be made", error) from error
            return False
        cgroupfs.remove(f"{self.folder}/{TRIAL}")
        return True

    def _try_to_move(self) -> None:
        # As the trampoline does it: a process that moves itself. What it prints tells, since another waiter of this
        # host may take its status.
        trial = subprocess.run(
            ["/bin/sh", "-c", 'echo 0 >"$0/cgroup.procs" && echo moved', f"{self.folder}/{TRIAL}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            timeout=TRIAL_SECONDS,
            check=False,
        )
        if trial.stdout != b"moved\n":
            raise OSError(errno.EACCES, f"no process can be moved into it ({trial.stderr.decode().strip()})")

    def make(self, rank: int) -> str:
        """The folder of a rank, which is made if it is not there.

        Raises:
            OSError: of the errno's class.
        """
        folder = f"{self.folder}/{rank}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        return folder

    def rank_of(self, pid: int) -> int | None:
        """The rank in whose cgroup a process is, or in one below; None when in none of them."""
        _, _, below = procfs.cgroup_of(pid).partition(f"/aelastic-{self._run_id}/")
        rank = below.partition("/")[0]
        return int(rank) if rank.isdecimal() else None

    def close(self) -> None:
        """Remove all folders in which nobody is any more."""
        cgroupfs.remove(self.folder)


def choose_cgroups(containment: Containment, run_id: str, who: str) -> Cgroups | None:
    """The cgroups that a run is to try; None for the session.

    Raises:
        OSError: ENOTSUP, if they were asked for and there are none here.
    """
    if containment == "session":
        return None
    parent = own_folder()
    if parent and (containment == "cgroup" or is_delegated(parent)):
        return Cgroups(parent, run_id, asked=containment == "cgroup")
    if containment == "cgroup":
        raise _unavailable(who, "none of version 2 is mounted here", OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)))
    return None


def own_folder() -> str:
    """Where this process's cgroup is in the file system; empty where none of version 2 is mounted.

    Source: proc_pid_mountinfo(5): the fourth field is the cgroup that is mounted, the fifth where.
    """
    name = procfs.cgroup_of("self")
    for line in procfs.read("/proc/self/mountinfo").decode(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        if name and after.startswith("cgroup2 "):
            root, mounted = before.split(" ")[3:5]
            folder = f"{mounted}/{os.path.relpath(name, root)}" if name.startswith(root) else ""
            if folder and os.path.isdir(folder):
                return os.path.normpath(folder)
    return ""


def is_delegated(folder: str) -> bool:
    """Whether whoever manages the hierarchy has left this part of it to us."""
    for name in DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def usage_of(folder: str) -> ExitUsage:
    """What all that came from a worker has used: CPU always, the memory's peak where its controller is enabled."""
    microseconds = cgroupfs.counter(folder, "cpu.stat", "usage_usec")
    peak = procfs.read(f"{folder}/memory.peak").strip()
    return ExitUsage(
        cpu_seconds=None if microseconds is None else microseconds / 1e6,
        peak_rss_bytes=int(peak) if peak.isdigit() else None,
    )


def _unavailable(who: str, what: str, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{who} can't be started: StopPolicy.containment='cgroup' needs a cgroup for each worker, and {what}:"
        f" {error.strerror}; {REMEDY}",
    )
