"""Output: where streams go, and everything that carries bytes there.

The door; the rest of the house imports from here only.

A byte's walk: `pump` reads it from the worker's pipe, puts it to its file sink (`files`) first, then through `lines`
to the console (`console`), the filter files and the subscribers (`subscribers`). `plan` decides which of these a
stream has, `specs` names the files, `outputs` owns all streams of one attempt.
"""

from .console import Console
from .files import Journal
from .outputs import Outputs
from .plan import DEFAULT_BUFFER_BYTES, LogsDest, LogsSpecs, Plans, Route, StreamPlan, plan
from .specs import DefaultLogsSpecs, InheritLogsSpecs
from .subscribers import LineHub, Lines

__all__ = [
    "DEFAULT_BUFFER_BYTES",
    "Console",
    "DefaultLogsSpecs",
    "InheritLogsSpecs",
    "Journal",
    "LineHub",
    "Lines",
    "LogsDest",
    "LogsSpecs",
    "Outputs",
    "Plans",
    "Route",
    "StreamPlan",
    "plan",
]
