"""``python -m trinfer``."""

from __future__ import annotations

import sys

from trinfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
