"""Who collects a child for asyncio's own loops: on 3.11 too a pidfd, as from 3.12 on, in place of a thread per child.

3.11 looks for its watcher in the policy, which all threads share. So ours is there for the moment only in which a child
of ours is spawned, and only in place of the one that nobody chose.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVarTuple, final

from .._exit import UNKNOWN_RETURNCODE

if sys.version_info < (3, 12):
    SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    """Why there may be no pidfd now, where there are pidfds."""
    Ts = TypeVarTuple("Ts")
    _log = logging.getLogger("asyncio")
    _turn = threading.Lock()
    """Starts in several threads put it there one after the other, or the last would leave it behind."""

    @final
    class PidfdWatcher(asyncio.ThreadedChildWatcher):
        """Collects a child in the loop that spawned it, when its pidfd says that it has ended; a thread without one.

        It keeps nothing of a child: whoever spawns in another thread meanwhile and finds it here is served as well.

        Args:
            instead: who waits in threads.
        """

        def __init__(self, instead: asyncio.AbstractChildWatcher) -> None:
            super().__init__()
            self._instead = instead

        def add_child_handler(self, pid: int, callback: Callable[[int, int, *Ts], object], *args: *Ts) -> None:
            """Begin to wait for a child, and report its return code in the loop.

            Raises:
                OSError: if no descriptor is left.
            """
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                if error.errno in SHORT:
                    raise
                self._instead.add_child_handler(pid, callback, *args)
            else:
                loop = asyncio.get_running_loop()
                loop.add_reader(pidfd, self._collect, loop, pidfd, pid, callback, args)

        @staticmethod
        def _collect(
            loop: asyncio.AbstractEventLoop,
            pidfd: int,
            pid: int,
            callback: Callable[[int, int, *Ts], object],
            args: tuple[*Ts],
        ) -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:
                returncode = UNKNOWN_RETURNCODE
                _log.warning("process %d was collected by another waiter; 255 stands for its return code", pid)
            else:
                returncode = os.waitstatus_to_exitcode(status)
            callback(pid, returncode, *args)

    def _forked() -> None:
        """Begin anew in a forked child: the lock may be held by a thread that is not there."""
        global _turn  # noqa: PLW0603  # of this file
        _turn = threading.Lock()

    os.register_at_fork(after_in_child=_forked)

    @contextlib.contextmanager
    def collected_by_pidfd() -> Iterator[None]:
        """Let the child that is spawned here be collected without a thread, unless the host chose a watcher."""
        policy = asyncio.get_event_loop_policy()
        with _turn:
            chosen = policy.get_child_watcher()
            if type(chosen) is not asyncio.ThreadedChildWatcher:
                yield
                return
            policy.set_child_watcher(PidfdWatcher(chosen))
            try:
                yield
            finally:
                policy.set_child_watcher(chosen)

else:

    def collected_by_pidfd() -> AbstractContextManager[None]:
        """Nothing is to be done: from 3.12 on asyncio does so by itself."""
        return nullcontext()
