"""Exit codes of every command; documented in the help texts, and part of the contract with job scripts."""

from __future__ import annotations

__all__ = ["BUG", "ENGINE", "FILES", "INTERRUPTED", "OK", "REQUEUE", "ROWS_FAILED", "STOPPED", "TABLE", "USAGE"]

OK = 0
ROWS_FAILED = 1
USAGE = 2
ENGINE = 3
FILES = 4
STOPPED = 5
BUG = 70  # EX_SOFTWARE of sysexits.h
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h, which job scripts know
INTERRUPTED = 130

TABLE = """\
exit codes:
  0    every row was answered
  1    the run is complete, but some rows failed; `trinfer retry` runs them again
  2    a wrong option or config
  3    the engine did not start, or died
  4    an input, an output or the run directory could not be used
  5    the run was stopped because rows fail (--on-error fail, --max-failures)
  70   an error in trinfer itself
  75   stopped by SIGTERM, SIGHUP, SIGUSR1 or --time-limit; what was under way has been finished: run it again
  130  interrupted (SIGINT)
the first signal lets requests under way be answered, for --drain-timeout seconds; the second ends the run at once, with
128 plus its number.
"""
