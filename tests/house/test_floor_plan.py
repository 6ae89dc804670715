"""The house stands: a file imports only from the floors below its own (DESIGN section 5)."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tests.house.source import FILES, PACKAGE, Import, imports, place, tree

CELLAR = "_child"
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "words",
        (
            "_std",
            "_exit",
            "_failures",
            "_options",
            "_policies",
            "_conditions",
            "_results",
            "_events",
            "_returned",
            "_ending",
        ),
    ),
    ("rules", ("_spec", "_lifecycle", "_restart", "_logs/lines", "_logs/plan", "_logs/prefix")),
    ("tools of the machines", ("_tasks", "_threads", "_limits", "_contagion", "_descriptors")),
    ("machines", ("_bus", "_process", "_logs", "_evidence", "_health", "_guard")),
    ("functions", ("_function",)),
    ("worker", ("_worker",)),
    ("gang", ("_attempt", "_gang")),
    ("run", ("_succession", "_round", "_run", "_readiness", "_context", "_signals", "_start", "_kept", "_supervisor")),
    ("doors", ("__init__", "worker", "testing", "dask", "cli", "__main__")),
)
"""From the ground up. A name stands for its file, or for the folder and all in it that is not named elsewhere."""
ORDERED = ("words", "gang", "run", "doors")
"""Floors that tell one story in several files: each may use those before it."""
RULES = dict(FLOORS)["rules"]


def seat(where: str) -> tuple[int, int]:
    """Floor and position of a file; the cellar's are below everything."""
    if where.split("/")[0] == CELLAR:
        return (-1, 0)
    for name in (where, where.split("/")[0]):
        for floor, (_, names) in enumerate(FLOORS):
            if name in names:
                return (floor, names.index(name))
    raise LookupError(f"{where} has no floor: give it one in {Path(__file__).name}, where it belongs")


def same_folder(one: str, other: str) -> bool:
    return "/" in one and "/" in other and one.split("/")[0] == other.split("/")[0]


def complaint(where: str, used: Import) -> str | None:
    """What is wrong with one import, if anything."""
    (floor, position), (other_floor, other_position) = seat(where), seat(used.target)
    name = FLOORS[floor][0] if floor >= 0 else "cellar"
    if other_floor < floor or where == used.target or (same_folder(where, used.target) and other_floor <= floor):
        return None
    if other_floor == floor and name in ORDERED and (other_position < position or used.typing_only):
        return None
    return f"{where}.py:{used.line} ({name}) imports {used.target} ({FLOORS[other_floor][0]})"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    """What is below never knows what is above."""
    where = place(path)
    wrong = [complaint(where, used) for used in imports(path) if used.ours]
    assert not [text for text in wrong if text]


def test_no_import_cycle() -> None:
    """The files can be put in one order, folders included; imports for types alone don't run."""
    graph = {
        place(path): {
            used.target for used in imports(path) if used.ours and not used.typing_only and used.target != place(path)
        }
        for path in FILES
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "path", [p for p in FILES if place(p).startswith("_child/") or place(p) == "worker"], ids=place
)
def test_what_runs_inside_workers_needs_the_standard_library_only(path: Path) -> None:
    """The cellar imports itself and the standard library; a payload's own needs are the payload's."""
    optional = {"cloudpickle"}  # only where the payload was made with it (DESIGN section 6)
    allowed = sys.stdlib_module_names | optional
    strangers = [
        used.target
        for used in imports(path)
        if not used.typing_only and not (used.target.startswith("_child/") if used.ours else used.target in allowed)
    ]
    assert not strangers


@pytest.mark.parametrize("where", [rule for rule in RULES if (PACKAGE / f"{rule}.py").is_file()])
def test_rules_are_pure(where: str) -> None:
    """No await and no clock on the floor of the rules."""
    path = PACKAGE / f"{where}.py"
    clocks = {"asyncio", "anyio", "time", "threading", "subprocess"}
    assert not [used for used in imports(path) if used.target in clocks]
    assert not [node for node in ast.walk(tree(path)) if isinstance(node, (ast.AsyncFunctionDef, ast.Await))]
