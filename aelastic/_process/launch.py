"""Start one process, by the way that needs the least: plain exec, or through the trampoline."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, final

from .._limits import check_one_start, shortage
from .._options import WorkerOptions
from .collection import Collection, OnBorn, start_collected
from .handle import Process
from .pace import Pace
from .trampoline import Confirmation, argv_of, needed_for

ABANDON_SECONDS = 0.2
"""How long asyncio is given to collect a child whose start has failed."""
TURNS = 3
"""Turns of the loop in which asyncio tells of a child whose start it then gives up."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """All that one exec needs."""

    argv: tuple[str | bytes, ...]
    """The program as the user wrote it, and its arguments."""
    env: Mapping[str, str]
    cwd: str | None
    stdin: int
    """Descriptors to hand over; the caller keeps and closes its own."""
    stdout: int
    stderr: int
    pass_fds: tuple[int, ...]
    options: WorkerOptions
    rank: int
    who: str
    """Run and rank, as error texts name them."""
    cgroup: str = ""
    """Folder of the cgroup it is to be in; empty for ours."""
    on_born: OnBorn
    """Told of the process as soon as its pid is known, for what is spawned in that very turn; also if the start fails
    after that."""
    found: str = ""
    """What `resolve` says, if somebody has asked: then nobody looks along the PATH again."""

    @property
    def program(self) -> str:
        """The program's name as the user wrote it."""
        return os.fsdecode(self.argv[0])

    def path(self) -> str:
        """What is to be executed; see `resolve`."""
        return self.found or resolve(self.program, self.env, self.cwd, who=self.who)


def resolve(program: str, env: Mapping[str, str], cwd: str | None, *, who: str) -> str:
    """Find a program as the worker would: along its PATH, or from its directory.

    Args:
        env: the worker's environment, whole.
        cwd: the worker's directory; None means ours.

    Returns:
        A path, absolute or relative to `cwd`.

    Raises:
        FileNotFoundError: if there is no such program, or no such directory.
        NotADirectoryError: if `cwd` is none.
        PermissionError: if what was found may not be executed.
    """
    _check_directory(cwd, who)
    refused = ""
    for folder in [""] if "/" in program else os.get_exec_path(dict(env)):
        path = os.path.join(folder, program)
        seen = os.path.join(cwd or "", path)
        if os.path.isfile(seen) and os.access(seen, os.X_OK):
            return path
        if os.path.exists(seen):
            refused = refused or path
    if refused:
        what = "is a directory" if os.path.isdir(os.path.join(cwd or "", refused)) else "is not executable"
        raise PermissionError(errno.EACCES, f"{who} can't be started: {refused} {what}", refused)
    where = f"from {cwd or os.getcwd()}" if "/" in program else "along the worker's PATH"
    raise FileNotFoundError(errno.ENOENT, f"{who} can't be started: no such program was found {where}", program)


