"""Limits that a start runs into, in sentences: before it begins where that can be known, else afterwards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Iterable

from ._child import procfs

A_START_NEEDS = 10
"""Descriptors that one spawn holds at the most while it is under way, those it keeps included: three copies, two
pipes, two pidfds on uvloop, fewer on asyncio."""


def check_descriptors(needed: int, who: str) -> None:
    """Raise unless this process may open as many descriptors as a start needs.

    Args:
        needed: descriptors that the start adds to those that are open.
        who: the run, for the text.

    Raises:
        OSError: EMFILE, naming resource, limit, what is open and what is needed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    used = open_descriptors()
    if used + needed > soft:
        raise OSError(
            errno.EMFILE,
            f"{who} can't be started: it needs {needed} descriptors, and {used} of the {soft} that this process may"
            f" have open are in use (RLIMIT_NOFILE, soft; hard: {hard}); raise the limit, or start fewer ranks",
        )


def make_room(needed: int) -> None:
    """Let the kernel's table of our descriptors grow for so many more, once and now; never fails.

    In a process with threads each growth waits for all processors of the machine (expand_files in fs/file.c), for 5 to
    20 ms: not for the loop's own thread then, and better before the pipes are opened than in the midst of it. While
    there is one thread (`has_one_thread`) it takes microseconds.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    last = open_descriptors() + needed
    if soft != resource.RLIM_INFINITY:
        last = min(last, soft - 1)
    with contextlib.suppress(OSError), open(os.devnull, "rb", buffering=0) as some:
        os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, last))


def has_one_thread() -> bool:
    """Whether this process has no thread but this one, be it of the interpreter or not; False where nobody tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task")) == 1
    return False


def check_open(fds: Iterable[int], who: str) -> None:
    """Raise unless each of these descriptors is open in this process.

    Args:
        who: the run, for the text.

    Raises:
        OSError: EBADF, naming the first that is not.
    """
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError as error:
            text = f"{who} can't be started: descriptor {fd} of WorkerOptions.pass_fds is not open in this process"
            raise OSError(error.errno, text) from None


def check_one_start(fd: int) -> None:
    """Raise unless one spawn finds descriptors enough: uvloop leaks those it has taken when it finds no more.

    Args:
        fd: any that is open; it is copied.

    Raises:
        OSError: EMFILE or ENFILE.
    """
    copies: list[int] = []
    try:
        for _ in range(A_START_NEEDS):
            copies.append(os.dup(fd))  # noqa: PERF401  # those taken before an error are closed
    finally:
        for copy in copies:
            os.close(copy)


def open_descriptors() -> int:
    """How many descriptors this process holds; 0 where the system doesn't tell."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder)) - 1  # the one that lists them is among them
        except OSError:
            continue
    return 0


def shortage(number: int) -> str:
    """What ran out, how much there is of it and what a start needs; empty for an errno that is no shortage."""
    match number:
        case errno.EMFILE:
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"no descriptor is left: this process may have {soft} open (RLIMIT_NOFILE) and a start needs"
                f" {A_START_NEEDS}; raise the limit, or start fewer ranks"
            )
        case errno.ENFILE:
            limit = _kernel_limit("fs/file-max")
            return f"no descriptor is left in the whole system, which may have {limit} open (fs.file-max)"
        case errno.EAGAIN:
            soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            of_user = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
            return (
                f"no process or thread can be added: this user may have {of_user} (RLIMIT_NPROC), the system"
                f" {_kernel_limit('kernel/pid_max')} (kernel.pid_max), the cgroup what its pids.max says"
            )
        case errno.ENOMEM:
            return "the kernel has no memory left for another process"
        case _:
            return ""


def as_start_error(error: BaseException, who: str) -> BaseException:
    """A shortage as a sentence that names who could not be started; what says so already, or is none, stays."""
    number = error.errno or 0 if isinstance(error, OSError) else 0
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    if not shortage(number) or "can't be started" in str(error) or "could not be started" in str(error):
        return error
    return OSError(number, f"{who} can't be started: {shortage(number)}")


def _kernel_limit(name: str) -> str:
    return procfs.read(f"/proc/sys/{name}").decode().strip() or "an unknown number"
