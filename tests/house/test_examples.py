"""Every example in a docstring runs and says what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.house.source import FILES, place

MODULES = [
    ("aelastic." + place(path).replace("/", ".")).removesuffix(".__init__")
    for path in FILES
    if place(path) not in ("__init__", "__main__") and ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    """A reader may copy them."""
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
