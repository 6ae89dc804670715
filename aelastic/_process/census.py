"""Whose each process of the machine is: one look at /proc, and the evidence by which a process counts as ours.

Nothing is signalled here. A `Census` is asked in a thread, by one caller at a time (`Tree` sees to that).

Theory of operation. A process is of a rank when, at one look,
1. it was known to be before (same pid and start time), or is its leader; or it is in the rank's cgroup, if it has one;
2. it is in the leader's session or group and that number is certainly still the leader's: the leader has not been
   collected; or the process began before the last moment at which it had not; or the kernel says that the group of
   *that* pid has members; or somebody known to be ours is in that session, before and after the look. A number that
   was seen free may be a stranger's, so it is never trusted again;
3. it carries the run's lineage in its environment;
4. its parent is of the rank and was still there after the look.
What left the session, hides its environment (setproctitle(3) overwrites it) and has lost its parent before any look
saw it, is out of reach.

Source: credentials(7), proc(5); DESIGN section 6.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from .._child import cgroupfs, procfs
from .._child.procfs import Member
from .._results import Survivor
from . import platform
from .cgroups import Cgroups
from .handle import Process

Identity = tuple[int, int]
Origin = tuple[str, int]
"""The innermost run a process came from, and its rank there."""
STATES = {
    "D": "D (disk sleep)",
    "R": "R (running)",
    "S": "S (sleeping)",
    "T": "T (stopped)",
    "t": "t (tracing stop)",
    "Z": "Z (first thread ended, others run)",
}
LISTINGS = 5
"""How often one look lists /proc at the most, as long as there is somebody new."""
EXEC_LOOKS, EXEC_PAUSE = 20, 0.002
"""How often, and seconds apart, one look waits for processes that are just being executed to show what they are."""
UNCLAIMED = -1
"""The rank of what carries the run's lineage, when nothing tells whose it is: see `Sight.of`."""


@final
@dataclass(slots=True)
class Leader:
    """A worker's process, as a census knows it."""

    rank: int
    process: Process
    began_ticks: int = 0
    """Clock ticks since boot at which it was started, or a little later."""
    held_ticks: int = 0
    """Up to when a look found it uncollected; `Process.held_ticks` may know better."""


@final
@dataclass(frozen=True, slots=True)
class Sight:
    """What one look saw: live processes by rank; zombies are not among them."""

    by_rank: Mapping[int, tuple[Member, ...]] = field(default_factory=dict)
    groups: frozenset[int] = frozenset()
    """Process groups in which nobody else was seen."""
    populated: frozenset[int] = frozenset()
    """Ranks in whose cgroups somebody is alive, seen or not."""

    def of(self, rank: int, *, ended: bool) -> tuple[Member, ...]:
        """The live processes of a rank.

        Args:
            ended: whether its leader has ended. What nobody claims (of a nested run whose supervisor was lost before
                any look saw it) then counts too, so that it goes at the latest with the last rank.
        """
        return self.by_rank.get(rank, ()) + (self.by_rank.get(UNCLAIMED, ()) if ended else ())

    @property
    def everything(self) -> tuple[Member, ...]:
        """The live processes of the run."""
        return tuple(member for members in self.by_rank.values() for member in members)


class Blind(Exception):
    """What a look saw is not all there is."""


