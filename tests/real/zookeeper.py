"""The whole zoo as the ranks of one run, and the pipe by which it is known to be alive or gone.

Light, because a supervisor that is to be killed runs it as a program:
`python -m tests.real.zookeeper METHOD LOOP PIPE GATE POLICY`.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aelastic import Starting, StopPolicy, WorkerOptions, start_processes
from tests.zoo import TREES

Method = Literal["command", "spawn", "forkserver", "fork"]
METHODS: tuple[Method, ...] = ("command", "spawn", "forkserver", "fork")
GRACE = 0.3
POLICY = StopPolicy(
    steps=((signal.SIGTERM, 0.15), (signal.SIGKILL, 5.0)), drain=0.1, on_failure="continue", orphan_grace=GRACE
)
LINES = sum(tree.lines for tree in TREES)
"""How many lines tell that the whole zoo stands."""
LEAVING = sum(tree.leaves for tree in TREES)


def be(source: str) -> None:
    """A worker's function: become a tree."""
    exec(source, {"__name__": "zoo"})


def start(method: Method, pipe: int, gate: int, *, slowly: bool = False, **policy: Any) -> Starting:
    """A run with a tree on each rank.

    Args:
        slowly: with a umask, which makes a start wait until every program runs.
    """
    command = method == "command"
    env = {"ZOO_PIPE": str(pipe), "ZOO_GATE": str(gate)}
    return start_processes(
        "zoo",
        TREES[0].argv[0] if command else be,
        {rank: tree.argv[1:] if command else (tree.source,) for rank, tree in enumerate(TREES)},
        dict.fromkeys(range(len(TREES)), env),
        start_method="spawn" if method == "command" else method,
        options=WorkerOptions(
            pass_fds=(pipe, gate),
            umask=0o22 if slowly else None,
            forkserver_preload=("aelastic._start", "tests.real.zookeeper"),
        ),
        stop=replace(POLICY, **policy),
    )


class Zoo:
    """The pipe that every process of a zoo holds, and the gate before which the leaving leaders wait."""

    def __init__(self) -> None:
        self._read, self.pipe = os.pipe()
        self.gate, self._open = os.pipe()
        self._seen = 0

    def stands(self, lines: int = LINES, within: float = 60.0) -> None:
        """Block until so many processes are in their places."""
        deadline = time.monotonic() + within
        while self._seen < lines:
            if not self._readable(deadline - time.monotonic()):
                raise TimeoutError(f"{self._seen} of {lines} processes came in {within} s")
            self._seen += os.read(self._read, 65536).count(b"\n")

    def let_leave(self) -> None:
        """Let the leaders go that leave by themselves."""
        os.write(self._open, b"." * LEAVING)

    def handed_over(self) -> None:
        """Close our copy of what the processes hold, after the last of them was started."""
        if self.pipe >= 0:
            os.close(self.pipe)
        self.pipe = -1

    def is_gone(self, within: float = 0.0) -> bool:
        """Whether nobody holds the pipe any more, at once or after some time."""
        deadline = time.monotonic() + within
        while self._readable(max(0.0, deadline - time.monotonic())):
            if not os.read(self._read, 65536):
                return True
        return False

    def holders(self) -> list[int]:
        """The pids of those who hold it all the same."""
        link = os.readlink(f"/proc/self/fd/{self._read}")
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _holds(pid, link)]

    def keeper(self, method: Method, loop: str, **policy: Any) -> subprocess.Popen[bytes]:
        """A supervisor in a process of its own, to which we hand over."""
        words = (method, loop, str(self.pipe), str(self.gate), json.dumps(policy))
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *words],
            pass_fds=(self.pipe, self.gate),
            cwd=Path(__file__).parents[2],
        )
        self.handed_over()
        return process

    def close(self) -> None:
        self.handed_over()
        for fd in (self._read, self.gate, self._open):
            os.close(fd)

    def _readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))


def _holds(pid: int, link: str) -> bool:
    try:
        folder = f"/proc/{pid}/fd"
        return pid != os.getpid() and any(os.readlink(f"{folder}/{fd}") == link for fd in os.listdir(folder))
    except OSError:
        return False


async def keep(method: Method, pipe: int, gate: int, policy: dict[str, Any]) -> None:
    """Supervise a zoo until we are killed."""
    await start(method, pipe, gate, **policy)
    os.close(pipe)
    await asyncio.Event().wait()


def main(method: Method, loop: str, pipe: str, gate: str, policy: str) -> None:
    """Be the supervisor that `Zoo.keeper` starts."""
    keeping = keep(method, int(pipe), int(gate), json.loads(policy))
    if loop == "uvloop":
        import uvloop

        uvloop.run(keeping)
    else:
        asyncio.run(keeping)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # as `keeper` writes them
