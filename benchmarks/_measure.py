"""How everything is measured: each contender alone in a process of its own, taking turns, medians and p99.

A contender is a function of a benchmark's file, named as `"module:function"`. It is called in a fresh interpreter, so
that one that blocks holds up nobody, and hands back plain values. Where its console leads is its stdout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, final

ROOT = Path(__file__).parent.parent
OURS = "aelastic"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured."""

    rounds: int = 5
    """How often each contender has its turn."""
    ranks: int = 64
    megabytes: int = 400
    """What is tee'd in one turn, all workers together."""
    seconds: float = 10.0
    """How long idleness is watched."""
    directory: str = tempfile.gettempdir()
    """Where log files go while they are measured."""


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What was to be shown, and whether it was."""

    sentence: str
    met: bool


@final
@dataclass(frozen=True, slots=True)
class Question:
    """One part of the table: samples by contender, ours first."""

    title: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    verdicts: Sequence[Verdict] = ()

    def lines(self) -> Iterator[str]:
        """The text of the table."""
        yield f"{self.title} [{self.unit}]"
        ours = median(next(iter(self.samples.values())))
        for who, values in self.samples.items():
            middle = median(values)
            ratio = f"{ours / middle:10.2f}" if middle and who != next(iter(self.samples)) else " " * 10
            yield f"  {who:<34}{middle:10.2f}{p99(values):10.2f}{len(values):7d}{ratio}"
        for verdict in self.verdicts:
            yield f"  {'yes' if verdict.met else 'NO '} {verdict.sentence}"


HEADER = f"  {'':<34}{'median':>10}{'p99':>10}{'n':>7}{'ours/its':>10}"


def median(values: Sequence[float]) -> float:
    """The middle of the samples."""
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The sample that 99 in 100 don't exceed; with fewer than 100 it is the largest."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


def at_most(samples: Mapping[str, Sequence[float]], rival: str, times: float) -> list[Verdict]:
    """Judge that our median is at most so many times the rival's; nothing where the rival isn't installed."""
    if rival not in samples:
        return []
    ratio = median(samples[OURS]) / median(samples[rival])
    return [Verdict(f"{ratio:.2f} times {rival}; at most {times:g} was to be shown", ratio <= times)]


def at_least(samples: Mapping[str, Sequence[float]], rival: str, times: float) -> list[Verdict]:
    """Judge that our median is at least so many times the rival's; nothing where the rival isn't installed."""
    if rival not in samples:
        return []
    ratio = median(samples[OURS]) / median(samples[rival])
    return [Verdict(f"{ratio:.2f} times {rival}; at least {times:g} was to be shown", ratio >= times)]


def below(what: str, value: float, limit: float, unit: str) -> Verdict:
    """Judge a value by a limit of its own."""
    return Verdict(f"{what}: {value:.2f} {unit}; at most {limit:g} {unit} was to be shown", value <= limit)


def take_turns(rounds: int, contenders: Mapping[str, Callable[[], Sequence[float]]]) -> dict[str, list[float]]:
    """Let the contenders measure in turn, forwards and backwards: what disturbs the machine disturbs all of them."""
    samples: dict[str, list[float]] = {who: [] for who in contenders}
    for turn in range(rounds):
        order = list(contenders)
        for who in order if turn % 2 == 0 else reversed(order):
            samples[who] += contenders[who]()
    return samples


def has_torch() -> bool:
    """Whether the `torch` extra is installed here."""
    return importlib.util.find_spec("torch") is not None


def torch_name() -> str:
    """What torch is called in the table."""
    return f"torch {version('torch').partition('+')[0]}"


@final
class Alone:
    """A contender on its way, in a process of its own.

    Args:
        target: `"module:function"`, the module a file of this directory.
        console: its stdout; /dev/null by default.
        arguments: handed to the function.
    """

    def __init__(self, target: str, console: int | IO[bytes] = subprocess.DEVNULL, **arguments: Any) -> None:
        self._target = target
        self._read_fd, write_fd = os.pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks._alone", str(write_fd), target, json.dumps(arguments)],
                stdout=console,
                pass_fds=(write_fd,),
                env=os.environ | {"PYTHONPATH": path},
            )
        finally:
            os.close(write_fd)

    def result(self) -> Any:
        """Wait for what the function returned.

        Raises:
            RuntimeError: if it raised; its traceback is on stderr.
        """
        with open(self._read_fd, "rb") as answer:
            text = answer.read()
        if self._process.wait() or not text:
            raise RuntimeError(f"{self._target} ended with {self._process.returncode}")
        return json.loads(text)


def alone(target: str, console: int | IO[bytes] = subprocess.DEVNULL, **arguments: Any) -> Any:
    """Call a contender in a process of its own and return what it returned."""
    return Alone(target, console, **arguments).result()


@contextlib.contextmanager
def cat() -> Iterator[IO[bytes]]:
    """A pipe whose other end is read by `cat`, as a console."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        if reader.stdin is None:
            raise RuntimeError("cat has no stdin")
        yield reader.stdin
