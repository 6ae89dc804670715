"""The stacks of a rank's Python processes, without their help.

Two ways. A process that prepared itself (`_child/stacks`: function workers and `record`ed programs) writes them on a
signal, also while it is stuck in C with the interpreter locked; the signal is sent only where /proc shows that it is
caught. Any other Python process is read from outside by py-spy, where that is installed and allowed. What has no
stacks, or doesn't give them, is told in a sentence.

Source: faulthandler.register, proc_pid_status(5) `SigCgt`, memfd_create(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import final

from .._child import procfs
from .._child.procfs import Member
from .._child.stacks import MEMORY, SIGNAL

Members = Callable[[Collection[int]], Awaitable[Mapping[int, Sequence[Member]]]]
"""Gives the live processes of ranks."""
ANSWER_WITHIN = 2.0
"""Seconds in which a process must have written its stacks."""
LOOK_EVERY = 0.005
SPY_WITHIN = 10.0
WRITE_WITHIN = 1.0
ENDED = "there are no stacks: this rank has ended\n"
COMMAND_SHOWN = 100
"""Characters of a command line."""
LOG_WITHIN = 3.0
"""Seconds that a kill waits for stacks at the most."""


@final
class Stacks:
    """Asks the ranks of a run for their stacks.

    Args:
        members: of these ranks, the live processes.
        poke: sends one process a signal, if it is still the same process.
        threads: where it is waited for answers.
    """

    def __init__(
        self,
        members: Members,
        poke: Callable[[Member, int], bool],
        threads: Executor,
    ) -> None:
        self._members = members
        self._poke = poke
        self._threads = threads
        self._under_way: dict[int, asyncio.Future[str]] = {}
        self._closed = False

    async def of(self, rank: int, pid: int) -> str:
        """The stacks of everything Python of a rank; who asks meanwhile shares the answer.

        Args:
            pid: the worker's own process, which comes first.
        """
        answer = self._under_way.get(rank)
        if answer is None:
            found = (await self._members((rank,))).get(rank, ())
            members = sorted(found, key=lambda member: (member.pid != pid, member.pid))
            if self._closed:
                return ENDED
            answer = self._under_way.get(rank) or self._begin(rank, members)
        await asyncio.wait({answer})
        return ENDED if answer.cancelled() else answer.result()

    def _begin(self, rank: int, members: Sequence[Member]) -> asyncio.Future[str]:
        loop = asyncio.get_running_loop()
        answer = self._under_way[rank] = loop.run_in_executor(self._threads, dump, members, self._poke)
        answer.add_done_callback(lambda _: self._under_way.pop(rank, None))
        return answer

    def close(self) -> None:
        """Ask nobody any more: the run has ended."""
        self._closed = True

    async def into_log(self, rank: int, pid: int, why: str) -> None:
        """Write the stacks of a rank to its own stderr, wherever that goes; bounded, and what fails is left out."""
        loop = asyncio.get_running_loop()

        async def write() -> None:
            members = (await self._members((rank,))).get(rank, ())
            worker = next((member for member in members if member.pid == pid), None)
            text = f"aelastic: rank {rank} (pid {pid}): {why}\n{await self.of(rank, pid)}"
            if worker is not None:
                await loop.run_in_executor(self._threads, write_to_stderr, worker, text)

        writing = loop.create_task(write(), name=f"stacks of rank {rank}")
        await asyncio.wait({writing}, timeout=LOG_WITHIN)
        writing.cancel()
        if writing.done() and not writing.cancelled():
            writing.exception()


def dump(members: Sequence[Member], poke: Callable[[Member, int], bool]) -> str:
    """The stacks of those processes that run Python, one after the other; blocks."""
    texts = [(member, text) for member in members if (text := _dump_one(member, poke))]
    if texts:
        return "".join(f"pid {member.pid} ({_command(member.pid)}):\n{text}\n" for member, text in texts)
    seen = ", ".join(f"pid {member.pid} is {_program(member.pid) or 'gone'}" for member in members) or "it has ended"
    return f"there are no stacks: nothing of this rank runs Python ({seen})\n"


def _command(pid: int) -> str:
    return " ".join(procfs.command_of(pid).split())[:COMMAND_SHOWN]


def _dump_one(member: Member, poke: Callable[[Member, int], bool]) -> str:
    """Stacks, or why there are none; empty for what is no Python."""
    memory = _memory_of(member.pid)
    if memory and _has(member.pid, "SigCgt"):
        return _ask(member, memory, poke)
    return _spy(member.pid) if _is_python(member.pid) else ""


def _ask(member: Member, memory: str, poke: Callable[[Member, int], bool]) -> str:
    try:
        fd = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"there are no stacks: {memory} can't be opened: {error.strerror}"
    try:
        os.ftruncate(fd, 0)
        before = _tasks_in_it(member.pid)
        if not poke(member, SIGNAL):
            return "there are no stacks: it has just ended"
        state = _wait_for_answer(member.pid, fd, before)
        text = os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")
    finally:
        os.close(fd)
    return text or f"there are no stacks: it takes no signal, its state is {state}"


def _wait_for_answer(pid: int, fd: int, before: frozenset[str]) -> str:
    """Wait until everything is written, in vain at a process that is stopped or gone; its state."""
    deadline = time.monotonic() + ANSWER_WITHIN
    while True:
        time.sleep(LOOK_EVERY)
        member = procfs.read_member(pid, lineage=False)
        state = "X" if member is None else member.state
        answered = not _has(pid, "ShdPnd") and _tasks_in_it(pid) <= before and os.fstat(fd).st_size > 0
        if answered or state in "TtZX" or time.monotonic() > deadline:
            return state


def _tasks_in_it(pid: int) -> frozenset[str]:
    """The threads that are in the signal's handler (it is blocked for as long), or block the signal anyhow."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return frozenset()
    return frozenset(task for task in tasks if _has(f"{pid}/task/{task}", "SigBlk"))


