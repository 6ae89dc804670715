"""Processes: starting one, knowing its exit, signalling and finding what came from it.

The door; the rest of the house imports from here only. `launch` starts, `Process` is one started process, `Tree`
everything that came from the processes of a run.

    launch       Command, resolve, launch: plain exec, or through the trampoline
    trampoline   which launches need `_child/trampoline.py`, and whether it arrived
    collection   asyncio's side of a child: its pid at birth, and when asyncio has collected it
    watcher      by whom asyncio's own loops have it collected
    handle       Process: pid, pidfd, exit, signals to its group
    pace         how many starts, exits and signals one turn of a loop takes in
    cgroups      the cgroups of a run, where there are any: chosen, made, read, removed
    census       whose each process of /proc is: evidence and its limits; runs in threads
    signals      to processes that were found in /proc, each checked before
    tree         Tree: one census for all who ask, the steps of a stop, survivors
    reserve      descriptors kept for finding and ending processes
    platform     the only file that knows which system this is
"""

from .cgroups import Cgroups, choose_cgroups
from .collection import OnBorn
from .handle import Process
from .launch import Command, launch, resolve
from .platform import collect
from .signals import signal_alone
from .trampoline import Confirmation, needed_for
from .tree import Tree

__all__ = [
    "Cgroups",
    "Command",
    "Confirmation",
    "OnBorn",
    "Process",
    "Tree",
    "choose_cgroups",
    "collect",
    "launch",
    "needed_for",
    "resolve",
    "signal_alone",
]