@final
class Census:
    """What is known of a run's processes from look to look.

    Args:
        run_id: what their lineage shows.
        cgroups: of the run, if it has any.
    """

    def __init__(self, run_id: str, cgroups: Cgroups | None = None) -> None:
        self.run_id = run_id
        self._cgroups = cgroups
        self.since = procfs.now_ticks() - 1
        """Start ticks: nothing of the run is older."""
        self._known: dict[Identity, int] = {}
        self._nested: dict[str, int] = {}
        """By id of a nested run: the rank it runs in."""

    def look(self, leaders: Sequence[Leader]) -> Sight:
        """Read /proc and say whose each process is.

        Raises:
            Blind: if it could not be read for lack of descriptors.
        """
        shortages, before = procfs.shortages.count, procfs.now_ticks()
        everybody, origins, inside = read_everybody(self.run_id, self.since, self._cgroups)
        if any(_runs(leader) and not self._is_new(leader.process.pid, everybody) for leader in leaders):
            self.since = 0  # this system's /proc has another clock
        seen = {member.pid: member for member in everybody if member.started >= self.since}
        seen.pop(os.getpid(), None)
        for leader in leaders:
            if _runs(leader):
                leader.held_ticks = before
        self._known = _Look(self.run_id, seen, origins, self._known | inside, self._nested).attribute(leaders)
        populated = {leader.rank for leader in leaders if _is_populated(leader.process.cgroup)}
        sight = self._sight(everybody, populated)
        if procfs.shortages.count != shortages:
            raise Blind("no descriptor was left to read /proc with")
        return sight

    def _is_new(self, pid: int, everybody: Iterable[Member]) -> bool:
        return any(member.pid == pid and member.started >= self.since for member in everybody)

    def _sight(self, everybody: Iterable[Member], populated: set[int]) -> Sight:
        by_rank: dict[int, list[Member]] = {}
        groups: dict[bool, set[int]] = {True: set(), False: set()}
        for member in everybody:
            rank = self._known.get(member.identity)
            groups[rank is not None].add(member.group)
            if rank is not None and _is_alive(member):
                by_rank.setdefault(rank, []).append(member)
        return Sight(
            {rank: tuple(members) for rank, members in by_rank.items()},
            frozenset(groups[True] - groups[False]),
            frozenset(populated),
        )


@final
class _Look:
    """The work of one look."""

    def __init__(
        self,
        run_id: str,
        seen: Mapping[int, Member],
        origins: Mapping[Identity, Origin],
        known: Mapping[Identity, int],
        nested: dict[str, int],
    ) -> None:
        self._origins = origins
        self._run_id = run_id
        self._seen = seen
        self._nested = nested
        self._ranks: dict[Identity, int] = {
            member.identity: known[member.identity] for member in seen.values() if member.identity in known
        }
        self._strays: list[Member] = []
        """Lineage, but no rank yet."""

    def attribute(self, leaders: Sequence[Leader]) -> dict[Identity, int]:
        """The rank of every process of the run, zombies included."""
        for leader in leaders:
            self._by_number(leader)
        for member in self._seen.values():
            if self._ranks.get(member.identity, UNCLAIMED) == UNCLAIMED and member.identity in self._origins:
                self._by_lineage(member, *self._origins[member.identity])
        for leader in leaders:
            self._by_session(leader)
        self._by_parent()
        for stray in self._strays:
            nested = self._origins[stray.identity][0]
            rank = self._ranks.setdefault(stray.identity, self._nested.get(nested, UNCLAIMED))
            if rank != UNCLAIMED:
                self._nested[nested] = rank
        return self._ranks

    def _by_number(self, leader: Leader) -> None:
        process = leader.process
        pidfd, held = process.pidfd, max(leader.held_ticks, process.held_ticks)
        uncollected = platform.is_uncollected(pidfd) if pidfd is not None else not process.exited.done()
        pinned = uncollected or (pidfd is not None and platform.is_pinned(pidfd))
        for member in self._seen.values():
            in_group, in_session = member.group == process.pid, member.session == process.pid
            if (in_session and (uncollected or member.started < held)) or (in_group and pinned):
                self._ranks[member.identity] = leader.rank

    def _by_lineage(self, member: Member, run_id: str, rank: int) -> None:
        if run_id == self._run_id and rank != UNCLAIMED:
            self._ranks[member.identity] = rank
        else:
            self._ranks.pop(member.identity, None)
            self._strays.append(member)

    def _by_session(self, leader: Leader) -> None:
        number = leader.process.pid
        others = [member for member in self._seen.values() if member.session == number]
        if any(member.identity in self._ranks and _is_still(member) for member in others):
            for member in others:
                self._ranks.setdefault(member.identity, leader.rank)

    def _by_parent(self) -> None:
        children: dict[int, list[Member]] = {}
        for member in self._seen.values():
            children.setdefault(member.parent, []).append(member)
        parents = [member for member in self._seen.values() if member.identity in self._ranks]
        while parents:
            parent = parents.pop()
            young = [child for child in children.get(parent.pid, ()) if child.identity not in self._ranks]
            if young and _is_still(parent):
                self._ranks |= dict.fromkeys((child.identity for child in young), self._ranks[parent.identity])
                parents += young


