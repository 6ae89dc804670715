"""The process of one contender: calls one function of a benchmark's file and hands back what it returns."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import sys


def main(fd: int, target: str, arguments: str) -> None:
    os.set_inheritable(fd, False)  # noqa: FBT003  # os has no other way to say it
    logging.disable(logging.WARNING)  # torch names each process that it stops
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    returned = function(**json.loads(arguments))
    if inspect.iscoroutine(returned):
        returned = asyncio.run(returned)
    with open(fd, "w") as answer:
        json.dump(returned, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
