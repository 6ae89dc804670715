"""What differs between operating systems and kernels, one function each; nothing else looks at the platform.

Linux has pidfds, which never name a stranger. Elsewhere a process is known by its pid, which is safe only until it is
collected; what is lost there is told in each docstring.

Source: pidfd_open(2), pidfd_send_signal(2), waitid(2), PIDFD_GET_INFO in <linux/pidfd.h>.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
import sys

from .._child import procfs
from .._exit import ExitStatus

LINUX = sys.platform == "linux"
PIDFD_SIGNAL_PROCESS_GROUP = 4
"""Linux 6.9: the group whose number the process gave, also after the process was collected."""
PIDFD_GET_INFO = 0xC040FF0B
"""_IOWR(0xFF, 11, struct pidfd_info) of 64 bytes, its first version."""
PIDFD_INFO_EXIT = 1 << 3
"""Linux 6.15: the wait status, once the process was collected."""
EXIT_RECORD = struct.Struct("=QQ11Ii")
"""mask, cgroup id, eleven ids, wait status."""


def open_pidfd(pid: int) -> int | None:
    """A descriptor of a process; None where there are none, or the process was collected already.

    Raises:
        OSError: EMFILE or ENFILE, if no descriptor is left.
    """
    if not LINUX:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None  # ESRCH: collected; EINVAL: a thread; ENOSYS: before Linux 5.3; EPERM: a sandbox


def open_child(pid: int) -> int | None:
    """A descriptor of a child of ours that nobody has collected yet; otherwise as `open_pidfd`.

    A short child may be gone before we come here, and its number another process's.
    """
    pidfd = open_pidfd(pid)
    if pidfd is not None and not is_uncollected(pidfd):
        os.close(pidfd)
        return None
    return pidfd


def is_uncollected(pidfd: int) -> bool:
    """Whether this is a child of ours, running or dead, that nobody has waited for."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except OSError:
        return False
    return True


def is_uncollected_child(pid: int) -> bool:
    """The same by number, for where there are no pidfds."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except OSError:
        return False
    return True


def children() -> list[int]:
    """The children of this thread that nobody has collected; empty where the kernel doesn't list them."""
    return [int(pid) for pid in procfs.read("/proc/thread-self/children").split()]


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended with all its threads, collected or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def peek_status(pidfd: int) -> ExitStatus | None:
    """The status of a child of ours that has ended, without collecting it; None once somebody has collected it."""
    try:
        waited = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except OSError:
        return None
    return None if waited is None else _status_of(waited)


def collect(pidfd: int) -> ExitStatus:
    """Collect a child of ours that has ended; unknown where somebody else did. By its number another could be meant."""
    try:
        waited = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ExitStatus(None, None)
    return ExitStatus(None, None) if waited is None else _status_of(waited)


def _status_of(waited: os.waitid_result) -> ExitStatus:
    if waited.si_code == os.CLD_EXITED:
        return ExitStatus(waited.si_status, None)
    return ExitStatus(None, waited.si_status)


def collected_status(pidfd: int) -> ExitStatus | None:
    """The status of a process that somebody has collected; None where the kernel doesn't keep it."""
    if not LINUX:
        return None
    import fcntl  # noqa: PLC0415  # not there on every platform

    record = bytearray(EXIT_RECORD.pack(PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, record)
    except OSError:
        return None
    mask, *_, wait_status = EXIT_RECORD.unpack(record)
    return ExitStatus.from_wait_status(wait_status) if mask & PIDFD_INFO_EXIT else None


def signal_group(pidfd: int, group: int, sig: int) -> bool:
    """Signal the group whose number a process gave, never another one that got the number later.

    Before Linux 6.9 only while the leader is not collected, which keeps the number from being given away.

    Returns:
        False when nobody is in the group, or nobody whom we may signal.
    """
    try:
        signal.pidfd_send_signal(pidfd, sig, None, PIDFD_SIGNAL_PROCESS_GROUP)
    except (ProcessLookupError, PermissionError):
        return False
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return is_uncollected(pidfd) and killpg(group, sig)
    return True


def signal_group_of_child(pid: int, sig: int) -> bool:
    """Signal the group of a child without a pidfd, while nobody has collected the child."""
    return is_uncollected_child(pid) and killpg(pid, sig)


def killpg(group: int, sig: int) -> bool:
    """Signal a group by its number; only where the number is known to mean this group."""
    try:
        os.killpg(group, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_process(pidfd: int, sig: int) -> bool:
    """Signal one process; False when it is gone, or we may not."""
    try:
        signal.pidfd_send_signal(pidfd, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def is_pinned(pidfd: int) -> bool:
    """Whether anybody, zombies included, is still in the group whose number the process gave."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, 0, None, PIDFD_SIGNAL_PROCESS_GROUP)
        return True
    return False
