"""Health: whether a rank is ready, whether it is stuck and where, and what it uses.

The door; the rest of the house imports from here only. What is observed is given as callables by the floors above.

    notify      one rank's NOTIFY_SOCKET: what it says
    readiness   Readiness: what a condition is made of, found out; `probes` asks ports and servers
    alarms      deadlines that don't ring for what the loop slept through
    monitor     Monitor: all of this for one worker, and the verdict
    stacks      Stacks: of what runs Python, by a signal or by py-spy
    ward        Ward: what the monitors of a run share, and what its caller may ask
    usage       Meter: CPU, memory, threads and descriptors of trees; `figures` reads them
"""

from .monitor import Monitor, Verdict
from .ward import Ward

__all__ = ["Monitor", "Verdict", "Ward"]
