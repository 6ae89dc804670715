"""What the guard was told: runs, their workers, and whose number is whose. The standard library only."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # has no stub; loading `signal` takes 4 ms more
import os

from . import procfs
from .procfs import Member

PIDFD_SIGNAL_PROCESS_GROUP = 4
"""Source: pidfd_send_signal(2), Linux 6.9."""


class Leader:
    """A worker's first process, whose pid is also the number of its group and session.

    The number is given away only when nobody bears it any more, as pid, group or session. So whoever has it in one of
    these is of this worker, if it began while the number was certainly the worker's, or if it certainly still is.

    Args:
        held: clock ticks at which the pid was certainly its own.
        inode: of its pidfds, see `procfs.inode_of`; 0 when that isn't known.
    """

    def __init__(self, rank: int, pid: int, held: int, inode: int) -> None:
        self.rank = rank
        self.pid = pid
        self.held = held
        """Clock ticks until which the number is known to have been its own."""
        self.fd = procfs.open_pidfd(pid)
        if self.fd >= 0 and not self._is_meant(inode):
            self.close()

    def _is_meant(self, inode: int) -> bool:
        found = procfs.inode_of(self.fd)
        if inode and found:
            return found == inode
        started = procfs.started_ticks(self.pid)  # read after the pidfd was opened
        return started is not None and started <= self.held

    def exited(self) -> None:
        """Learn that it has ended: somebody may have collected it by now, and the number be another's."""
        now = procfs.now_ticks()
        if self._is_uncollected():
            self.held = now

    def _is_uncollected(self) -> bool:
        """Whether the process itself, running or dead, still has the number."""
        try:
            signal.pidfd_send_signal(self.fd, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True

    def claims(self, member: Member) -> bool:
        """Whether a process in its group or session is its descendant, and not of a later owner of the number."""
        return member.started < self.held or (self.fd >= 0 and (self.signal_group(0) or self._is_uncollected()))

    def signal_group(self, sig: int) -> bool:
        """Signal its group as one, also after its own end; False when nobody is in it, or the kernel can't."""
        if self.fd < 0:
            return False
        try:
            signal.pidfd_send_signal(self.fd, sig, None, PIDFD_SIGNAL_PROCESS_GROUP)
        except PermissionError:
            return True
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Run:
    """A run as the supervisor described it.

    Args:
        policy: `stop`, `kill` or `keep`.
        grace: seconds between `first` and SIGKILL.
        first: number of the signal that asks.
        since: clock ticks at which it began; what is older is none of it.
        journal: path of the journal; empty when there is none.
        cgroup: the folder that holds its cgroups; empty when it has none.
    """

    def __init__(
        self, run_id: str, policy: str, grace: float, first: int, since: int, journal: str, cgroup: str
    ) -> None:
        self.run_id = run_id
        self.since = since
        self.policy = policy
        self.grace = grace
        self.first = first
        self.journal = journal
        self.cgroup = cgroup
        self.leaders: dict[int, Leader] = {}
        """By rank."""
        self._by_pid: dict[int, Leader] = {}

    def employ(self, leader: Leader) -> None:
        """Take note of a worker; the former one of its rank, and all that came from it, is known to be gone."""
        former = self.leaders.get(leader.rank)
        if former is not None:
            if self._by_pid.get(former.pid) is former:  # its number may be another rank's by now
                del self._by_pid[former.pid]
            former.close()
        self.leaders[leader.rank] = self._by_pid[leader.pid] = leader

    def leader_of(self, member: Member) -> Leader | None:
        """The worker whose group or session a process is in."""
        for number in (member.group, member.session):
            leader = self._by_pid.get(number)
            if leader is not None and leader.claims(member):
                return leader
        return None

    def contains(self, pid: int) -> bool:
        """Whether a process is in one of its cgroups."""
        return bool(self.cgroup) and f"/{os.path.basename(self.cgroup)}/" in procfs.cgroup_of(pid)

    def close(self) -> None:
        """Forget its workers."""
        for leader in self.leaders.values():
            leader.close()
        self.leaders.clear()
        self._by_pid.clear()


class Ledger:
    """What the supervisor told, line by line."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self._unfinished = b""

    def feed(self, chunk: bytes) -> list[Leader]:
        """Read a piece of the pipe.

        Returns:
            Workers that are alive and new.
        """
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        employed = [self._read(line.decode().split(" ")) for line in lines]
        return [leader for leader in employed if leader is not None and leader.fd >= 0]

    def _read(self, words: list[str]) -> Leader | None:
        match words:
            case ["run", run_id, policy, grace, first, since, *paths]:
                journal, cgroup = ("" if path == "-" else os.fsdecode(bytes.fromhex(path)) for path in paths)
                self.runs[run_id] = Run(run_id, policy, float(grace), int(first), int(since), journal, cgroup)
            case ["worker", run_id, rank, pid, held, inode] if run_id in self.runs:
                leader = Leader(int(rank), int(pid), int(held), int(inode))
                self.runs[run_id].employ(leader)
                return leader
            case ["end", run_id] if run_id in self.runs:
                self.runs.pop(run_id).close()
        return None
