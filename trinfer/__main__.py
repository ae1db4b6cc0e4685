"""``trinfer`` and ``python -m trinfer``: the entry, which is there before everything else is imported."""

from __future__ import annotations

import sys

__all__ = ["run"]


def run() -> int:
    """Run the command line; returns the exit code, also for a Ctrl-C during the imports."""
    try:
        from trinfer.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
