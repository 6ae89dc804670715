"""The health of one worker: what it says to its socket, whether it is ready, whether it is stuck.

A monitor observes and says what it found (`Patient.is_ready`, `Patient.condemn`); what follows is `_worker`'s.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, final

from .._conditions import HealthPolicy
from .._tasks import ServiceTask, service
from .alarms import Alarms
from .notify import Notice, NotifySocket
from .readiness import Readiness, Senses
from .stacks import Stacks

MICROSECONDS = 1_000_000
READY, HEARTBEAT = "ready", "heartbeat"
STATUS_SHOWN = 500
"""Characters of what a worker says of itself."""


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a worker must go."""

    reason: Literal["not_ready", "watchdog"]
    message: str

    @property
    def kills(self) -> bool:
        """Whether it is killed at once; it is stopped as the policy says otherwise."""
        return self.reason == "watchdog"


class Patient(Protocol):
    """The worker that is observed."""

    rank: int
    pid: int

    def is_ready(self) -> None:
        """Learn that the condition of readiness is true; called once at the most."""

    def watchdog_expired(self, seconds: float) -> None:
        """Learn that a watchdog expired; its stacks are written now, the verdict follows."""

    def condemn(self, verdict: Verdict) -> None:
        """Fail and go; without effect on a worker that has ended or is being stopped."""


