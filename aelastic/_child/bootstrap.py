"""The program of a function worker and of a fork server, never imported.

`bootstrap.py work PAYLOAD_FD RESULT_FD` or `bootstrap.py serve CONTROL_FD SETTINGS`. It is compiled at every start,
so it only finds its package and hands over.
"""

import sys


def _hand_over() -> None:
    import os

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's folder: its modules must not be taken for the user's
    sys.path.insert(0, root)
    what, fd, more = sys.argv[1:]
    if what == "work":
        from aelastic._child.function import main

        sys.path.remove(root)
        sys.exit(main(int(fd), int(more)))
    from aelastic._child.forkserver import serve

    sys.path.remove(root)
    sys.exit(serve(int(fd), more))


if __name__ == "__main__":
    _hand_over()
