"""What a rank uses: of its whole tree, asked at any time, sampled, and at its end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

from aelastic import HealthPolicy, Notify, PContext, UsageSampled, WorkerExited, start_processes
from tests.real.patients import spend
from tests.real.runs import QUICK, all_events, redirect
from tests.real.test_limits import descriptors
from tests.real.test_ready import launch
from tests.ways_to_die import FOREVER, PYTHON

MIB = 1 << 20
READY = HealthPolicy(ready=Notify())


async def test_usage_is_that_of_the_tree() -> None:
    """CPU, memory, threads, descriptors and processes of every rank that runs."""
    tree = (
        "import os, threading, time\n"
        "files = [open('/dev/null') for _ in range(20)]\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "if os.fork() == 0:\n"
        "    kept = b'x' * (50 << 20)\n"
        "    while time.process_time() < 0.2: pass\n"
        f"    {FOREVER}\n"
        "time.sleep(600)"
    )
    async with launch((*PYTHON, tree), (*PYTHON, FOREVER), ("true",)) as ctx:
        await ctx.wait_for_line("ready", rank=0, timeout=30)
        await ctx.wait_for_line("ready", rank=1, timeout=30)
        usages = await ctx.usage()
    assert {0, 1} <= set(usages)
    used, idle = usages[0], usages[1]
    assert 0.15 <= used.cpu_seconds < 10 > idle.cpu_seconds  # /proc counts in ticks of 10 ms
    assert 50 * MIB <= used.rss_bytes < 200 * MIB
    assert (used.processes, idle.processes) == (2, 1)
    assert used.threads == 3
    assert used.descriptors >= 2 * 20 + 6
    assert 3 <= idle.descriptors < 10
    assert await ctx.usage() == {}


async def test_samples_go_to_the_journal_and_tell_the_peak(tmp_path: Path) -> None:
    """Every so often, all ranks in one event; the peak is in the exit."""
    health = HealthPolicy(ready=Notify(), usage_every=0.05)
    async with start_processes(
        "test",
        spend,
        {0: (0.05, 64 * MIB)},
        start_method="fork",
        logs_specs=redirect(tmp_path),
        health=health,
        stop=QUICK,
    ) as ctx:
        await ctx.wait_ready(30)
        sampled = [event async for event in _samples(ctx, 3)]
        await ctx.close()
        told = await all_events(ctx)
    assert sampled[-1].usages[0].rss_bytes >= 64 * MIB
    lines = [json.loads(line) for line in Path(ctx.log_dir, "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line["event"] == "UsageSampled"][-1]["usages"]["0"]["processes"] >= 1
    assert lines[-1]["event"] == "RunFinished"
    (exited,) = (event for event in told if isinstance(event, WorkerExited))
    assert 64 * MIB <= (exited.usage.peak_rss_bytes or 0) < 1024 * MIB
    assert 0.02 <= (exited.usage.cpu_seconds or 0) < 10  # user's and system's time are cut to ticks, each
    assert "ranks have used" in str(sampled[0])


async def _samples(ctx: PContext, count: int) -> AsyncIterator[UsageSampled]:
    async for event in ctx.events():
        if isinstance(event, UsageSampled) and event.usages.get(0) and event.usages[0].rss_bytes >= 64 * MIB:
            yield event
            count -= 1
        if not count:
            return


async def lacks_descriptors(ctx: PContext) -> bool:
    """Take away all descriptors for some samples' time; whether one that was asked for failed for want of them."""
    with descriptors(free=0):
        try:
            await ctx.usage()
        except OSError as error:
            await asyncio.sleep(0.1)  # some samples' time; how many is all the same
            return error.errno == errno.EMFILE
        return False


async def test_sampling_goes_on_when_there_are_descriptors_again() -> None:
    """Samples are left out while none is free."""
    async with launch((*PYTHON, FOREVER), health=HealthPolicy(usage_every=0.02)) as ctx:
        await ctx.wait_for_line("ready", rank=0, timeout=30)
        async with asyncio.timeout(10):
            while not await lacks_descriptors(ctx):
                pass  # a sample under way had some, and gave them back
        later = ctx.events(replay=False)
        async with asyncio.timeout(10):
            await anext(event async for event in later if isinstance(event, UsageSampled) and event.usages)


async def test_without_a_sample_no_peak_is_invented() -> None:
    """`ru_maxrss` would tell the host's own size."""
    ballast = os.urandom(1) * (100 * MIB)
    async with launch(("true",)) as ctx:
        await ctx.wait()
    assert len(ballast) == 100 * MIB
    (exited,) = (event for event in await all_events(ctx) if isinstance(event, WorkerExited))
    assert exited.usage.peak_rss_bytes is None
    assert exited.usage.cpu_seconds is None or exited.usage.cpu_seconds < 5
