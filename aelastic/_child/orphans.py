"""What a dead supervisor left behind: finding it, ending it, saying so. The standard library only.

Used by the guard alone, which tells it of runs and workers. Every process is signalled through a pidfd of its own that
was opened before the process was read and judged a second time: whoever got a freed pid meanwhile is never hit.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # has no stub; loading `signal` takes 4 ms more
import os
import select
import time

from . import cgroupfs, procfs
from .ledger import Run
from .procfs import Member

PATIENCE = 5.0
"""Seconds after the first SIGKILL until what is left is reported and left alone."""
QUIET = 2
"""Scans in a row that must find nothing: a process that is just being exec'd shows no environment."""
PAUSE = 0.03
"""Seconds between two scans at the least; a scan of a large machine is followed by a longer rest."""
CHASES, NEWEST = 8, 32
"""How often in each round the newest processes are looked at once more, and how many of them."""
RECORDS = 1000
"""Signals that a journal lists one by one."""


class Held:
    """A process of the run, held by its pidfd so that its pid can't come to mean another."""

    def __init__(self, fd: int, member: Member, rank: int | None) -> None:
        self.fd = fd
        self.member = member
        self.rank = rank
        self.sent: set[int] = set()
        self.why = ""

    def ended(self) -> bool:
        """Whether it has ended, collected or not."""
        if self.fd < 0:
            now = procfs.read_member(self.member.pid, lineage=False)
            return now is None or now.identity != self.member.identity or not now.alive
        return _readable(self.fd, 0)

    def send(self, sig: int) -> bool:
        """Send a signal once; False when it was sent before or could not be."""
        if sig in self.sent:
            return False
        self.sent.add(sig)
        try:
            if self.fd >= 0:
                signal.pidfd_send_signal(self.fd, sig)
            elif not self.ended():
                os.kill(self.member.pid, sig)
        except OSError as error:
            self.why = str(error)
            return False
        return True

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)


class Orphans:
    """Everything alive of one run, from the supervisor's death until nothing is left.

    Args:
        now: monotonic seconds at which the supervisor was seen to be dead.
    """

    def __init__(self, run: Run, now: float) -> None:
        self.run = run
        self.records: list[dict[str, object]] = []
        self.over = run.policy == "keep"
        self.kill_at = now + (run.grace if run.policy == "stop" else 0.0)
        self._born_by = procfs.now_ticks()
        self._held: dict[int, Held] = {}
        self._count = 0
        self._quiet = 0
        self._killing = False
        self._sighted = False
        self._shortages = procfs.shortages.count

    @property
    def fds(self) -> list[int]:
        """The pidfds to wait on for ends."""
        return [held.fd for held in self._held.values() if held.fd >= 0]

    def strike(self, now: float) -> None:
        """Begin a round; when it is time to kill, kill cgroups and groups as one, before anything is looked for.

        Nobody can fork a way out of that.

        Args:
            now: monotonic seconds.
        """
        self._killing = now >= self.kill_at
        self._sighted = False
        for pid in [pid for pid, held in self._held.items() if held.ended()]:
            self._held.pop(pid).close()
        if self._killing and self.run.cgroup:
            cgroupfs.kill(self.run.cgroup)
        for leader in self.run.leaders.values():
            if self._killing:
                leader.signal_group(signal.SIGKILL)
        for held in self._held.values():
            self._send(held)

    def meet(self, member: Member) -> bool:
        """Hold a process that is ours and new, and send it what is due, at once; whether that is what it was."""
        if member.started < self.run.since or not self._is_new(member):
            return False
        # Who was seen but has ended before it could be held may have forked meanwhile.
        self._sighted = True
        return self._take(member)

    def conclude(self, now: float) -> None:
        """End a round: see whether anything is left, or whether it is time to give up."""
        blind, self._shortages = procfs.shortages.count != self._shortages, procfs.shortages.count
        busy = self._held or self._sighted or blind or cgroupfs.is_populated(self.run.cgroup)
        self._quiet = 0 if busy else self._quiet + 1
        if self._quiet >= QUIET:
            self._note("OrphansGone", processes=self._count)
            cgroupfs.remove(self.run.cgroup)
            self.over = True
        elif now >= self.kill_at + PATIENCE:
            self._note("SurvivorsLeft", survivors=[_survivor(held) for held in self._held.values()])
            self.over = True

    def _is_new(self, member: Member) -> bool:
        return member.pid not in self._held and member.alive and self._is_ours(member)

    def _is_ours(self, member: Member) -> bool:
        if member.pid == os.getpid():
            return False
        parent = self._held.get(member.parent)
        return (
            member.carries(self.run.run_id)
            or self.run.contains(member.pid)
            or self.run.leader_of(member) is not None
            or (parent is not None and not parent.ended())
        )

    def _take(self, member: Member) -> bool:
        """Hold a process, if it is still the one that was judged."""
        fd = procfs.open_pidfd(member.pid)
        now = procfs.read_member(member.pid)
        if now is None or not now.alive or now.identity != member.identity or not self._is_ours(now):
            if fd >= 0:
                os.close(fd)
            return False
        leader = self.run.leader_of(now)
        held = self._held[now.pid] = Held(fd, now, leader.rank if leader else self._rank(now))
        self._count += 1
        self._send(held)
        return True

    def _rank(self, member: Member) -> int | None:
        """The rank that its environment names, unless that is a nested run's."""
        if procfs.read_variable(member.pid, b"AELASTIC_RUN_ID") == self.run.run_id:
            rank = procfs.read_variable(member.pid, b"AELASTIC_RANK")
            return int(rank) if rank.isdecimal() else None
        parent = self._held.get(member.parent)
        return parent.rank if parent else None

    def _send(self, held: Held) -> None:
        # What began after the question is most likely somebody's way of obeying it.
        if not self._killing and held.member.started > self._born_by:
            return
        sig = signal.SIGKILL if self._killing else self.run.first
        if held.send(sig) and len(self.records) < RECORDS:
            self._note("WorkerSignaled", rank=held.rank, pid=held.member.pid, signal=int(sig), reason="orphaned")
        if not self._killing:
            held.send(signal.SIGCONT)

    def _note(self, event: str, **fields: object) -> None:
        self.records.append(record(event, self.run.run_id, **fields))


