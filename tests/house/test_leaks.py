"""The leak check sees what it must see: else it would be worth nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests import leaks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the leak check reads /proc")


@pytest.fixture(autouse=True)
def short_net(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the check give up at once while the test itself runs."""
    with monkeypatch.context() as patch:
        patch.setattr(leaks, "DEADLINE", 0.0)
        yield


def test_a_clean_stretch_leaves_nothing() -> None:
    """Nothing done, nothing found."""
    assert leaks.left_since(leaks.Snapshot.take()) == []


def test_a_child_is_seen_until_it_is_reaped() -> None:
    """A zombie counts: somebody forgot to reap it."""
    before = leaks.Snapshot.take()
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert "process" in leaks.left_since(before)[0]
    child.wait()
    assert leaks.left_since(before) == []


def test_a_double_forked_descendant_is_seen_by_its_lineage() -> None:
    """Whoever left session and parent still carries the lineage."""
    before = leaks.Snapshot.take()
    program = (
        "import subprocess; far = subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=subprocess.DEVNULL);"
        "print(far.pid)"
    )
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert f"process {int(run.stdout)} is left" in leaks.left_since(before)[0]
    pidfd = os.pidfd_open(int(run.stdout))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def test_a_descriptor_is_seen() -> None:
    """Opened and not closed, or closed although somebody else opened it."""
    before = leaks.Snapshot.take()
    ours, theirs = os.pipe()
    assert [line.split()[0] for line in leaks.left_since(before)] == ["descriptor", "descriptor"]
    between = leaks.Snapshot.take()
    os.close(ours)
    os.close(theirs)
    assert any("was closed" in line for line in leaks.left_since(between))


def test_a_thread_is_seen() -> None:
    """Until it has ended."""
    before, end = leaks.Snapshot.take(), threading.Event()
    thread = threading.Thread(target=end.wait, name="left over")
    thread.start()
    assert leaks.left_since(before) == ["thread left over is left"]
    end.set()
    thread.join()


def test_a_signal_action_is_seen() -> None:
    """What a signal does is put back by whoever changed it."""
    before = leaks.Snapshot.take()
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    assert "signal" in leaks.left_since(before)[0]
    signal.signal(signal.SIGUSR1, old)


async def test_each_loop_is_met() -> None:
    """A loop test runs on the loop that its name says."""
    name = os.environ["PYTEST_CURRENT_TEST"]
    module = type(asyncio.get_running_loop()).__module__
    assert ("uvloop" in name) == module.startswith("uvloop")
