"""The list of ways to die says what is so: each is tried with the standard library alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import leaks, ways_to_die
from tests.ways_to_die import ENDING, LINGERING, NO_STARTS, NoStart, Way


def status(returncode: int) -> tuple[int | None, int | None]:
    return (None, -returncode) if returncode < 0 else (returncode, None)


@pytest.mark.parametrize("way", ENDING, ids=str)
def test_it_ends_by_itself_as_the_list_says(way: Way) -> None:
    """Exit status and output are the listed ones."""
    with subprocess.Popen(way.argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        if way.leaves:
            child.wait()
            leaks.kill_descendants()
        stdout, stderr = child.communicate()
    assert status(child.returncode) == (way.code, way.signal)
    assert stdout == way.stdout
    assert stderr.endswith(way.stderr)
    assert bool(stderr) == bool(way.stderr)


@pytest.mark.parametrize("way", LINGERING, ids=str)
def test_it_ends_when_it_is_stopped(way: Way) -> None:
    """After `ready` it lives on until SIGTERM and SIGCONT, or SIGKILL, reach its group."""
    with subprocess.Popen(way.argv, stdout=subprocess.PIPE, start_new_session=True) as child:
        if child.stdout is None:
            raise RuntimeError("Popen gave no pipe")
        assert child.stdout.readline() == b"ready\n"
        assert child.poll() is None
        for number in (signal.SIGKILL,) if way.signal == signal.SIGKILL else (signal.SIGTERM, signal.SIGCONT):
            os.killpg(child.pid, number)
        child.wait()
    if way is not ways_to_die.WRAPPED:  # which of the two a signal meets first is the shell's affair
        assert status(child.returncode) == (way.code, way.signal)


@pytest.mark.parametrize("way", NO_STARTS, ids=str)
def test_it_does_not_start(way: NoStart) -> None:
    """The error is of the listed class."""
    with pytest.raises(way.error):
        subprocess.Popen([way.program])


def test_the_bare_interpreter_is_this_one() -> None:
    """What runs the lines is what runs the tests."""
    assert ways_to_die.PYTHON[0] == sys.executable
