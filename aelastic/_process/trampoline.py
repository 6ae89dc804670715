"""The way into a program for what fork and exec can't set: which launches need it, and whether it arrived.

The trampoline itself is `_child/trampoline.py`, a bare interpreter that applies the settings and becomes the program.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # has no stub
import asyncio
import errno
import os
import signal
import sys
from collections.abc import Mapping
from typing import final

from .._child import trampoline as program
from .._descriptors import close_fd, open_pipe
from .._options import WorkerOptions

NUMBERS = tuple(range(1, signal.NSIG))
RESTORED = frozenset({signal.SIGPIPE, signal.SIGXFSZ})
"""Ignored signals that `Popen` and uvloop restore by themselves."""


def needed_for(
    options: WorkerOptions, rank: int, env: Mapping[str, str], *, who: str, cgroup: str = ""
) -> tuple[str, ...] | None:
    """What the trampoline must do, a word each; None when fork and exec suffice.

    Args:
        env: the worker's, which the interpreter in between must not change.
        cgroup: folder of the one it is to be in; empty for none.

    Raises:
        OSError: ENOEXEC, if there is no interpreter to do it.
    """
    words = (*([f"cgroup={cgroup}"] if cgroup else ()), *_options(options, rank))
    hup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    if not words and _signals_are_clean(hup_ignored=hup_ignored):
        return None
    if not sys.executable:
        what = f"{who} can't be started: its options need a Python interpreter, and sys.executable names none"
        raise OSError(errno.ENOEXEC, what)
    words += ("hup=ignore",) if hup_ignored else ()
    words += (f"lc_ctype={env['LC_CTYPE']}",) if "LC_CTYPE" in env else ()
    return words


def _options(options: WorkerOptions, rank: int) -> list[str]:
    cpus = options.cpus_of(rank)
    words = [] if cpus is None else [f"cpus={','.join(map(str, sorted(cpus)))}"]
    for which, limit in (options.rlimits or {}).items():
        soft, hard = limit if isinstance(limit, tuple) else (limit, limit)
        words.append(f"rlimit={which}:{soft}:{hard}")
    if options.groups is not None:
        words.append(f"groups={','.join(map(str, options.groups))}")
    for name in ("umask", "nice", "user", "group"):
        value = getattr(options, name)
        if value is not None:
            words.append(f"{name}={value}")
    return words


def _signals_are_clean(*, hup_ignored: bool) -> bool:
    """Whether exec from this thread gives an empty mask and default actions, but for an ignored SIGHUP."""
    if signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return False
    if hup_ignored and not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        return False  # uvloop resets it too
    # signal.getsignal makes an enum of each answer, which takes ten times as long; this is asked at every start.
    ignored = {number for number in NUMBERS if _signal.getsignal(number) == _signal.SIG_IGN}
    return ignored <= RESTORED | {signal.SIGHUP}


def argv_of(
    words: tuple[str, ...], status_fd: int, path: str, argv: tuple[str | bytes, ...]
) -> tuple[str | bytes, ...]:
    """The command line of a trampoline.

    Args:
        path: what it executes.
        argv: the program's own, its name first.
    """
    return (sys.executable, "-I", "-S", program.__file__, f"status={status_fd}", *words, "--", path, *argv)


@final
class Confirmation:
    """The pipe on which a trampoline tells what went wrong; it closes when the program runs.

    Raises:
        OSError: if no descriptor is left.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._loop = asyncio.get_running_loop()
        self._read, self.child_fd = open_pipe()
        os.set_blocking(self._read, False)
        self._closed: asyncio.Future[bytes] = self._loop.create_future()
        self._said = b""

    def started(self) -> None:
        """Close the parent's copy of the child's end and begin to listen."""
        self._close_child_end()
        self._loop.add_reader(self._read, self._readable)

    def _readable(self) -> None:
        try:
            chunk = os.read(self._read, 4096)
        except BlockingIOError:
            return
        self._said += chunk
        if not chunk:
            self._loop.remove_reader(self._read)
            if not self._closed.done():
                self._closed.set_result(self._said)

    async def wait(self) -> None:
        """Wait for the program to run, or for the end of a trampoline that was killed on its way.

        Raises:
            OSError: of the errno's class, naming run, rank and what could not be done.
        """
        await asyncio.wait({self._closed})
        number, _, what = self._closed.result().decode("utf-8", "replace").partition(" ")
        if number:
            raise OSError(int(number), f"{self._who} can't be started: {what}: {os.strerror(int(number))}")

    def close(self) -> None:
        """Close both ends; who still waits is told that the program runs. Idempotent."""
        self._close_child_end()
        read, self._read = self._read, -1
        if read >= 0:
            self._loop.remove_reader(read)
            close_fd(read)
        if not self._closed.done():
            self._closed.set_result(b"")

    def _close_child_end(self) -> None:
        child_fd, self.child_fd = self.child_fd, -1
        if child_fd >= 0:
            close_fd(child_fd)