@final
class Monitor:
    """Observes one worker from before its start until nothing of it is left. Belongs to the running loop.

    Raises:
        OSError: if no descriptor is left.
        StreamNotCaptured: if the lines of a pattern can't be read.
    """

    def __init__(self, rank: int, policy: HealthPolicy, senses: Senses, stacks: Stacks) -> None:
        self._policy = policy
        self._stacks = stacks
        self._watchdog = policy.watchdog
        self._patient: Patient | None = None
        self._blocks: dict[Hashable, float] = {}
        self._status = self._errno = ""
        self._stopping = False
        self._observing = False
        self._expiring: ServiceTask[None] | None = None
        condition = policy.condition_of(rank)
        self._readiness = (
            None if condition is None else Readiness(rank, condition, policy.interval, senses, self._became_ready)
        )
        self._socket = NotifySocket(self._heard)
        self._alarms = Alarms(self._socket.look, self._ring)

    @property
    def env(self) -> dict[str, str]:
        """What the worker must find in its environment."""
        if self._policy.watchdog is None:
            return {"NOTIFY_SOCKET": self._socket.address}
        microseconds = str(max(int(self._policy.watchdog * MICROSECONDS), 1))
        return {"NOTIFY_SOCKET": self._socket.address, "WATCHDOG_USEC": microseconds}

    @property
    def has_condition(self) -> bool:
        """Whether the worker is not ready merely because it runs."""
        return self._readiness is not None

    @property
    def captures(self) -> Mapping[str, str]:
        """What line patterns captured so far."""
        return {} if self._readiness is None else self._readiness.captures

    def begin(self, patient: Patient) -> None:
        """Observe a worker that has just been started."""
        self._patient = patient
        self._observing = True
        self._socket.listen()
        if self._readiness is None:
            self._expect_heartbeat()
            return
        self._readiness.begin()
        if self._policy.ready_timeout is not None:
            self._alarms.set(READY, time.monotonic() + self._policy.ready_timeout)

    def hear_the_last(self) -> None:
        """Hear what the worker has said by now, which counts although its end has been seen, and then stand down."""
        self._socket.look()
        self.stand_down()

    def stand_down(self) -> None:
        """Demand nothing more: the worker is stopped, or has ended. Who still talks is heard all the same."""
        self._observing = False
        self._alarms.clear()
        if self._readiness is not None:
            self._readiness.stop()

    async def close(self) -> None:
        """Give up everything; idempotent, bounded."""
        self.stand_down()
        self._socket.close()
        if self._readiness is not None:
            await self._readiness.end()
        if self._expiring is not None:
            await asyncio.wait({self._expiring})

    def missing(self) -> str:
        """What is still to become true, in words, and what the worker said of itself."""
        what = "" if self._readiness is None else f"still missing: {self._readiness.missing()}"
        return f"{what}{self._said()}"

    def _said(self) -> str:
        said = f"; its last status: {self._status}" if self._status else ""
        return f"{said}; it reported the error {self._errno}" if self._errno else said

    def _became_ready(self) -> None:
        if not self._observing or self._patient is None:
            return
        self._alarms.drop(READY)
        self._patient.is_ready()
        self._expect_heartbeat()

    def _expect_heartbeat(self) -> None:
        if self._watchdog is not None and self._observing and not self._stopping:
            self._alarms.set(HEARTBEAT, time.monotonic() + self._watchdog)

    def _heard(self, notice: Notice) -> None:
        if not self._observing:
            return
        self._status = notice.get("STATUS", self._status)[:STATUS_SHOWN]
        if "ERRNO" in notice:
            self._errno = _error(notice["ERRNO"])
        if (seconds := _seconds(notice, "EXTEND_TIMEOUT_USEC")) is not None and (due := self._alarms.due(READY)):
            self._alarms.set(READY, max(due, time.monotonic() + seconds))
        if (seconds := _seconds(notice, "WATCHDOG_USEC")) and self._watchdog is not None:
            self._change_watchdog(seconds)
        if "X_AELASTIC_BLOCK" in notice:
            self._block(notice["X_AELASTIC_BLOCK"], _seconds(notice, "X_AELASTIC_USEC"))
        if notice.get("STOPPING") == "1":
            self._stopping = True
            self._alarms.drop(HEARTBEAT)
        if notice.get("READY") == "1" and self._readiness is not None:
            self._readiness.notified()
        match notice.get("WATCHDOG"):
            case "1" if self._alarms.due(HEARTBEAT) is not None:
                self._expect_heartbeat()
            case "trigger":
                self._expire(self._watchdog or 0.0, "it said WATCHDOG=trigger")

    def _change_watchdog(self, seconds: float) -> None:
        """Let this be the time between heartbeats, from now on, as systemd has it."""
        self._watchdog = seconds
        if self._alarms.due(HEARTBEAT) is not None:
            self._expect_heartbeat()

    def _block(self, name: str, seconds: float | None) -> None:
        """Take note that a block of `aelastic.worker.expires` begins, or ends."""
        key = ("block", name)
        if seconds is None:
            self._alarms.drop(key)
            self._blocks.pop(key, None)
        else:
            self._blocks[key] = seconds
            self._alarms.set(key, time.monotonic() + seconds)

    def _ring(self, name: Hashable) -> None:
        if name == READY:
            self._not_ready()
        elif name == HEARTBEAT:
            self._expire(self._watchdog or 0.0, f"it sent no heartbeat for {self._watchdog:g} s")
        else:
            seconds = self._blocks.pop(name)
            self._expire(seconds, f"a block that had to end within {seconds:g} s did not")

    def _not_ready(self) -> None:
        message = f"it was not ready within {self._policy.ready_timeout:g} s; {self.missing()}"
        self.stand_down()
        if self._patient is not None:
            self._patient.condemn(Verdict("not_ready", message))

    def _expire(self, seconds: float, what: str) -> None:
        if self._patient is None:
            return
        self.stand_down()
        self._patient.watchdog_expired(seconds)
        self._expiring = service(self._show_and_condemn(self._patient, f"{what}{self._said()}"), name="watchdog")

    async def _show_and_condemn(self, patient: Patient, message: str) -> None:
        await self._stacks.into_log(patient.rank, patient.pid, message)
        patient.condemn(Verdict("watchdog", message))


def _seconds(notice: Notice, name: str) -> float | None:
    """A time that was given in microseconds; None where there is none, or none that can be meant."""
    text = notice.get(name, "")
    return int(text) / MICROSECONDS if text.isdecimal() and len(text) < 16 else None


def _error(text: str) -> str:
    return f"{text} ({os.strerror(int(text))})" if text.isdecimal() and len(text) < 6 else text
