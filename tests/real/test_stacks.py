"""`dump_stacks`: where every thread of a rank is, or why nobody can say."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from aelastic import HealthPolicy, Notify, RankMappingError, StopPolicy, start_processes
from aelastic._child import procfs
from aelastic._health.stacks import write_to_stderr
from tests.real.patients import LONG, be_ready_and_rest, hold_interpreter, speaker
from tests.real.runs import QUICK, all_events, tee
from tests.real.test_ready import launch
from tests.ways_to_die import FOREVER, PYTHON

pytestmark = pytest.mark.one_loop

READY = HealthPolicy(ready=Notify())
DUMPS = StopPolicy(steps=((signal.SIGTERM, 0.2), (signal.SIGKILL, 10.0)), drain=0.2, dump_stacks=True)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"] if LONG else ["forkserver"])
async def test_functions_show_their_stacks_and_go_on(method: Any) -> None:
    """Also with the GIL held, also asked by several at once; nothing of it reaches their streams."""
    run = start_processes("test", _rest_or_hold, {0: (0,), 1: (1,)}, start_method=method, health=READY, stop=QUICK)
    async with run as ctx:
        await ctx.wait_ready(30)
        first, second, third = await asyncio.gather(ctx.dump_stacks(), ctx.dump_stacks(ranks=[1]), ctx.dump_stacks())
        again = await ctx.dump_stacks(ranks=[0])
        assert set(ctx.pids()) == {0, 1}
    for texts in (first, third):
        assert "be_ready_and_rest" in texts[0]
        assert "hold_interpreter" in texts[1]
    assert "hold_interpreter" in second[1]
    assert again[0].count("be_ready_and_rest") == 1
    assert set(second) == {1}


def _rest_or_hold(which: int) -> None:
    hold_interpreter() if which else be_ready_and_rest()


async def test_a_recorded_script_shows_all_its_threads(tmp_path: Path) -> None:
    """Under a shell too: every Python process of the rank is asked."""
    script = tmp_path / "job.py"
    code = (
        "import threading\n"
        "@record\n"
        "def main():\n"
        "    threading.Thread(target=in_thread, daemon=True).start()\n"
        "    ready()\n"
        "    signal.pause()\n"
        "def in_thread(): time.sleep(600)\n"
        "main()\n"
    )
    script.write_text(speaker(code)[-1], encoding="utf-8")
    async with launch(("sh", "-c", f"{PYTHON[0]} {script}; true"), health=READY) as ctx:
        await ctx.wait_ready(30)
        (text,) = (await ctx.dump_stacks()).values()
    assert "in main" in text
    assert "in in_thread" in text
    assert str(script) in text


async def test_what_shows_no_stacks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python, no py-spy, not allowed to look, ended, no such rank."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    async with launch(("sleep", "600"), (*PYTHON, FOREVER), ("true",), stop=QUICK) as ctx:
        await ctx.wait_for_line("ready", rank=1, timeout=30)
        while 2 in ctx.pids():
            await asyncio.sleep(0.01)
        texts = await ctx.dump_stacks(ranks=[0, 1, 2])
        with pytest.raises(RankMappingError):
            await ctx.dump_stacks(ranks=[3])
    assert "nothing of this rank runs Python" in texts[0]
    assert "sleep" in texts[0]
    assert "py-spy is not installed: pip install py-spy" in texts[1]
    assert texts[2] == "there are no stacks: this rank has ended\n"
    assert await ctx.dump_stacks() == {}


@pytest.mark.parametrize(("code", "told"), [(0, "Thread 1 (idle)"), (1, "may not (ptrace(2)): Permission denied")])
async def test_other_python_is_read_by_py_spy(
    code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed; what it can't read, it tells."""
    spy = tmp_path / "py-spy"
    said = 'echo "Permission denied" >&2' if code else 'echo "Thread 1 (idle) $*"'
    spy.write_text(f"#!/bin/sh\n{said}\nexit {code}\n", encoding="ascii")
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    async with launch((*PYTHON, FOREVER)) as ctx:
        await ctx.wait_for_line("ready", timeout=30)
        text = (await ctx.dump_stacks())[0]
        pid = ctx.pids()[0]
    assert told in text
    assert code or f"dump --pid {pid}" in text


@pytest.mark.skipif(shutil.which("py-spy") is None, reason="py-spy is not installed: pip install py-spy")
async def test_the_real_py_spy_reads_a_plain_script() -> None:
    """By name of the function it is in."""
    async with launch(
        (*PYTHON, "def here():\n  import signal; print('ready', flush=True); signal.pause()\nhere()")
    ) as ctx:
        await ctx.wait_for_line("ready", timeout=30)
        assert "here" in (await ctx.dump_stacks())[0]


async def test_a_stopped_process_is_told_from_a_silent_one() -> None:
    """It takes no signal, and is not waited for."""
    async with start_processes(
        "test", be_ready_and_rest, {0: ()}, start_method="fork", health=READY, stop=QUICK
    ) as ctx:
        await ctx.wait_ready(30)
        os.kill(ctx.pids()[0], signal.SIGSTOP)
        text = (await ctx.dump_stacks())[0]
    assert "it takes no signal, its state is T" in text


async def test_who_closes_every_descriptor_gets_no_signal(tmp_path: Path) -> None:
    """Its memory for stacks is gone, and what has its number now stays clean."""
    clean = tmp_path / "clean"
    code = (
        "@record\ndef main():\n"
        "    os.closerange(3, 50)\n"
        f"    files = [open({str(clean)!r}, 'w') for _ in range(9)]; ready(); signal.pause()\n"
        "main()"
    )
    async with launch(speaker(code), health=READY) as ctx:
        await ctx.wait_ready(30)
        text = (await ctx.dump_stacks())[0]
        assert set(ctx.pids()) == {0}
    assert clean.read_bytes() == b""
    assert "py-spy" in text or "Python v" in text


async def test_a_stranger_that_got_the_number_meanwhile_reads_nothing(tmp_path: Path) -> None:
    """What is written as if a worker had written it goes to that worker, or nowhere."""
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        worker = await asyncio.create_subprocess_exec("sleep", "600", stderr=stderr)
        member = procfs.read_member(worker.pid, lineage=False)
        assert member is not None
        assert write_to_stderr(member, "its own\n")
        member.started -= 1  # as if an earlier process of this number had been seen
        assert not write_to_stderr(member, "another's\n")
        worker.kill()
        await worker.wait()
    assert log.read_bytes() == b"its own\n"


async def test_stacks_before_the_last_step(tmp_path: Path) -> None:
    """Where a stop must kill, the log says what it was doing; where it need not, nothing is written."""
    run = start_processes(
        "test",
        _deaf_or_obedient,
        {0: (0,), 1: (1,)},
        start_method="fork",
        logs_specs=tee(tmp_path),
        health=READY,
        stop=DUMPS,
    )
    async with run as ctx:
        await ctx.wait_ready(30)
        await ctx.close()
        result = await ctx.wait()
    assert [result.exits[rank].signal for rank in (0, 1)] == [signal.SIGKILL, signal.SIGTERM]
    deaf, obedient = (Path(result.stderrs[rank]).read_text(encoding="utf-8") for rank in (0, 1))
    assert "it is killed next: its context was closed" in deaf
    assert "be_ready_and_rest" in deaf
    assert obedient == ""
    assert result.outcome == "stopped"
    assert await all_events(ctx)


def _deaf_or_obedient(which: int) -> None:
    if not which:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    be_ready_and_rest()
