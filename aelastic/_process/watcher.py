"""Who collects a child for asyncio's own loops: on 3.11 too a pidfd, as from 3.12 on, in place of a thread per child.

3.11 asks the event-loop policy for its watcher, which is the host's and everybody's: it stays as it is. What waits by
pidfd is put into our own loop, for the moment only in which a child of ours is spawned there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from . import platform

if sys.version_info < (3, 12):
    from asyncio import unix_events

    @contextlib.contextmanager
    def collected_by_pidfd() -> Iterator[None]:
        """Let the child that is spawned here be collected without a thread, unless the host chose how."""
        loop: Any = asyncio.get_running_loop()
        watcher = _watcher()
        own_way = type(loop)._make_subprocess_transport is not _ASYNCIOS_WAY  # noqa: SLF001  # a host's class of loop
        if type(watcher) is not asyncio.ThreadedChildWatcher or own_way:
            yield
            return
        loop._make_subprocess_transport = functools.partial(_spawn, loop, watcher)  # noqa: SLF001
        try:
            yield
        finally:
            del loop._make_subprocess_transport  # noqa: SLF001

    _ASYNCIOS_WAY = unix_events._UnixSelectorEventLoop._make_subprocess_transport  # type: ignore[attr-defined]  # noqa: SLF001

    def _watcher() -> asyncio.AbstractChildWatcher | None:
        """The host's; None where its policy has none, as asyncio will tell."""
        with contextlib.suppress(NotImplementedError):
            return asyncio.get_event_loop_policy().get_child_watcher()
        return None

    async def _spawn(loop: Any, watcher: asyncio.AbstractChildWatcher, *spawn: Any, **settings: Any) -> Any:
        """Spawn as asyncio does, and wait for the end of the child by its pidfd; in a thread where there is none."""
        connected = loop.create_future()
        transp = unix_events._UnixSubprocessTransport(loop, *spawn, waiter=connected, **settings)  # type: ignore[attr-defined]  # noqa: SLF001
        pid = transp.get_pid()
        pidfd = platform.open_pidfd(pid)
        if pidfd is None:
            watcher.add_child_handler(pid, loop._child_watcher_callback, transp)  # noqa: SLF001
        else:
            loop.add_reader(pidfd, _collect, loop, pidfd, transp)
        try:
            await connected
        except BaseException:
            transp.close()
            await transp._wait()  # noqa: SLF001
            raise
        return transp

    def _collect(loop: Any, pidfd: int, transport: Any) -> None:
        loop.remove_reader(pidfd)
        status = platform.collect(pidfd)
        os.close(pidfd)
        loop._child_watcher_callback(transport.get_pid(), status.returncode, transport)  # noqa: SLF001

else:

    def collected_by_pidfd() -> AbstractContextManager[None]:
        """Nothing is to be done: from 3.12 on asyncio does so by itself."""
        return nullcontext()
