"""A run's own fork server: one interpreter, exec'd like any worker, that forks the others.

What differs from spawn: variables that an interpreter reads at its start are the server's, not the rank's; what
`forkserver_preload` imports is shared; /proc shows the server's environment and command line. The server carries no
lineage of the run, because it belongs to no rank: it ends with the socket that the supervisor holds.
"""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import final

from aelastic._child import forkserver, mainmodule, procfs
from aelastic._descriptors import close_socket, open_socketpair
from aelastic._exit import ExitStatus
from aelastic._limits import shortage
from aelastic._options import WorkerOptions
from aelastic._process import Command, Confirmation, OnBorn, Process, launch
from aelastic._tasks import first_of

BOOTSTRAP = str(Path(mainmodule.__file__).with_name("bootstrap.py"))
CLOSE_SECONDS = 1.0
"""How long a server that was told to end, or is asked while the run stops, is given before it is killed."""


@final
class ServedChild:
    """A process that the server forked and collects."""

    def __init__(self, pid: int, server_pid: int) -> None:
        self.pid = pid
        self.status: ExitStatus | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        now = procfs.now_ticks()
        self.pidfd = _pidfd_of(pid, server_pid)
        self.held_ticks = now if self.pidfd is not None else 0

    def was_collected(self) -> None:
        """Learn that the kernel doesn't tell us its status; the server does."""

    def ended(self, status: ExitStatus | None) -> None:
        """Learn that it has ended, and how; None leaves what was known."""
        self.status = status or self.status
        if not self.done.done():
            self.done.set_result(None)

    def server_lost(self) -> None:
        """Learn that the server is gone: without a descriptor nobody will tell of the end any more."""
        if self.pidfd is None:
            self.ended(None)


def _pidfd_of(pid: int, parent: int) -> int | None:
    """A descriptor of a child of the server; a short one may be gone by now, and its number another process's."""
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
    member = procfs.read_member(pid, lineage=False)
    if member is not None and member.parent == parent:
        return pidfd
    os.close(pidfd)
    return None


