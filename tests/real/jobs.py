"""What the function workers of the tests run: importable, and light, because every worker imports it."""

from __future__ import annotations

import textwrap
from typing import Any


def double(value: Any) -> Any:
    return value * 2


async def double_later(value: int) -> int:
    import asyncio

    await asyncio.sleep(0)
    return value * 2


def fail(text: str) -> None:
    error = ValueError(text)
    error.add_note("a hint")
    raise error from KeyError("the cause")


def evaluate(code: str) -> Any:
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(code), scope)
    return scope.get("value")


class Counter:
    def __init__(self, begin: int) -> None:
        self.begin = begin

    def plus(self, value: int) -> int:
        return self.begin + value


class Picky(Exception):
    """Can be pickled, and not rebuilt."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def be_picky() -> None:
    raise Picky(1, 2)


class Trap:
    """Raises where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise RuntimeError('trapped')",))


def write_to(memory: Any) -> int:
    memory.buf[:5] = b"hello"
    size: int = memory.size
    memory.close()
    return size