def end_all(orphans: list[Orphans]) -> None:
    """Bring every run to its end, side by side: asked, killed after its grace, reported."""
    while pending := [each for each in orphans if not each.over]:
        began = time.monotonic()
        for each in pending:
            each.strike(began)
        _look(pending)
        for _ in range(CHASES):
            _chase(pending)
        for each in pending:
            each.conclude(began)
        now = time.monotonic()
        pauses = [max(PAUSE, 2 * (now - began)), *(each.kill_at - now for each in pending if each.kill_at > began)]
        _wait([fd for each in pending for fd in each.fds], now + min(pauses))


def _look(pending: list[Orphans]) -> None:
    """Read every process of the machine once."""
    since = min(each.run.since for each in pending)
    everyone = []
    for pid in procfs.pids():
        member = procfs.read_member(pid, since=since)
        if member is not None and member.started >= since:
            everyone.append(member)
            for each in pending:
                each.meet(member)
    for each in pending:  # children of what was found are ours too, whatever they made of environment and session
        while any([each.meet(member) for member in everyone]):  # noqa: C419  # all of them, not up to the first
            pass


def _chase(pending: list[Orphans]) -> None:
    """Read the newest processes only: who flees by forking is among them, and gone when all others have been read."""
    last = procfs.last_pid()
    for pid in range(last, max(last - NEWEST, 0), -1):
        member = procfs.read_member(pid)
        if member is not None:
            for each in pending:
                each.meet(member)


def _wait(fds: list[int], deadline: float) -> None:
    """Wait until all processes have ended, or until the deadline; that one at least when there are none."""
    if not fds:
        time.sleep(max(0.0, deadline - time.monotonic()))
    for fd in fds:
        if not _readable(fd, max(0.0, deadline - time.monotonic())):
            return


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _survivor(held: Held) -> dict[str, object]:
    pid = held.member.pid
    now = procfs.read_member(pid, lineage=False)
    channel = procfs.wait_channel(pid)
    return {
        "rank": held.rank,
        "pid": pid,
        "command": procfs.command_of(pid),
        "state": (now.state if now else "gone") + (f" in {channel}" if channel else ""),
        "why": held.why or f"it outlived SIGKILL for {PATIENCE:g} s",
    }


def record(event: str, run_id: str, **fields: object) -> dict[str, object]:
    """A line of the journal, shaped like the events of a living supervisor."""
    from datetime import UTC, datetime  # imported when somebody has died, to keep the boot short

    at = datetime.now(UTC).isoformat()
    return {"event": event, "at": at, "monotonic_ns": time.monotonic_ns(), "run_id": run_id, **fields}


def write_records(journal: str, records: list[dict[str, object]]) -> None:
    """Append lines to a journal, after a line that the supervisor perhaps left unfinished."""
    import json

    lines = "".join(json.dumps(each) + "\n" for each in records).encode()
    try:
        fd = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # the directory is gone: nobody is left who could be told
        return
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, b"\n" * torn + lines)
    except OSError:
        pass
    finally:
        os.close(fd)
