"""`python -m aelastic`: the same as the command `aelastic`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
