"""The figures of one rank's tree, through psutil. Blocks: called in threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import psutil

from .._child import procfs
from .._child.procfs import Member
from .._results import ExitUsage, Usage


def read_tree(pid: int, members: Sequence[Member]) -> tuple[Usage, ExitUsage] | None:
    """Read a tree: its usage, and what there is to tell if the worker ends now.

    Memory that processes share counts in each of them. The CPU time of a process that has ended is its parent's, once
    the parent has collected it.

    Args:
        pid: the worker's own process.
        members: of its tree, as they were seen in /proc; empty where there is none.

    Returns:
        None when nothing of it is there any more.
    """
    usages: list[Usage] = []
    own = ExitUsage()
    for process in _processes(pid, members):
        with contextlib.suppress(psutil.Error), process.oneshot():
            usages.append(_usage(process))
            if process.pid == pid:
                times = process.cpu_times()
                own = ExitUsage(times.user + times.system, _peak_bytes(pid))
    if not usages:
        return None
    total = Usage(
        cpu_seconds=sum(usage.cpu_seconds for usage in usages),
        rss_bytes=sum(usage.rss_bytes for usage in usages),
        threads=sum(usage.threads for usage in usages),
        descriptors=sum(usage.descriptors for usage in usages),
        processes=len(usages),
    )
    return total, ExitUsage(own.cpu_seconds, max(total.rss_bytes, own.peak_rss_bytes or 0))


def _processes(pid: int, members: Sequence[Member]) -> Iterator[psutil.Process]:
    """The processes of a tree, each the one that was seen and no later one with its number."""
    if not members:
        with contextlib.suppress(psutil.Error):
            leader = psutil.Process(pid)
            yield from [leader, *leader.children(recursive=True)]
    for member in members:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(member.pid)
            if procfs.started_ticks(member.pid) == member.started:
                yield process


def _usage(process: psutil.Process) -> Usage:
    times = process.cpu_times()
    collected = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    try:
        descriptors = process.num_fds()
    except psutil.AccessDenied:  # another user's
        descriptors = 0
    return Usage(
        cpu_seconds=times.user + times.system + collected,
        rss_bytes=process.memory_info().rss,
        threads=process.num_threads(),
        descriptors=descriptors,
        processes=1,
    )


def _peak_bytes(pid: int) -> int | None:
    """The most memory that a process had so far (proc_pid_status(5) `VmHWM`); a zombie doesn't tell it any more."""
    for line in procfs.read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
