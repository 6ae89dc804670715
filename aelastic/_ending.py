"""How one worker ended, in plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import final

from ._exit import ExitStatus
from ._failures import ProcessFailure
from ._results import Survivor
from ._returned import Returned


@final
class Cause(enum.Enum):
    """Why a worker was stopped."""

    FAILURE = "another rank failed"
    CALLER = "its caller asked"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a worker ended, all of it."""

    rank: int
    status: ExitStatus | None
    """None when the process is still alive."""
    stopped: Cause | None
    """Set when it was still running as the stop was asked for."""
    returned: Returned
    failure: ProcessFailure | None
    survivors: tuple[Survivor, ...]
    tail: tuple[str, ...] = ()
    """The last lines of its output, where it failed or was never ready."""