def _check_directory(cwd: str | None, who: str) -> None:
    if cwd is None or (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        return
    if not os.path.lexists(cwd):
        raise FileNotFoundError(errno.ENOENT, f"{who} can't be started: its directory does not exist", cwd)
    if not os.path.isdir(cwd):
        raise NotADirectoryError(errno.ENOTDIR, f"{who} can't be started: its cwd is no directory", cwd)
    raise PermissionError(errno.EACCES, f"{who} can't be started: its directory may not be entered", cwd)


async def launch(command: Command) -> Process:
    """Start a process in a session of its own.

    Not to be cancelled: a start that is torn half-way can lose the child (call it inside a service).

    Raises:
        OSError: of the errno's class, naming run and rank. What a trampoline meets comes from `Process.confirmed`.
    """
    words = needed_for(command.options, command.rank, command.env, who=command.who, cgroup=command.cgroup)
    if words is None and _may_be_given_to_a_shell(command):
        words = ()
    if words is None:
        return await _spawn(command, command.argv, command.pass_fds, None, executable=command.found or None)
    path = command.path()
    try:
        confirmation = Confirmation(command.who)
    except OSError as error:
        _refuse(command, error)
    try:
        argv = argv_of(words, confirmation.child_fd, path, command.argv)
        process = await _spawn(command, argv, (*command.pass_fds, confirmation.child_fd), confirmation)
    except BaseException:
        confirmation.close()
        raise
    confirmation.started()
    return process


def _may_be_given_to_a_shell(command: Command) -> bool:
    """Whether the spawn would run by `sh` what the kernel refuses: uvloop's does (execvp(3)), a trampoline doesn't."""
    if isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        return False
    begin = _beginning(os.path.join(command.cwd or "", command.path()))
    return not begin.startswith(b"#!") and _machine(begin) != _own_machine()


@functools.cache
def _own_machine() -> bytes:
    return _machine(_beginning(sys.executable))


def _beginning(path: str) -> bytes:
    """The first bytes of a file; empty where it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(20)
    except OSError:
        return b""


def _machine(header: bytes) -> bytes:
    """What of a binary's header says who can run it: format, word size, byte order and processor (elf(5))."""
    return header[:6] + header[18:]


async def _spawn(
    command: Command,
    argv: tuple[str | bytes, ...],
    pass_fds: tuple[int, ...],
    confirmation: Confirmation | None,
    *,
    executable: str | None = None,
) -> Process:
    await Pace.of_running_loop().start_admitted()
    collection = Collection(command.on_born)
    started_ns = time.monotonic_ns()
    try:
        if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            check_one_start(command.stdin)
        await start_collected(
            argv,
            collection,
            stdin=command.stdin,
            stdout=command.stdout,
            stderr=command.stderr,
            env=dict(command.env),
            cwd=command.cwd,
            pass_fds=pass_fds,
            start_new_session=True,
            executable=executable,
        )
        if collection.shortage is not None:
            raise collection.shortage
    except ProcessLookupError as error:
        # It was started, and is over: from 3.12 on asyncio finds nobody to watch if another waiter was as fast.
        if not collection.pid:
            _refuse(command, error)
        _collect(collection, error)
    except (OSError, RuntimeError) as error:
        await _abandon(collection, error)
        if isinstance(error, RuntimeError) and "thread" not in str(error):
            raise
        _refuse(command, error)
    return Process(collection, started_ns, confirmation, command.cgroup)


async def _abandon(collection: Collection, error: BaseException) -> None:
    """End a child that came to life in a start that failed all the same; nothing of it is left."""
    for _ in range(TURNS):
        await asyncio.sleep(0)
    if not collection.pid:
        return
    process = Process(collection, 0, None)
    process.signal_group(signal.SIGKILL)
    await process.reaped(within=ABANDON_SECONDS)
    process.close()
    if not collection.done.done():
        _collect(collection, error)


def _collect(collection: Collection, error: BaseException) -> None:
    """Take the place of a waiter that asyncio could not start; the child is dead."""
    if collection.popen is None or collection.popen.poll() is None:
        return
    collection.is_done()
    for frame, _line in traceback.walk_tb(error.__traceback__):  # asyncio leaves it open, and hands it to nobody
        transport = frame.f_locals.get("transp")
        if isinstance(transport, asyncio.SubprocessTransport):
            transport.close()  # of a child that was collected: it signals nobody


def _refuse(command: Command, error: OSError | RuntimeError) -> NoReturn:
    """Raise a start's error as a sentence."""
    # Without pidfds 3.11 waits for a child in a thread: "can't start new thread" is the same shortage.
    number = errno.EAGAIN if isinstance(error, RuntimeError) else error.errno or 0
    if number in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
        resolve(command.program, command.env, command.cwd, who=command.who)  # knows better which of them it was
    what = shortage(number) or {
        errno.ENOENT: "the interpreter that its first line names does not exist",
        errno.ENOEXEC: "it is neither a binary for this machine nor a script with a #! line",
        errno.E2BIG: "its arguments and environment are larger than the kernel takes",
    }.get(number, os.strerror(number) if number else str(error))
    raise OSError(number, f"{command.who} can't be started: {what}", command.program) from error
