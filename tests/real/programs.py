"""Real programs as functions: data-parallel gradient descent, once by the standard library alone and once by torch."""

from __future__ import annotations

import importlib
import os
import random
from typing import Any

STEPS = 30
RATE = 0.5
WEIGHTS = (3.0, -2.0)
"""What is to be found again in y = a x + b."""


def samples(rank: int, count: int = 200) -> list[tuple[float, float]]:
    """This rank's share of the data."""
    numbers = random.Random(rank)
    return [(x, WEIGHTS[0] * x + WEIGHTS[1]) for x in (numbers.uniform(-1, 1) for _ in range(count))]


def gradient(data: list[tuple[float, float]], a: float, b: float) -> tuple[float, float]:
    errors = [(a * x + b - y, x) for x, y in data]
    return sum(2 * error * x for error, x in errors) / len(data), sum(2 * error for error, _ in errors) / len(data)


def descend(barrier: Any, memory: Any, size: int) -> list[float]:
    """Each rank writes the gradient of its share where all see it, and all take the same step."""
    rank = int(os.environ["AELASTIC_RANK"])
    data = samples(rank)
    slots = memory.buf.cast("d")
    a = b = 0.0
    for _ in range(STEPS):
        slots[2 * rank], slots[2 * rank + 1] = gradient(data, a, b)
        barrier.wait()
        a -= RATE * sum(slots[2 * each] for each in range(size)) / size
        b -= RATE * sum(slots[2 * each + 1] for each in range(size)) / size
        barrier.wait()
    slots.release()
    memory.close()
    return [a, b]


def train(store: str, seed: int, shared: Any) -> dict[str, Any]:
    """One step of a data-parallel training with torch over gloo; `shared` is a tensor that all ranks have."""
    torch: Any = importlib.import_module("torch")  # Any: it may not be installed where types are checked
    distributed, nn = torch.distributed, torch.nn

    torch.set_num_threads(1)
    rank, size = int(os.environ["AELASTIC_RANK"]), int(os.environ["AELASTIC_WORLD_SIZE"])
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        torch.manual_seed(seed)
        # Not DistributedDataParallel: its threads abort one end of an interpreter in twenty, under multiprocessing too.
        model = nn.Linear(4, 1)
        x, y = batch(rank)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        for parameter in model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= size
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        shared[rank] += 1
        distributed.barrier()
        return {"loss": loss.detach(), "weight": model.weight.detach(), "bias": model.bias.detach()}
    finally:
        distributed.destroy_process_group()


def batch(rank: int) -> tuple[Any, Any]:
    """A rank's batch."""
    torch: Any = importlib.import_module("torch")

    numbers = torch.Generator().manual_seed(100 + rank)
    return torch.randn(8, 4, generator=numbers), torch.randn(8, 1, generator=numbers)
