"""Output: where streams go, and everything that carries bytes there.

The door; the rest of the house imports from here only.

A byte's walk: `pump` reads it from the worker's pipe (`pipes`, in its turn: `turns`) and puts it to its file sink first
(`files`; to the disk by `desk` or `lanes`; there: `logfile`, `pieces`); then through `lines` to the console (`voice`,
`console`, `terminal`), the filter files, and the `hub`, from whose `tail` the `subscribers` read. `plan` decides which
of these a stream has, `prefix` makes what stands before a line, `specs` names the files, `outputs` owns all streams of
one attempt; `journal` writes a run's events.
"""

from .console import Console
from .hub import LineHub
from .journal import Journal
from .outputs import Outputs
from .plan import DEFAULT_BUFFER_BYTES, LogsDest, LogsSpecs, Plans, Route, StreamPlan, check_dest, plan, shown
from .prefix import LineOrigin
from .specs import DefaultLogsSpecs, InheritLogsSpecs
from .subscribers import Lines

__all__ = [
    "DEFAULT_BUFFER_BYTES",
    "Console",
    "DefaultLogsSpecs",
    "InheritLogsSpecs",
    "Journal",
    "LineHub",
    "LineOrigin",
    "Lines",
    "LogsDest",
    "LogsSpecs",
    "Outputs",
    "Plans",
    "Route",
    "StreamPlan",
    "check_dest",
    "plan",
    "shown",
]
