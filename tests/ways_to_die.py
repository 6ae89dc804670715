"""One list of the ways a worker can end, used everywhere.

Each is one line of Python, run by a bare interpreter, that prints `ready` when it is, then does what its name says.
What ends only when it is told to is in `LINGERING`; the rest ends by itself.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import Literal

READY = "print('ready', flush=True)"
FOREVER = f"import signal; {READY}; [signal.pause() for _ in iter(int, 1)]"
"""Lives until it is signalled; nothing polls."""
PYTHON = (sys.executable, "-I", "-S", "-c")
"""A bare interpreter: the quickest to start, and nothing of the host's environment in it."""

Ending = Literal["by itself", "when stopped"]


@dataclass(frozen=True)
class Way:
    """A command, and how it is expected to end."""

    name: str
    argv: tuple[str, ...]
    code: int | None = None
    """Its exit code, when it exits."""
    signal: int | None = None
    """The signal that kills it, when one does."""
    ends: Ending = "by itself"
    stdout: bytes = b"ready\n"
    """All that it writes there; a full pipe's way tells a beginning only."""
    stderr: bytes = b""
    ready: bool = True
    """Whether it prints `ready` at all."""
    leaves: bool = False
    """Whether a process of its tree is alive when its own process has ended."""

    @property
    def program(self) -> str:
        """The command to look up: what `start_processes` calls entrypoint."""
        return self.argv[0]

    @property
    def args(self) -> tuple[str, ...]:
        return self.argv[1:]

    @property
    def succeeds(self) -> bool:
        return self.code == 0

    @property
    def shell_code(self) -> int:
        """What `$?` says of it."""
        return 128 + self.signal if self.signal is not None else int(self.code or 0)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def python(line: str) -> tuple[str, ...]:
    """The command that runs one line of Python."""
    return (*PYTHON, line)


GRANDCHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-I', '-S', '-c', {program!r}], {how})"
"""Starts another program that outlives this one; it prints nothing."""
SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
SILENT = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"

EXIT_0 = Way("exit 0", python(READY), code=0)
EXIT_3 = Way("exit 3", python(f"{READY}; raise SystemExit(3)"), code=3)
EXCEPTION = Way(
    "exception",
    python(f"{READY}; raise ValueError('broken')"),
    code=1,
    stderr=b"ValueError: broken\n",
)
OS_EXIT = Way("os._exit 0", python(f"import os; {READY}; os._exit(0)"), code=0)
KILLED = Way(
    "SIGKILL", python(f"import os, signal; {READY}; os.kill(os.getpid(), signal.SIGKILL)"), signal=signal.SIGKILL
)
SEGFAULT = Way(
    "SIGSEGV",
    python(
        "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        f"{READY}; os.kill(os.getpid(), signal.SIGSEGV)"
    ),
    signal=signal.SIGSEGV,
)
DIES_STARTING = Way("dies while starting", ("sh", "-c", "exit 7"), code=7, stdout=b"", ready=False)
NO_NEWLINE = Way(
    "no newline",
    python(f"import sys; {READY}; sys.stdout.write('end'); sys.stdout.flush()"),
    code=0,
    stdout=b"ready\nend",
)
INVALID_UTF8 = Way(
    "invalid UTF-8",
    python(f"import os; {READY}; os.write(1, b'a\\xff\\x00b\\n\\xe2\\x82'); os.write(2, b'\\xc3\\n')"),
    code=0,
    stdout=b"ready\na\xff\x00b\n\xe2\x82",
    stderr=b"\xc3\n",
)
FULL_PIPE = Way(
    "full pipe",
    python(f"import os; {READY}; os.write(1, b'x' * 99 + b'\\n'); [os.write(1, b'y' * 65536) for _ in range(64)]"),
    code=0,
    stdout=b"ready\n" + b"x" * 99 + b"\n" + b"y" * 65536 * 64,
)
"""4 MiB: more than any pipe holds."""
BURST_AND_KILLED = Way(
    "burst and SIGKILL",
    python(f"import os, signal; {READY}; os.write(1, b'z\\n' * 20000); os.kill(os.getpid(), signal.SIGKILL)"),
    signal=signal.SIGKILL,
    stdout=b"ready\n" + b"z\n" * 20000,
)
GRANDCHILD_KEEPS_PIPE = Way(
    "grandchild keeps the pipe",
    python(GRANDCHILD.format(program=SLEEP, how="") + f"; {READY}"),
    code=0,
    leaves=True,
)
GRANDCHILD_OWN_SESSION = Way(
    "grandchild in its own session",
    python(GRANDCHILD.format(program=SLEEP, how=f"start_new_session=True, {SILENT}") + f"; {READY}"),
    code=0,
    leaves=True,
)
DEAF_GRANDCHILD = Way(
    "grandchild that ignores SIGTERM",
    python(GRANDCHILD.format(program=DEAF, how=SILENT) + f"; {READY}"),
    code=0,
    leaves=True,
)
RUNS_ON = Way("runs until it is stopped", python(FOREVER), signal=signal.SIGTERM, ends="when stopped")
DEAF_TO_TERM = Way(
    "ignores SIGTERM",
    python(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"),
    signal=signal.SIGKILL,
    ends="when stopped",
)
STOPS_ITSELF = Way(
    "stopped with SIGSTOP",
    python(f"import os, signal; {READY}; os.kill(os.getpid(), signal.SIGSTOP)"),
    signal=signal.SIGTERM,
    ends="when stopped",
)
WRAPPED = Way(
    "under a shell",
    ("sh", "-c", '"$@"; true', "sh", *python(FOREVER)),
    signal=signal.SIGTERM,
    ends="when stopped",
)
EXITS_0_ON_TERM = Way(
    "exits 0 on SIGTERM",
    python(f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); {FOREVER}"),
    code=0,
    ends="when stopped",
)

ENDING = (
    EXIT_0,
    EXIT_3,
    EXCEPTION,
    OS_EXIT,
    KILLED,
    SEGFAULT,
    DIES_STARTING,
    NO_NEWLINE,
    INVALID_UTF8,
    FULL_PIPE,
    BURST_AND_KILLED,
    GRANDCHILD_KEEPS_PIPE,
    GRANDCHILD_OWN_SESSION,
    DEAF_GRANDCHILD,
)
LINGERING = (RUNS_ON, DEAF_TO_TERM, STOPS_ITSELF, WRAPPED, EXITS_0_ON_TERM)
WAYS = (*ENDING, *LINGERING)


@dataclass(frozen=True)
class NoStart:
    """A command that can't be started, and the class of the error."""

    name: str
    program: str
    error: type[OSError]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


NOT_FOUND = NoStart("command not found", "no-such-command-here", FileNotFoundError)
NOT_FOUND_BY_PATH = NoStart("path not found", "./no/such/command", FileNotFoundError)
NOT_EXECUTABLE = NoStart("not executable", "/etc/passwd", PermissionError)
A_DIRECTORY = NoStart("a directory", "/", PermissionError)
NO_STARTS = (NOT_FOUND, NOT_FOUND_BY_PATH, NOT_EXECUTABLE, A_DIRECTORY)
