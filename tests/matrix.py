"""The table of the zoo: which trees were gone after which way to end, printed in the suite's summary."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from tests.zoo import TREES, Tree

LETTERS = {"command": "c", "spawn": "s", "forkserver": "v", "fork": "f"}
_cells: dict[tuple[str, str], frozenset[Tree]] = {}
"""By way and method: the trees of which something was left."""


def record(way: str, method: str, left: Collection[Tree]) -> None:
    """Note what a run of the whole zoo left."""
    _cells[way, method] = _cells.get((way, method), frozenset()) | frozenset(left)


def has_cells() -> bool:
    """Whether anything was noted."""
    return bool(_cells)


def to_plain() -> list[list[object]]:
    """What was noted in this process, for the one that prints it."""
    return [[way, method, [str(tree) for tree in left]] for (way, method), left in _cells.items()]


def take(noted: list[list[Any]]) -> None:
    """Note what another process of the session noted."""
    named = {str(tree): tree for tree in TREES}
    for way, method, left in noted:
        record(way, method, [named[name] for name in left])


def lines() -> Iterator[str]:
    """A row a tree, a column a way; a letter for each method after which nothing of it was left."""
    ways = list(dict.fromkeys(way for way, _ in _cells))
    width = max(map(len, (str(tree) for tree in TREES)), default=0)
    yield "c: command, s: spawn, v: fork server, f: fork; X: something was left; -: not tried"
    yield " ".join([" " * width, *(f"{way:<{_width(way)}}" for way in ways)])
    for tree in TREES:
        yield " ".join([f"{tree!s:<{width}}", *(f"{_cell(way, tree):<{_width(way)}}" for way in ways)])


def _width(way: str) -> int:
    return max(len(way), len(LETTERS))


def _cell(way: str, tree: Tree) -> str:
    return "".join(
        "-" if (way, method) not in _cells else "X" if tree in _cells[way, method] else letter
        for method, letter in LETTERS.items()
    )