def _has(pid: int | str, mask: str) -> bool:
    """Whether the signal is in one of a process's masks (proc_pid_status(5))."""
    for line in procfs.read(f"/proc/{pid}/status").splitlines():
        name, _, value = line.partition(b":\t")
        if name == mask.encode():
            return bool(int(value, 16) >> (SIGNAL - 1) & 1)
    return False


def _memory_of(pid: int) -> str:
    """The path of the memory that a prepared process writes its stacks to; empty when it has none."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for fd in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{fd}").startswith(f"/memfd:{MEMORY}"):
                    return f"{folder}/{fd}"
    return ""


def _program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return procfs.read(f"/proc/{pid}/comm").decode("utf-8", "replace").strip()


def _is_python(pid: int) -> bool:
    return "python" in os.path.basename(_program(pid)) or b"/libpython" in procfs.read(f"/proc/{pid}/maps")


def _spy(pid: int) -> str:
    program = shutil.which("py-spy")
    if program is None:
        return (
            "there are no stacks: it runs Python, but neither as a function nor decorated with aelastic.record, and"
            " py-spy is not installed: pip install py-spy"
        )
    try:
        done = subprocess.run(
            [program, "dump", "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SPY_WITHIN,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"there are no stacks: py-spy failed: {error}"
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        return f"there are no stacks: py-spy could not read it, or may not (ptrace(2)): {said}"
    return done.stdout.decode("utf-8", "replace")


def write_to_stderr(member: Member, text: str) -> bool:
    """Write as if the process had written it: to its log, through the supervisor if it passes there; blocks, bounded.

    Returns:
        False if not everything could be written, or its pid means another process by now.
    """
    try:
        fd = os.open(f"/proc/{member.pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False  # a socket, or it is gone
    try:
        now = procfs.read_member(member.pid, lineage=False)  # after what was opened: then that was its own
        if now is None or now.identity != member.identity:
            return False
        return _write_all(fd, text.encode(), time.monotonic() + WRITE_WITHIN)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes, deadline: float) -> bool:
    view = memoryview(data)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError as error:
            left = deadline - time.monotonic()
            if error.errno != errno.EAGAIN or left <= 0:
                return False
            poll.poll(left * 1000)
    return True
