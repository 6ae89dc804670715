"""What a function handed back, or why nothing came: the cases of `Returned`.

Values only; `_function` reads them from the workers' pipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True)
class Value:
    """The function returned."""

    value: Any


@final
@dataclass(frozen=True, slots=True)
class Raised:
    """The function raised, or could not be loaded in its worker."""

    exception: BaseException | None
    """None where it could not be pickled there or rebuilt here; else its cause is the remote traceback."""
    traceback: str
    """As the worker printed it."""


@final
@dataclass(frozen=True, slots=True)
class NoResult:
    """The worker ended, or the pipe closed, before a result began."""


@final
@dataclass(frozen=True, slots=True)
class Torn:
    """A result began and did not end."""

    reason: str
    """A sentence."""


@final
@dataclass(frozen=True, slots=True)
class Unloadable:
    """The function returned a value that could not be pickled there or unpickled here."""

    reason: str
    """A sentence: which of the two, and why."""
    traceback: str


Returned = Value | Raised | NoResult | Torn | Unloadable
NO_RESULT = NoResult()


class RemoteTraceback(Exception):
    """The traceback of an exception from a worker, shown as its cause.

    Args:
        traceback: as the worker printed it.
    """

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        return f"\n{self.traceback}"
