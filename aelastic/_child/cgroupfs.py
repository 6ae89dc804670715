"""A cgroup of version 2: whether anybody is in it, how it is ended, how it is removed. The standard library only.

A cgroup is named by its folder in the mounted file system. Nothing raises: a cgroup that is gone is empty.
Who writes may wait some milliseconds for the kernel, which changes its hierarchy one at a time: not on a loop.

Source: cgroups(7), and the kernel's cgroup-v2 document: `cgroup.procs`, `cgroup.events`, `cgroup.kill` (Linux 5.14).
"""

from __future__ import annotations

import os

from . import procfs


def is_populated(folder: str) -> bool:
    """Whether a live process is in it, or in one below it; a zombie is in none."""
    return b"populated 1" in procfs.read(f"{folder}/cgroup.events")


def kill(folder: str) -> bool:
    """Send SIGKILL to everything in it and below, which nothing can flee by forking; False where that is not known."""
    try:
        _write(f"{folder}/cgroup.kill", b"1")
    except OSError:
        return False
    return True


def remove(folder: str) -> bool:
    """Remove it and all that a worker made below it; False when somebody is still there."""
    gone = True
    for each, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(each)
        except FileNotFoundError:
            continue
        except OSError:
            gone = False
    return gone


def counter(folder: str, file: str, name: str) -> int | None:
    """One number of a file of `name number` lines; None where the kernel doesn't tell it."""
    for line in procfs.read(f"{folder}/{file}").decode().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None


def _write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
