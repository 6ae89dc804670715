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
        _memory.append(_open_memory())
    except OSError:
        return  # a sandbox, or no descriptor is left
    faulthandler.register(SIGNAL, file=_memory[0], all_threads=True)


def _open_memory() -> int:
    """Memory that is only ever written at its end: the supervisor empties it before it asks."""
    fd = os.memfd_create(MEMORY)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    finally:
        os.close(fd)
