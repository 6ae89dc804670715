"""Programs of the field as functions; those that need torch or much memory only with AELASTIC_TEST_LONG=1."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import shared_memory
from typing import Any

import pytest

from aelastic import start_processes
from tests.real import programs
from tests.real.jobs import evaluate
from tests.real.test_function_runs import LONG, METHODS, NET, Method

NEEDS_TORCH = pytest.mark.skipif(
    not (LONG and importlib.util.find_spec("torch")), reason="takes AELASTIC_TEST_LONG=1 and the torch extra"
)
GIB = 1 << 30


@pytest.fixture(scope="module")
def barrier() -> Any:
    """For three; made before anything is counted, because multiprocessing keeps the memory it lies in."""
    return multiprocessing.get_context("spawn").Barrier(3)


@pytest.fixture
def cleared() -> Iterator[None]:
    """Frees what is shared before it is counted."""
    yield
    gc.collect()


@METHODS
async def test_gradient_descent_over_a_barrier_and_shared_memory(method: Method, barrier: Any) -> None:
    """Three ranks find the line that their data lies on, all the same one."""
    size = 3
    memory = shared_memory.SharedMemory(create=True, size=16 * size)
    args = dict.fromkeys(range(size), (barrier, memory, size))
    try:
        async with start_processes("descend", programs.descend, args, start_method=method) as ctx:
            result = await ctx.wait()
        result.raise_for_failures("descend")
        assert result.return_values[0] == result.return_values[1] == result.return_values[2]
        assert result.return_values[0] == pytest.approx(programs.WEIGHTS, abs=0.05)
    finally:
        memory.close()
        memory.unlink()


@NEEDS_TORCH
@pytest.mark.usefixtures("cleared")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_a_data_parallel_training_step_with_torch(method: Method, tmp_path: Any) -> None:
    """Two ranks over gloo: the step is that of one process with both batches; tensors travel both ways."""
    torch: Any = importlib.import_module("torch")
    nn = torch.nn

    torch.manual_seed(7)
    model = nn.Linear(4, 1)
    x, y = (torch.cat(parts) for parts in zip(programs.batch(0), programs.batch(1), strict=True))
    nn.functional.mse_loss(model(x), y).backward()
    shared = torch.zeros(2)
    args = dict.fromkeys(range(2), (str(tmp_path / "store"), 7, shared))
    async with start_processes("train", programs.train, args, start_method=method) as ctx:
        result = await ctx.wait()
    result.raise_for_failures("train")
    values = result.return_values
    assert torch.equal(values[0]["weight"], values[1]["weight"])
    assert not torch.equal(values[0]["loss"], values[1]["loss"])
    with torch.no_grad():
        torch.testing.assert_close(values[0]["weight"], model.weight - 0.1 * model.weight.grad)
    assert shared.tolist() == [1, 1]  # torch's own reducers share an argument's memory


@NEEDS_TORCH
@pytest.mark.usefixtures("cleared")
async def test_tensors_in_a_closure_are_shared() -> None:
    """The reducers that torch registers with ForkingPickler count for what cloudpickle carries too."""
    torch: Any = importlib.import_module("torch")

    weights = torch.zeros(3)

    def add(more: Any) -> Any:
        return weights.add_(more)

    async with start_processes("add", add, {0: (torch.ones(3),)}) as ctx:
        result = await ctx.wait()
    result.raise_for_failures("add")
    assert result.return_values[0].tolist() == weights.tolist() == [1, 1, 1]


@pytest.mark.skipif(not LONG, reason="takes AELASTIC_TEST_LONG=1 and 5 GiB of memory")
@pytest.mark.parametrize("kind", ["bytes", "bytearray"])
async def test_a_result_larger_than_two_gib(kind: str) -> None:
    """Where a length no longer fits into 31 bits, or one read(2) and write(2)."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * GIB:
        pytest.skip("there is not enough free memory")
    size = 2 * GIB + 3
    code = f"value = {kind}({size - 3}) + b'end'"
    async with start_processes("large", evaluate, {0: (code,)}) as ctx:
        result = await ctx.wait(NET)
    assert result is not None
    result.raise_for_failures("large")
    value = result.return_values[0]
    assert (len(value), value[-4:]) == (size, b"\0end")
