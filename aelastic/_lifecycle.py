"""The rules of a worker's life and of a stop; pure, time is an argument.

Theory of operation: a worker runs until it exits by itself (EXITED) or because we stopped it (STOPPING, then
STOPPED). Which of the two it was is settled by what was seen first, and decides whether it can be a failure. Either
way it has ENDED only when nothing of its tree is left, or when everything was tried.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from ._policies import Step
from ._results import Outcome


@final
class State(enum.Enum):
    """Where a worker is in its life."""

    RUNNING = enum.auto()
    STOPPING = enum.auto()
    """Asked to stop while it was running."""
    EXITED = enum.auto()
    """Its own process is gone, by itself."""
    STOPPED = enum.auto()
    """Its own process is gone, after it was asked to stop."""
    UNKILLABLE = enum.auto()
    """Its own process outlived the last step, and was reported; its exit may come any time later."""
    ENDED = enum.auto()


@final
class Fact(enum.Enum):
    """What can happen to a worker."""

    STOP_ASKED = enum.auto()
    EXIT_SEEN = enum.auto()
    GIVEN_UP = enum.auto()
    """Its own process runs on although the last step's time is over."""
    END_REACHED = enum.auto()
    """Nothing of the tree is left, or the last step's time is over."""


NEXT: Mapping[State, Mapping[Fact, State]] = {
    State.RUNNING: {
        Fact.STOP_ASKED: State.STOPPING,
        Fact.EXIT_SEEN: State.EXITED,
        Fact.GIVEN_UP: State.UNKILLABLE,
    },
    State.STOPPING: {
        Fact.STOP_ASKED: State.STOPPING,
        Fact.EXIT_SEEN: State.STOPPED,
        Fact.GIVEN_UP: State.UNKILLABLE,
        Fact.END_REACHED: State.ENDED,
    },
    State.EXITED: {Fact.STOP_ASKED: State.EXITED, Fact.END_REACHED: State.ENDED},
    State.STOPPED: {Fact.STOP_ASKED: State.STOPPED, Fact.END_REACHED: State.ENDED},
    State.UNKILLABLE: {
        Fact.STOP_ASKED: State.UNKILLABLE,
        Fact.EXIT_SEEN: State.UNKILLABLE,
        Fact.END_REACHED: State.UNKILLABLE,
    },
    State.ENDED: {Fact.STOP_ASKED: State.ENDED, Fact.EXIT_SEEN: State.ENDED},
}
"""An exit may be seen after the end: the kernel can say that nothing is left before it tells us of the exit."""


def after(rank: int, state: State, fact: Fact) -> State:
    """The state that follows.

    Raises:
        RuntimeError: if the table has no such entry: a bug of ours.
    """
    try:
        return NEXT[state][fact]
    except KeyError:
        raise RuntimeError(f"rank {rank}: {fact.name} can't happen to a worker that is {state.name}") from None


@final
@dataclass(frozen=True, slots=True)
class Due:
    """One step of a stop under way."""

    signal: int
    until: float
    """When its time is over, on the loop's clock."""


def schedule(steps: Iterable[Step], now: float) -> tuple[Due, ...]:
    """Turn steps into deadlines that all ranks share.

    Example:
        >>> [due.until for due in schedule(((15, 30.0), (9, 5.0)), now=100.0)]
        [130.0, 135.0]
    """
    dues: list[Due] = []
    for signal, seconds in steps:
        now += seconds
        dues.append(Due(signal, now))
    return tuple(dues)


def outcome(*, failed: bool, survived: bool, closed: bool) -> Outcome:
    """How a run ended.

    Args:
        failed: whether any rank failed.
        survived: whether processes are left.
        closed: whether its caller closed it before it ended by itself.
    """
    if failed or survived:
        return "failed"
    return "stopped" if closed else "succeeded"
