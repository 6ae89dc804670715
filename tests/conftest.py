"""Every loop test on asyncio and on uvloop, and nothing left behind by any test."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from tests import leaks, matrix

LINUX = sys.platform.startswith("linux")


def uvloop_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop; the test is skipped where it isn't installed."""
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed: install the test extra")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop_loop,
}


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each loop test once on each loop."""
    return LOOPS


def pytest_sessionstart() -> None:
    """Let each loop open what it opens once a process and keeps, before the first snapshot.

    A shell's background job ignores SIGINT; the tests take their host's signals to be plain.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    leaks.mark_lineage()
    for name, new_loop in LOOPS.items():
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(_warm_up())
        except pytest.skip.Exception:
            sys.stderr.write(f"{name} is not installed: its tests are skipped\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the table of the zoo to the process that prints it, where tests run in several."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["matrix"] = matrix.to_plain()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the part of the table that one of the several processes has filled."""
    matrix.take(getattr(node, "workeroutput", {}).get("matrix", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the zoo, where it was walked through."""
    if matrix.has_cells():
        terminalreporter.section("nothing left")
        for line in matrix.lines():
            terminalreporter.write_line(line)


async def _warm_up() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    await asyncio.to_thread(int)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what is marked `one_loop` on one of the loops, by its name; all of it where the long tests are asked for."""
    if os.environ.get("AELASTIC_TEST_LONG"):
        return
    left_out = [item for item in items if item.get_closest_marker("one_loop") and not _is_this_loops(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_this_loops(item: pytest.Item) -> bool:
    names = sorted(LOOPS)
    test, _, parameters = item.nodeid.partition("[")
    words = parameters.rstrip("]").split("-")
    mine = next((name for name in names if name in words), None)
    if mine is None:
        return True  # no loop test
    rest = "-".join(word for word in words if word != mine)
    return names[zlib.crc32(f"{test}[{rest}".encode()) % len(names)] == mine


@pytest.fixture(autouse=True, scope="session")
def temporary_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let runs without a log directory of their own make theirs where pytest tidies up."""
    folder = str(tmp_path_factory.mktemp("tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test after which a child, descriptor, thread, signal action or working directory is not as before.

    Set up before the loop and torn down after it, so that what the loop itself opens is not seen.
    """
    if not LINUX:
        yield
        return
    before, directory = leaks.Snapshot.take(), os.getcwd()
    yield
    left = leaks.left_since(before)
    if os.getcwd() != directory:
        os.chdir(directory)
        left.append(f"the working directory was {directory}")
    if left:
        leaks.kill_descendants()
        pytest.fail("the test left something behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def no_task_left(nothing_left: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a loop test after which tasks are left, once those that were ending have ended."""
    if not pytest_asyncio.is_async_test(request.node):
        yield
        return
    # Asked for here, so that it is closed after this fixture (pytest-asyncio has no public name for it).
    runner: asyncio.Runner = request.getfixturevalue("_function_scoped_runner")
    yield
    left = runner.run(_tasks_left())
    if left:
        pytest.fail("the test left tasks behind:\n  " + "\n  ".join(left), pytrace=False)


async def _tasks_left() -> list[str]:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, others = await asyncio.wait(others, timeout=leaks.DEADLINE)
    return [repr(task) for task in others]
