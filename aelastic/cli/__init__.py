"""The command `aelastic`: reads what was asked on the command line and calls the library for it.

Nothing here does what the library's own door can't do. Only the standard library is needed beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import logs, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes `sys.argv`.

    Returns:
        The exit code; a wrong command line exits with 2 by itself.
    """
    words, command = split_command(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    if hasattr(options, "command"):
        options.command = [*options.command, *command]
    elif command:
        parser().error("only 'run' takes a command after --")
    code: int = options.call(options)
    return code


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words at the first `--`: what comes after it is never ours to read.

    Example:
        >>> split_command(["run", "-n", "2", "--", "ls", "--", "-l"])
        (['run', '-n', '2'], ['ls', '--', '-l'])
    """
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(prog="aelastic", description="Start n ranks, keep each byte, leave nothing behind.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    run.add_to(commands)
    logs.add_to(commands)
    return whole
