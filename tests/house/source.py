"""The package as text: files, trees and imports, for the tests of the house."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aelastic"
FILES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import of one file."""

    line: int
    target: str
    """The file inside the package it means, as `_logs/plan`, or another package's name."""
    ours: bool
    typing_only: bool


def place(path: Path) -> str:
    """A file's name inside the package without its ending: `_run`, `_logs/plan`, `_logs/__init__`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too."""
    module = tree(path)
    hidden = {
        id(node)
        for guard in ast.walk(module)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for node in ast.walk(guard)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _import(node.lineno, alias.name.split("."), typing_only=id(node) in hidden)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                where = _absolute(path, node)
                yield _import(node.lineno, [*where, alias.name], typing_only=id(node) in hidden)


def _absolute(path: Path, node: ast.ImportFrom) -> list[str]:
    named = (node.module or "").split(".") if node.module else []
    if node.level == 0:
        return named
    folder = ["aelastic", *path.relative_to(PACKAGE).parts[:-1]]
    return folder[: len(folder) - node.level + 1] + named


def _import(line: int, dotted: list[str], *, typing_only: bool) -> Import:
    if dotted[0] != "aelastic":
        return Import(line, dotted[0], ours=False, typing_only=typing_only)
    where = PACKAGE
    for part in dotted[1:]:
        if (where / f"{part}.py").is_file():
            return Import(line, place(where / f"{part}.py"), ours=True, typing_only=typing_only)
        if not (where / part).is_dir():
            break
        where /= part
    return Import(line, place(where / "__init__.py"), ours=True, typing_only=typing_only)
