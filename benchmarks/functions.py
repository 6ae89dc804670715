"""What does a supervised function cost: its start, its result, its worker?

The rivals: bare `multiprocessing` by the same method, a process and a pipe a rank; torch; for a worker's own cost,
`python -c pass`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aelastic import StopPolicy, start_processes

from ._jobs import answer, forget_peak, large, peak_bytes, quick
from ._measure import (
    OURS,
    Question,
    Sizes,
    Verdict,
    alone,
    at_least,
    at_most,
    below,
    has_torch,
    median,
    take_turns,
    torch_name,
)
from ._ticker import ticking

BARE = "bare multiprocessing"
PASS = "python -c pass"
STARTS = 3
"""Starts in one process: a service starts more than one run."""
RESULT_BYTES = 1 << 30
SPAWNED = 8


def questions(sizes: Sizes) -> Iterator[Question]:
    yield _starts("spawn", SPAWNED, sizes)
    yield _starts("forkserver", sizes.ranks, sizes)
    yield from _results(sizes)
    yield _worker(sizes)


def _starts(method: str, ranks: int, sizes: Sizes) -> Question:
    contenders: dict[str, Callable[[], Any]] = {
        OURS: functools.partial(alone, "functions:ours", method=method, ranks=ranks),
        BARE: functools.partial(alone, "functions:bare", method=method, ranks=ranks),
    }
    if method == "spawn" and has_torch():
        contenders[torch_name()] = functools.partial(alone, "functions:torch", ranks=ranks)
    samples = take_turns(sizes.rounds, contenders)
    verdicts = at_most(samples, BARE, 1.2 if method == "spawn" else 1.3)
    if method == "spawn" and has_torch():
        verdicts += at_most(samples, torch_name(), 0.2)
    return Question(f"{ranks} functions by {method}, call to last return", "ms", samples, verdicts)


def _results(sizes: Sizes) -> Iterator[Question]:
    seen: dict[str, list[dict[str, float]]] = {OURS: [], BARE: []}
    for turn, who in itertools.product(range(max(sizes.rounds // 2, 1)), seen):
        del turn
        seen[who].append(alone(f"functions:{'our' if who == OURS else 'bare'}_result", size=RESULT_BYTES))
    speed = {who: [RESULT_BYTES / 1e6 / run["seconds"] for run in runs] for who, runs in seen.items()}
    yield Question(f"a result of {RESULT_BYTES >> 20} MiB", "MB/s", speed, at_least(speed, BARE, 0.7))
    for side in ("supervisor", "worker"):
        peaks = {who: [run[side] / RESULT_BYTES for run in runs] for who, runs in seen.items()}
        verdict = below(f"peak of the {side}", max(peaks[OURS]), 1.1, "values")
        yield Question(f"  its peak memory in the {side}", "values", peaks, [verdict])
    gaps = {OURS: [run["gap"] for run in seen[OURS]], "ticker by itself": [run["still"] for run in seen[OURS]]}
    beside = max(gaps["ticker by itself"])
    yield Question("  longest gap of a 1 ms ticker", "ms", gaps, [below("gap", max(gaps[OURS]), max(20, beside), "ms")])


def _worker(sizes: Sizes) -> Question:
    contenders = {OURS: "functions:our_worker", PASS: "functions:bare_interpreter"}
    samples = take_turns(sizes.rounds, {who: functools.partial(alone, what) for who, what in contenders.items()})
    over = median(samples[OURS]) - median(samples[PASS])
    verdict: Verdict = below(f"over {PASS}", over, 40, "ms")
    return Question("CPU of a spawned worker", "ms", samples, [verdict])


async def _run(method: Any, function: Callable[..., Any], args: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
    async with start_processes("bench", function, args, start_method=method) as ctx:
        result = await ctx.wait()
        result.raise_for_failures()
        return result.return_values


async def ours(method: str, ranks: int) -> list[float]:
    times: list[float] = []
    for _ in range(STARTS):
        began = time.perf_counter()
        await _run(method, quick, {rank: (rank,) for rank in range(ranks)})
        times.append((time.perf_counter() - began) * 1e3)
    return times


def bare(method: str, ranks: int) -> list[float]:
    times: list[float] = []
    for _ in range(STARTS):
        began = time.perf_counter()
        bare_run(method, quick, [(rank,) for rank in range(ranks)])
        times.append((time.perf_counter() - began) * 1e3)
    return times


def bare_run(method: str, function: Callable[..., Any], args: list[tuple[Any, ...]]) -> list[Any]:
    """Start, hear and join as an experienced user would by hand."""
    context: Any = multiprocessing.get_context(method)
    _forget_main()
    pipes = [context.Pipe(duplex=False) for _ in args]
    processes = []
    for (_, theirs), given in zip(pipes, args, strict=True):
        processes.append(context.Process(target=answer, args=(theirs, function, given)))
        processes[-1].start()
        theirs.close()
    values = [mine.recv() for mine, _ in pipes]
    for process in processes:
        process.join()
    for mine, _ in pipes:
        mine.close()
    return values


def _forget_main() -> None:
    """Keep bare workers from importing this harness's main module, which ours see that they don't need."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    vars(main).pop("__file__", None)


def torch(ranks: int) -> list[float]:
    elastic: Any = importlib.import_module("torch.distributed.elastic.multiprocessing")
    with tempfile.TemporaryDirectory() as log_dir:
        began = time.perf_counter()
        ctx = elastic.start_processes(
            "bench",
            quick,
            args={rank: (rank,) for rank in range(ranks)},
            envs={rank: {} for rank in range(ranks)},
            logs_specs=elastic.DefaultLogsSpecs(log_dir),
            start_method="spawn",
        )
        ctx.wait()
        return [(time.perf_counter() - began) * 1e3]


async def our_result(size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        peak_file = os.path.join(folder, "peak")
        async with ticking() as gaps:
            await asyncio.sleep(1)
            still = max(gaps)
        forget_peak()
        before, began = peak_bytes(), time.perf_counter()
        async with ticking() as gaps:
            values = await _run("spawn", large, {0: (size, peak_file)})
        seconds = time.perf_counter() - began
        if len(values[0]) != size:
            raise RuntimeError("the value is not whole")
        return {
            "seconds": seconds,
            "gap": max(gaps),
            "still": still,
            "supervisor": peak_bytes() - before,
            "worker": _read(peak_file),
        }


def bare_result(size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        peak_file = os.path.join(folder, "peak")
        forget_peak()
        before, began = peak_bytes(), time.perf_counter()
        (value,) = bare_run("spawn", large, [(size, peak_file)])
        seconds = time.perf_counter() - began
        if len(value) != size:
            raise RuntimeError("the value is not whole")
        return {"seconds": seconds, "supervisor": peak_bytes() - before, "worker": _read(peak_file)}


def _read(path: str) -> int:
    return int(Path(path).read_text())


async def our_worker() -> list[float]:
    await _one_worker()  # what is compiled for the first time is written by the first
    before = _children_cpu()
    await _one_worker()
    return [(_children_cpu() - before) * 1e3]


async def _one_worker() -> None:
    alone_here = StopPolicy(on_supervisor_death="keep")  # without the guard, which is a child too
    async with start_processes("bench", len, {0: ((),)}, stop=alone_here) as ctx:
        (await ctx.wait()).raise_for_failures()


def bare_interpreter() -> list[float]:
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    before = _children_cpu()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return [(_children_cpu() - before) * 1e3]


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
