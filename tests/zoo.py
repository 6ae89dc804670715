"""One list of process trees that are hard to end, used everywhere.

Each is a small program, run by a bare interpreter or as a function. Every process of a tree writes the line `alive` to
a pipe when it is in its place, and holds the pipe open: its end means that nothing of the tree is left. The pipe is
stdout, or the descriptor that `ZOO_PIPE` names. Leaders that end by themselves wait for a byte from `ZOO_GATE`, if that
names one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.ways_to_die import PYTHON

PRELUDE = """
import os, signal, sys, time
PIPE, GATE = int(os.environ.get("ZOO_PIPE", "1")), int(os.environ.get("ZOO_GATE", "-1"))
os.set_inheritable(PIPE, True)
def alive(): os.write(PIPE, b"alive\\n")
def leave():
    if GATE >= 0: os.read(GATE, 1)
def rest():
    alive()
    while True: time.sleep(600)
def deaf(): signal.signal(signal.SIGTERM, signal.SIG_IGN)
def child(body):
    if os.fork() == 0:
        body()
        os._exit(0)
def hop(pause=0.05):
    deaf(); alive()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.fork(): os._exit(0)
        time.sleep(pause)
"""
"""`rest` lives until it is killed, `deaf` ignores SIGTERM, `hop` flees from pid to pid (and tires after a minute, so
that a test that fails doesn't spoil the machine)."""


@dataclass(frozen=True)
class Tree:
    """A program that makes a tree, and how many `alive` lines tell that it stands."""

    name: str
    body: str
    lines: int = 2
    leaves: bool = False
    """Whether the leader ends at once by itself; what it leaves behind lives on."""
    deaf: bool = True
    """Whether something of it outlives SIGTERM."""

    @property
    def source(self) -> str:
        return PRELUDE + self.body

    @property
    def argv(self) -> tuple[str, ...]:
        return (*PYTHON, self.source)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


OBEDIENT = Tree("an obedient pair", "child(rest); rest()", deaf=False)
LEADER_EXITS = Tree("leader exits first", "child(lambda: (deaf(), rest())); alive(); leave()", leaves=True)
LEADER_CRASHES = Tree(
    "leader crashes",
    "child(lambda: (deaf(), rest())); alive(); leave(); os.kill(os.getpid(), signal.SIGABRT)",
    leaves=True,
)
DEAF_CHILD = Tree("child ignores SIGTERM", "child(lambda: (deaf(), rest())); rest()")
OWN_GROUP = Tree("own group", "child(lambda: (deaf(), os.setpgid(0, 0), rest())); rest()")
OWN_SESSION = Tree("setsid", "child(lambda: (deaf(), os.setsid(), rest())); rest()")
DOUBLE_FORK = Tree(
    "double fork", "child(lambda: (os.setsid(), child(lambda: (deaf(), rest())), os._exit(0))); os.wait(); rest()"
)
CLEANED = Tree(
    "double fork with a cleaned environment",
    "args = [sys.executable, '-I', '-S', '-c', f'import os, signal, time; signal.signal(15, signal.SIG_IGN);"
    ' os.write({PIPE}, b"alive\\\\n"); time.sleep(600)\']\n'
    "child(lambda: (child(lambda: os.execve(args[0], args, {})), os._exit(0))); os.wait(); rest()",
)
STORM = Tree("fork storm", "[child(hop) for _ in range(3)]; rest()", lines=4)
FLEEING = Tree(
    "fork storm in sessions of its own", "[child(lambda: (os.setsid(), hop())) for _ in range(2)]; rest()", 3
)
BREEDING = Tree(
    "breeding",
    "def breed():\n"
    "    deaf(); alive()\n"
    "    for _ in range(100): child(lambda: time.sleep(600)); time.sleep(0.05)\n"
    "    time.sleep(600)\n"
    "child(breed); rest()",
)
STOPPED = Tree(
    "stopped with SIGSTOP",
    "child(lambda: (alive(), os.kill(os.getpid(), signal.SIGSTOP))); alive(); os.kill(os.getpid(), signal.SIGSTOP)",
    deaf=False,
)
ZOMBIES = Tree("zombie grandchildren", "[child(lambda: None) for _ in range(5)]; rest()", lines=1, deaf=False)
NESTED = Tree(
    "nested run",
    f"import site; site.main(); sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    "import asyncio\n"
    "from aelastic import StopPolicy, WorkerOptions, start_processes\n"
    f"argv = {[*PYTHON, PRELUDE + OWN_SESSION.body]!r}\n"
    "async def inner():\n"
    "    stop, options = StopPolicy(orphan_grace=0.1), WorkerOptions(pass_fds=(PIPE,))\n"
    "    async with start_processes('inner', argv[0], {0: tuple(argv[1:])}, stop=stop, options=options) as ctx:\n"
    "        alive(); await ctx.wait()\n"
    "asyncio.run(inner())",
    lines=3,
)
"""Its worker uses the library itself, and is ended by any SIGTERM: that of its own run's guard is the next net."""

TREES = (
    OBEDIENT, LEADER_EXITS, LEADER_CRASHES, DEAF_CHILD, OWN_GROUP, OWN_SESSION, DOUBLE_FORK, CLEANED, STORM, FLEEING,
    BREEDING, STOPPED, ZOMBIES, NESTED,
)  # fmt: skip
