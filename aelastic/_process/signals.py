"""Signals to processes that were found in /proc: each checked before, and each through a descriptor of its own.

Blocking (it reads /proc again): runs in threads.
"""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Collection, Sequence
from typing import final

from .._child import procfs
from .._child.procfs import Member
from . import platform

CHASES, NEWEST = 20, 4
"""How often, and among how many of the newest processes, a member of a group is looked for."""


@final
class Groups(enum.Enum):
    """Whether whole groups are signalled, which nobody in them can outrun by forking (kill(2) is atomic there)."""

    NONE = enum.auto()
    LED = enum.auto()
    """Those whose leader is alive: through its descriptor, which never means another group."""
    ALL = enum.auto()
    """Others by number too, directly after a member was seen in it: for what forks faster than it is found."""


def signal_members(
    members: Sequence[Member], sig: int, groups: Groups, only_ours: Collection[int], run_id: str
) -> tuple[int, ...]:
    """Signal each process, unless its pid means another one by now; SIGCONT follows every signal but SIGKILL.

    Args:
        groups: whether their groups are signalled first.
        only_ours: the groups in which nobody else was seen.
        run_id: in the lineage of the run's processes.

    Returns:
        The pids that were signalled.
    """
    pids = {member.pid for member in members}
    if groups is not Groups.NONE:
        for group in {member.group for member in members}.intersection(only_ours):
            if group in pids:
                _signal_led(next(member for member in members if member.pid == group), sig)
            elif groups is Groups.ALL:
                _signal_orphaned(group, [member for member in members if member.group == group], sig, run_id)
    return tuple(member.pid for member in members if _signal_one(member, sig))


def _open(member: Member) -> int | None:
    """A descriptor of exactly this process."""
    try:
        pidfd = platform.open_pidfd(member.pid)
    except OSError:
        return None  # no descriptor is left; it is tried again with the next look
    if pidfd is not None and _read_again(member) is None:
        os.close(pidfd)
        return None
    return pidfd


def _read_again(member: Member) -> Member | None:
    now = procfs.read_member(member.pid, lineage=False)
    return now if now is not None and now.identity == member.identity else None


def _signal_one(member: Member, sig: int) -> bool:
    pidfd = _open(member)
    if pidfd is None:
        return False
    try:
        hit = platform.signal_process(pidfd, sig)
        if hit and sig != signal.SIGKILL:
            platform.signal_process(pidfd, signal.SIGCONT)
        return hit
    finally:
        os.close(pidfd)


def signal_alone(member: Member, sig: int) -> bool:
    """Signal one process and do nothing else, unless its pid means another one by now; False then."""
    pidfd = _open(member)
    if pidfd is None:
        return False
    try:
        return platform.signal_process(pidfd, sig)
    finally:
        os.close(pidfd)


def _signal_led(leader: Member, sig: int) -> None:
    pidfd = _open(leader)
    if pidfd is None:
        return
    try:
        platform.signal_group(pidfd, leader.group, sig)
    finally:
        os.close(pidfd)


def _signal_orphaned(group: int, members: Sequence[Member], sig: int, run_id: str) -> None:
    if any((now := _read_again(member)) is not None and now.group == group for member in members):
        platform.killpg(group, sig)
        return
    for _ in range(CHASES):  # who was seen has forked and gone: its descendants are the newest processes there are
        newest = procfs.last_pid()
        for pid in range(newest, max(newest - NEWEST, 1), -1):
            member = procfs.read_member(pid)
            if member is not None and member.alive and member.group == group and member.carries(run_id):
                platform.killpg(group, sig)
                return