def read_everybody(
    run_id: str, since: int, cgroups: Cgroups | None
) -> tuple[list[Member], dict[Identity, Origin], dict[Identity, int]]:
    """Read every process; also those that were born while we were reading, so that nobody escapes by forking.

    Args:
        since: start ticks; the environment of what is older is not read.

    Returns:
        The processes; for those that carry the run's lineage what their environment says of their worker; for those
        in its cgroups their ranks.
    """
    read: set[int] = set()
    seen: list[Member] = []
    origins: dict[Identity, Origin] = {}
    inside: dict[Identity, int] = {}
    undecided: list[Member] = []
    for _ in range(LISTINGS):
        new = [pid for pid in procfs.pids() if pid not in read]
        read.update(new)
        for pid in new:
            member = procfs.read_member(pid, lineage=False)
            if member is None:
                continue
            seen.append(member)
            # At once, because who flees is gone after the look. A zombie has no environment any more.
            if not member.alive or member.started < since:
                continue
            if cgroups is not None and (rank := cgroups.rank_of(pid)) is not None:
                inside[member.identity] = rank
            if not _note_origin(member, run_id, origins):
                undecided.append(member)
        if not new:
            break
    for _ in range(EXEC_LOOKS):
        undecided = [member for member in undecided if not _note_origin(member, run_id, origins)]
        if not undecided:
            break
        time.sleep(EXEC_PAUSE)
    return seen, origins, inside


def _is_populated(cgroup: str) -> bool:
    return bool(cgroup) and cgroupfs.is_populated(cgroup)


def _note_origin(member: Member, run_id: str, origins: dict[Identity, Origin]) -> bool:
    """Note where a process that carries the run's lineage comes from; False when it can't tell yet."""
    if f":{run_id}:" in procfs.read_variable(member.pid, procfs.LINEAGE):
        run, rank = (procfs.read_variable(member.pid, name) for name in (b"AELASTIC_RUN_ID", b"AELASTIC_RANK"))
        origins[member.identity] = run, int(rank) if rank.isdecimal() else UNCLAIMED
        return True
    return not member.session or not procfs.is_being_executed(member.pid)  # kernel threads have no session


def _runs(leader: Leader) -> bool:
    pidfd = leader.process.pidfd
    return pidfd is not None and not platform.has_ended(pidfd)


def _is_still(member: Member) -> bool:
    """Whether the process is still there, so that its numbers meant the same during the whole look."""
    now = procfs.read_member(member.pid, lineage=False)
    return now is not None and now.identity == member.identity and now.session == member.session


def _is_alive(member: Member) -> bool:
    """False for a zombie; a process whose first thread has ended alone looks like one and isn't."""
    if member.alive:
        return True
    return len(procfs.names(f"/proc/{member.pid}/task")) > 1


def survivors(rank: int, members: Iterable[Member]) -> tuple[Survivor, ...]:
    """Who of these is still alive, read anew."""
    found: list[Survivor] = []
    for member in members:
        now = procfs.read_member(member.pid, lineage=False)
        if now is not None and now.identity == member.identity and _is_alive(now):
            found.append(_survivor(rank, now))
    return tuple(found)


def _survivor(rank: int, member: Member) -> Survivor:
    channel = procfs.wait_channel(member.pid)
    where = f" in {channel}" if channel else ""
    if member.state == "D":
        # The short name only: the command line is memory that the kernel may hold locked (proc_pid_cmdline(5)).
        command = f"[{procfs.read(f'/proc/{member.pid}/comm').decode(errors='replace').strip()}]"
        why = f"SIGKILL waits until the kernel's uninterruptible call{where} returns"
    elif not _may_signal(member.pid):
        command, why = procfs.command_of(member.pid), "it belongs to another user, whom this process may not signal"
    else:
        command, why = procfs.command_of(member.pid), "it was still alive when the last step's time was over"
    return Survivor(rank, member.pid, command, STATES.get(member.state, member.state) + where, why)


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return True


def holders(links: frozenset[str], since: int) -> tuple[int, ...]:
    """The pids of processes, other than ours, that hold one of these pipes open, as far as we may see."""
    return tuple(
        member.pid
        for member in procfs.members(lineage=False)
        if member.pid != os.getpid() and member.started >= since and _holds(member.pid, links)
    )


def _holds(pid: int, links: frozenset[str]) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{fd}") in links for fd in os.listdir(folder))
    except OSError:
        return False
