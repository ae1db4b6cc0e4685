"""Exit codes of every command; documented in the help texts, and part of the contract with job scripts."""

from __future__ import annotations

__all__ = ["ENGINE", "FILES", "INTERRUPTED", "OK", "REQUEUE", "ROWS_FAILED", "TABLE", "USAGE"]

OK = 0
ROWS_FAILED = 1
USAGE = 2
ENGINE = 3
FILES = 4
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h, which job scripts know
INTERRUPTED = 130

TABLE = """\
exit codes:
  0    every row was answered
  1    the run is complete, but some rows failed; their errors stand in the output
  2    a wrong option or config
  3    the engine did not start, or died
  4    an input or output file could not be used
  75   stopped by SIGTERM, SIGUSR1 or --time-limit; what was under way has been finished: run it again
  130  interrupted (SIGINT)
the first signal lets requests under way be answered, for --drain-timeout seconds; the second ends the run at once, with
128 plus its number.
"""