@final
class ForkServer:
    """The server of one run, for all its attempts: executed when it is first needed, and again when it was lost.

    Args:
        who: names the run in error texts.
        options: `forkserver_preload` and `pass_fds` are the server's.
        on_born: told of each server, so that the guard can know of it: one that is stuck in what it preloads would
            outlive us.
    """

    def __init__(self, who: str, options: WorkerOptions, on_born: OnBorn) -> None:
        self._who = f"{who}'s fork server"
        self._options = options
        self._on_born = on_born
        self._starting = asyncio.Lock()
        self._socket: socket.socket | None = None
        self._process: Process | None = None
        self._asked: deque[asyncio.Future[ServedChild]] = deque()
        self._children: dict[int, ServedChild] = {}
        self._unread = b""

    async def start(self, program: tuple[str, ...], env: Mapping[str, str]) -> None:
        """See that a server runs; a new one takes requests while it is still getting ready.

        Args:
            program: the interpreter and its flags.
            env: without the run's lineage.

        Raises:
            OSError: as `launch` does.
        """
        async with self._starting:
            if self._socket is None:
                await self._collect()
                await self._execute(program, env)

    async def _execute(self, program: tuple[str, ...], env: Mapping[str, str]) -> None:
        ours, theirs = open_socketpair()
        try:
            ours.setblocking(False)  # noqa: FBT003  # positional only
            settings = json.dumps({"sys_path": sys.path, "preload": list(self._options.forkserver_preload)})
            self._process = await self._launch(program, env, theirs, settings)
        except BaseException:
            close_socket(ours)
            raise
        finally:
            close_socket(theirs)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._hear)

    async def _launch(
        self, program: tuple[str, ...], env: Mapping[str, str], control: socket.socket, settings: str
    ) -> Process:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            return await launch(
                Command(
                    argv=(*program, BOOTSTRAP, "serve", str(control.fileno()), settings),
                    env=env,
                    cwd=None,
                    stdin=null,
                    stdout=null,
                    stderr=2,
                    pass_fds=(control.fileno(), *self._options.pass_fds),
                    options=WorkerOptions(),
                    rank=0,
                    who=self._who,
                    on_born=self._on_born,
                )
            )
        finally:
            os.close(null)

    async def fork(
        self, command: Command, fds: tuple[int, ...], confirmation: Confirmation, hurry: asyncio.Future[None]
    ) -> Process:
        """Have a worker forked.

        Args:
            fds: in the order that `aelastic._child.forkserver` gives them.
            hurry: done when the run is to stop: a server that doesn't answer soon after that is killed.

        Raises:
            OSError: naming run and rank, if the server can't.
        """
        if len(fds) > forkserver.MOST_DESCRIPTORS:
            raise OSError(errno.EMFILE, f"{command.who} can't be started: {len(fds)} descriptors are too many to send")
        started_ns = time.monotonic_ns()
        answer: asyncio.Future[ServedChild] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        try:
            self._send(fds)
            await self._answered(answer, hurry)
            child = answer.result()
        except OSError as error:
            what = shortage(error.errno or 0) or error.strerror
            raise OSError(error.errno, f"{command.who} can't be started: {what}") from error
        command.on_born(child.pid, child.pidfd, child.held_ticks)
        process = Process(child, started_ns, confirmation, command.cgroup)
        process.exited.add_done_callback(lambda _: child.ended(None))
        return process

    async def _answered(self, answer: asyncio.Future[ServedChild], hurry: asyncio.Future[None]) -> None:
        await first_of(answer, hurry)
        await asyncio.wait({answer}, timeout=CLOSE_SECONDS)
        if not answer.done() and self._process is not None:
            self._process.signal_group(signal.SIGKILL)  # the end of its socket answers then
            await asyncio.wait({answer}, timeout=CLOSE_SECONDS)
        if not answer.done():  # a child of its, out of its group, holds the socket
            self._lost()

    @property
    def _pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def _send(self, fds: tuple[int, ...]) -> None:
        if self._socket is None:
            raise OSError(errno.ECHILD, "the fork server has ended")
        # One byte a request: never more than the socket takes, since each start waits for its answer.
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self._socket.sendmsg([b"."], [rights])

    def _hear(self) -> None:
        if self._socket is None:
            return
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
        self._unread += data
        size = forkserver.ANSWER.size
        while len(self._unread) >= size:
            answer, self._unread = self._unread[:size], self._unread[size:]
            self._understand(*forkserver.ANSWER.unpack(answer))

    def _understand(self, what: bytes, pid: int, number: int) -> None:
        if what == forkserver.STARTED:
            child = self._children[pid] = ServedChild(pid, self._pid)
            self._asked.popleft().set_result(child)
        elif what == forkserver.REFUSED:
            self._asked.popleft().set_exception(OSError(number, os.strerror(number)))
        elif (ended := self._children.pop(pid, None)) is not None:
            ended.ended(ExitStatus.from_wait_status(number))

    def _lost(self) -> None:
        """Stop listening; who still waits is told that nobody will answer."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            close_socket(self._socket)
            self._socket = None
            self._unread = b""
        while self._asked:
            self._asked.popleft().set_exception(OSError(errno.ECHILD, "the fork server has ended"))
        for child in self._children.values():
            child.server_lost()
        self._children.clear()

    async def close(self) -> None:
        """End the server and collect it. Idempotent, bounded."""
        self._lost()
        await self._collect()

    async def _collect(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        await asyncio.wait({process.exited}, timeout=CLOSE_SECONDS)
        if not process.exited.done():
            process.signal_group(signal.SIGKILL)
            await asyncio.wait({process.exited}, timeout=CLOSE_SECONDS)
        await process.reaped(CLOSE_SECONDS)
        process.close()
