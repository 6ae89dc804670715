"""Services end in their own time, whoever cancels."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from aelastic._tasks import outlast, service


async def test_cancelling_a_service_asks_its_owner_and_throws_nothing_into_it() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        await asked.wait()
        ended.set()
        return "done"

    task = service(work(), name="work", on_cancel=asked.set)
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "done"
    assert ended.is_set()


async def test_outlast_holds_off_every_cancellation_until_the_end_and_raises_then() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiter = asyncio.ensure_future(outlast(future))
    for _ in range(5):
        await asyncio.sleep(0)
        waiter.cancel()
    await asyncio.sleep(0)
    assert not waiter.done()
    future.set_result(1)
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_outlast_passes_the_first_cancellation_of_a_scope_on() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with anyio.move_on_after(0) as scope:
        await outlast(future, on_cancel=lambda: future.set_result(1))
    assert scope.cancelled_caught


async def test_a_cancelled_caller_waits_for_the_end_although_what_it_waited_for_is_done() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()
    end: asyncio.Future[None] = loop.create_future()
    waiter = asyncio.ensure_future(outlast(future, on_cancel=lambda: None, end=end))
    await asyncio.sleep(0)
    waiter.cancel()
    future.set_result(1)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiter.done()
    end.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_outlast_gives_the_result_to_a_caller_that_nobody_cancelled() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await outlast(future) == 7


@pytest.mark.parametrize("module", ["asyncio", "uvloop"])
def test_a_service_that_the_end_of_the_loop_cancels_is_asked_while_the_loop_runs(module: str) -> None:
    """`asyncio.run` cancels from outside; who is asked there has no running loop to work with."""
    asked_in: list[asyncio.AbstractEventLoop] = []
    services = []

    async def forgetful() -> None:
        asked = asyncio.Event()

        def ask() -> None:
            asked_in.append(asyncio.get_running_loop())
            asked.set()

        services.append(service(asked.wait(), name="forgotten", on_cancel=ask))

    with asyncio.Runner(loop_factory=pytest.importorskip(module).new_event_loop) as runner:
        loop = runner.get_loop()
        runner.run(forgetful())
    assert asked_in == [loop]
    assert services[0].result()
