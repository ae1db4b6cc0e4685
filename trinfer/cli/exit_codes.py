"""Exit codes of every command; documented in the help texts, and part of the contract with job scripts."""

from __future__ import annotations

__all__ = ["ENGINE", "FILES", "INTERRUPTED", "OK", "ROWS_FAILED", "TABLE", "TERMINATED", "USAGE"]

OK = 0
ROWS_FAILED = 1
USAGE = 2
ENGINE = 3
FILES = 4
INTERRUPTED = 130
TERMINATED = 143

TABLE = """\
exit codes:
  0    every row was answered
  1    the run is complete, but some rows failed; their errors stand in the output
  2    a wrong option or config
  3    the engine did not start, or died
  4    an input or output file could not be used
  130  interrupted (SIGINT); 143: terminated (SIGTERM)
"""
