"""Functions as entrypoints: how a call reaches its worker, and what it returned comes back.

Door of the folder: `Function`, one per attempt. `payload` pickles, `channel` moves bytes, `spawned` and the others
start the workers; what runs inside them is `aelastic._child.function`.
"""

from __future__ import annotations

from aelastic._returned import NO_RESULT, NoResult, Raised, RemoteTraceback, Returned, Torn, Unloadable, Value

from .function import Function
from .server import ForkServer

__all__ = [
    "NO_RESULT",
    "ForkServer",
    "Function",
    "NoResult",
    "Raised",
    "RemoteTraceback",
    "Returned",
    "Torn",
    "Unloadable",
    "Value",
]
