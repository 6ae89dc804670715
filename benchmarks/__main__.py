"""`python -m benchmarks [names]`: measures, and prints environment, medians, p99, ratios and what was to be shown."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import pkgutil
import platform
import sys
import time

from ._measure import HEADER, ROOT, Question, Sizes, has_torch, torch_name

NAMES = sorted(found.name for found in pkgutil.iter_modules([str(ROOT / "benchmarks")]) if found.name[0] != "_")


def main() -> int:
    """Run the benchmarks that were asked for.

    Returns:
        1 when something was not shown that was to be shown, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all when none is given")
    for field in dataclasses.fields(Sizes):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"default {field.default}")
    options = vars(parser.parse_args())
    names = options.pop("names") or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    print(environment(Sizes(**options)))
    print(HEADER)
    missed = [question.title for name in names for question in measured(name, Sizes(**options)) if is_missed(question)]
    print(f"\nnot shown: {'; '.join(missed)}" if missed else "\nall shown")
    return 1 if missed else 0


def measured(name: str, sizes: Sizes) -> list[Question]:
    """Measure one benchmark, and print each part as it is there."""
    began = time.monotonic()
    questions: list[Question] = []
    for question in importlib.import_module(f"benchmarks.{name}").questions(sizes):
        print("\n".join(["", *question.lines()]), flush=True)
        questions.append(question)
    print(f"  ({name}: {time.monotonic() - began:.0f} s)", flush=True)
    return questions


def is_missed(question: Question) -> bool:
    """Whether a part did not show what it was to show."""
    return not all(verdict.met for verdict in question.verdicts)


def environment(sizes: Sizes) -> str:
    """What the numbers depend on."""
    torch = torch_name() if has_torch() else "no torch"
    load = " ".join(f"{each:.2f}" for each in os.getloadavg())
    return (
        f"Python {platform.python_version()} ({sys.platform}), {torch}, kernel {platform.release()},"
        f" {os.cpu_count()} processors, load {load}\n{sizes}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
