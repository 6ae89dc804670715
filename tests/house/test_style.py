"""How the code reads, where that can be counted (STYLE)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import FILES, place, tree

BANNED = frozenset("handler manager util utils helper helpers common base misc info".split())
KEPT = frozenset({"ErrorHandler", "get_error_handler", "error_handler", "PIDFD_GET_INFO", "PIDFD_INFO_EXIT"})
"""Names that are torch's or the kernel's."""


def names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a file gives to something of its own."""
    for node in ast.walk(module):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", part)}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_name_says_nothing(path: Path) -> None:
    """A noun that could mean anything is a noun not found yet."""
    assert not words(path.stem) & BANNED
    assert not [(line, name) for line, name in names(tree(path)) if words(name) & BANNED and name not in KEPT]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_module_says_its_duty(path: Path) -> None:
    """Each file begins with a docstring."""
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_assert_validates(path: Path) -> None:
    """`python -O` changes nothing."""
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_an_underscore_attribute_never_crosses_a_file(path: Path) -> None:
    """What another file needs has no underscore."""
    crossing = [
        (node.lineno, alias.name)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not crossing


@pytest.mark.parametrize("path", FILES, ids=place)
def test_the_platform_is_asked_in_one_file(path: Path) -> None:
    """A platform's difference is one function with a contract, in `_process/platform`; the cellar can't import it."""
    if place(path) in ("_process/platform", "_start") or place(path).startswith("_child/"):
        return  # `_start` refuses Windows, before anything that could not even be imported there
    asked = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.platform"
    ]
    assert not asked


def test_sizes() -> None:
    """Half the functions are under about 8 lines, nine in ten under 30; a long file is probably two nouns."""
    lengths = sorted(
        length(node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[len(lengths) * 9 // 10] <= 30
    assert not {place(path): n for path in FILES if (n := path.read_text(encoding="utf-8").count("\n")) > 400}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if told else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring
