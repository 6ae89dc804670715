"""The guard: a process that ends what a killed supervisor left behind. Run as a file; the standard library only.

One for each supervisor process, shared by all its runs. It waits, using no CPU, for two signs of the supervisor's
death: its pidfd (a host that forked leaves the pipe open in its child) and the end of the lifeline pipe (a host that
exec'd lives on under its pid). The pipe also tells it what to look after, one line a fact:

    run RUN_ID POLICY GRACE SIGNAL SINCE JOURNAL CGROUP    its begin; two paths in hexadecimal, or -
    worker RUN_ID RANK PID HELD INODE                      when the pid was certainly its own; of its pidfds
    end RUN_ID                                             nothing of this run is left

Times are clock ticks since boot.

It has a session of its own, ignores SIGTERM, SIGINT and SIGHUP, and holds no directory, no terminal and no worker's
output, so that neither a Ctrl-C, nor a service stop, nor an unmount meets it. Whoever waits for output never waits
for it.

Usage: `python -I -S guard.py SUPERVISOR_PID LIFELINE_FD`
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # has no stub; loading `signal` takes 4 ms more
import os
import select
import sys
import time

if __name__ == "__main__":  # as a file it has no package (PEP 366); -I keeps its directory off the path
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    __package__ = "_child"

from .ledger import Leader, Ledger
from .orphans import Orphans, end_all, record, write_records

CHUNK = 64 * 1024
TOGETHER_SECONDS = 0.01
"""How long it reads nothing after a read: woken by each line of many, it would take the processor from those who
start. What waits in the pipe is read before anything is done about a death."""


class Guard:
    """Watches one supervisor.

    Args:
        supervisor: pid of the parent that started it.
        lifeline: read end of the pipe.
    """

    def __init__(self, supervisor: int, lifeline: int) -> None:
        self._supervisor = supervisor
        self._lifeline = lifeline
        self._ledger = Ledger()
        self._poll = select.poll()
        self._workers: dict[int, Leader] = {}
        self._resumes = 0.0
        """When it listens again, on the monotonic clock; 0 while it does."""
        os.set_blocking(lifeline, False)
        self._poll.register(lifeline, select.POLLIN)

    def watch(self) -> str:
        """Return when the supervisor is dead, with the sign of it."""
        try:
            sentry = os.pidfd_open(self._supervisor)
            self._poll.register(sentry, select.POLLIN)
        except (OSError, AttributeError):
            sentry = -1  # dead already, or a system without pidfds: the pipe tells
        if os.getppid() != self._supervisor:  # it died before the line above: the pid may be another's
            self._listen()
            return "it has ended"
        while True:
            ready = {fd for fd, _ in self._poll.poll(self._rest())}
            for fd in ready & self._workers.keys():  # ended, or closed because the rank has a new worker
                self._poll.unregister(fd)
                self._workers.pop(fd).exited()
            if self._lifeline in ready:
                if not self._listen():
                    return "it closed its lifeline"
                self._poll.unregister(self._lifeline)
                self._resumes = time.monotonic() + TOGETHER_SECONDS
            if sentry in ready:
                self._listen()
                return "it has ended"

    def _rest(self) -> float | None:
        """Milliseconds until the pipe is to be listened to again; None when it is listened to."""
        if not self._resumes:
            return None
        left = (self._resumes - time.monotonic()) * 1000
        if left > 0:
            return left
        self._resumes = 0.0
        self._poll.register(self._lifeline, select.POLLIN)
        return None

    def _listen(self) -> bool:
        """Read all that is in the pipe; False at its end."""
        while True:
            try:
                chunk = os.read(self._lifeline, CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            for leader in self._ledger.feed(chunk):
                self._poll.register(leader.fd, select.POLLIN)
                self._workers[leader.fd] = leader

    def act(self, sign: str) -> None:
        """Apply each run's `on_supervisor_death` to all that is alive of it, then write what was done."""
        now = time.monotonic()
        orphans = [Orphans(run, now) for run in self._ledger.runs.values()]
        opening = {
            each.run.run_id: record(
                "SupervisorDied", each.run.run_id, pid=self._supervisor, reason=sign, policy=each.run.policy
            )
            for each in orphans
        }
        end_all(orphans)
        for each in orphans:  # at the very end: a stalled disk must not stay the hand
            if each.run.journal:
                write_records(each.run.journal, [opening[each.run.run_id], *each.records])


def main() -> None:
    """Guard until the supervisor is dead, act, and exit."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _raise_descriptor_limit()
    guard = Guard(int(sys.argv[1]), int(sys.argv[2]))
    guard.act(guard.watch())
    os._exit(0)  # nothing to clean up, and tearing the interpreter down takes longer than all the rest


def _raise_descriptor_limit() -> None:
    """Have room for a pidfd of every worker of a large host."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
