"""How a process ended: `ExitStatus`, parsed once from what the kernel said.

Values only; who waits for the process is not told here.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import final

UNKNOWN_RETURNCODE = 255
"""What `returncode` says when another waiter took the status (asyncio says the same)."""


def signal_name(number: int) -> str:
    """Name a signal as kill(1) does, real-time signals by their distance from SIGRTMIN.

    Example:
        >>> signal_name(15)
        'SIGTERM'
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        floor = getattr(signal, "SIGRTMIN", None)
        if floor is not None and floor < number <= signal.SIGRTMAX:
            return f"SIGRTMIN+{number - floor}"
        return f"signal {number}"


@final
@dataclass(frozen=True, slots=True)
class ExitStatus:
    """The exit code or the signal a process ended with; never both.

    Both are None when the process is known to have ended but its status was taken by another
    waiter of this host and the kernel no longer tells it.

    Source: wait(2).

    Example:
        >>> ExitStatus(code=None, signal=15).describe()
        'killed by SIGTERM'
    """

    code: int | None
    """0..255, as given to exit(3)."""
    signal: int | None
    """Number of the signal that ended the process."""

    def __post_init__(self) -> None:
        if self.code is not None and self.signal is not None:
            raise ValueError(f"an exit has a code or a signal, not both: code={self.code}, signal={self.signal}")

    @classmethod
    def from_wait_status(cls, wait_status: int) -> ExitStatus:
        """Parse the status word of waitpid(2)."""
        return cls.from_returncode(os.waitstatus_to_exitcode(wait_status))

    @classmethod
    def from_returncode(cls, returncode: int) -> ExitStatus:
        """Parse a number as `subprocess.Popen.returncode` writes it (negative: a signal)."""
        return cls(None, -returncode) if returncode < 0 else cls(returncode, None)

    @property
    def ok(self) -> bool:
        """Whether the process said that it succeeded."""
        return self.code == 0

    @property
    def known(self) -> bool:
        """Whether the kernel told how the process ended."""
        return self.code is not None or self.signal is not None

    @property
    def returncode(self) -> int:
        """As `subprocess.Popen.returncode`: -15 for SIGTERM; 255 when unknown."""
        if self.signal is not None:
            return -self.signal
        return UNKNOWN_RETURNCODE if self.code is None else self.code

    @property
    def shell_code(self) -> int:
        """As a shell's `$?`: 143 for SIGTERM; 255 when unknown."""
        return 128 + self.signal if self.signal is not None else self.returncode

    def describe(self) -> str:
        """Say it in words: `exited with code 3`, `killed by SIGTERM`."""
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended with a status that another waiter of this process took"
