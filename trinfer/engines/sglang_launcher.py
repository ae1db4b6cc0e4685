"""Starts SGLang's server with the API key taken from the environment. Runs in SGLang's own environment.

Stands alone: it is executed by path, where trinfer need not be installed and Python may be older.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from typing import Any

KEY_VARIABLE = "TRINFER_ENGINE_API_KEY"


def main() -> None:
    """What ``python -m sglang.launch_server`` does, with one more argument that no process list shows."""
    # Python puts the script's folder first. There lie trinfer's own modules sglang, vllm and transformers.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    key = os.environ.pop(KEY_VARIABLE, None)
    if key:
        sys.argv += ["--api-key", key]
        hide_in_logs(key)
    # run_module executes the very program that SGLang documents, whatever its insides are called in this version; and
    # child processes, which import the main module again, find it by its name.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def hide_in_logs(secret: str) -> None:
    """SGLang logs all its arguments when it starts; the key shall not be among them."""
    make = logging.getLogRecordFactory()

    def make_without(*args: Any, **kwargs: Any) -> logging.LogRecord:  # noqa: ANN401  # as logging.LogRecord
        record = make(*args, **kwargs)
        if secret in str(record.msg) or secret in str(record.args):
            try:
                text = record.getMessage()
            except (TypeError, ValueError):  # a broken call of the engine's own: the logging module reports it
                return record
            record.msg, record.args = text.replace(secret, "***"), ()
        return record

    logging.setLogRecordFactory(make_without)


if __name__ == "__main__":
    main()
