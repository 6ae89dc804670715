"""Be ready to show the stacks of all threads on a signal, also while the interpreter is locked by C code.

faulthandler writes them from the signal's handler itself, into memory that the supervisor reads through /proc. Not
to a file or stream: who closes descriptors that it doesn't know would let them come out in whatever got the number
next, and the supervisor sees whether the memory is still open. Linux only; elsewhere nothing happens.

Source: faulthandler.register, memfd_create(2).
"""

from __future__ import annotations

import faulthandler
import os

SIGNAL = 44
"""A real-time signal that neither libc nor Python nor a usual runtime claims: SIGRTMIN + 10 of glibc (signal(7))."""
MEMORY = "aelastic-stacks"

_memory: list[int] = []  # kept for as long as the process lives


def show_on_signal(*, forked: bool = False) -> None:
    """Prepare a worker of a run; not twice, and not where the program has a handler of its own for the signal.

    Args:
        forked: this process was just forked, and what its parent prepared is the parent's.
    """
    import _signal  # type: ignore[import-not-found]  # has no stub; the public module costs 3 ms

    if forked:
        faulthandler.unregister(SIGNAL)
        for fd in _memory:
            os.close(fd)
        _memory.clear()
    if _memory or "AELASTIC_RANK" not in os.environ or not hasattr(os, "memfd_create"):
        return
    if SIGNAL not in _signal.valid_signals() or _signal.getsignal(SIGNAL) != _signal.SIG_DFL:
        return
    try:
        fd = os.memfd_create(MEMORY)
    except OSError:
        return  # a sandbox, or no descriptor is left
    _append_only(fd)
    _memory.append(fd)
    faulthandler.register(SIGNAL, file=fd, all_threads=True)


def _append_only(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
