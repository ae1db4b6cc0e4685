"""Starts SGLang's server with the API key taken from the environment. Runs in SGLang's own environment.

Stands alone: it is executed by path, where trinfer need not be installed.
"""

from __future__ import annotations

import os
import sys

KEY_VARIABLE = "TRINFER_ENGINE_API_KEY"


def main() -> None:
    """What ``python -m sglang.launch_server`` does, with one more argument that no process list shows."""
    key = os.environ.pop(KEY_VARIABLE, None)
    if key:
        sys.argv += ["--api-key", key]
    # run_module executes the very program that SGLang documents, whatever its insides are called in this version.
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
