"""``trinfer logs``: the output of a running engine."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import IO, TYPE_CHECKING

from trinfer.cli import exit_codes

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

__all__ = ["add_parser", "execute"]

LOOKS = 0.2  # seconds between two looks at a log that is followed
BLOCK = 64 * 1024
ROTATED = 3  # files that are kept behind the newest, see `trinfer.process.output.EngineLog`


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer logs``."""
    parser = commands.add_parser(
        "logs",
        help="show the output of an engine",
        description="Shows the last lines of the output of an engine that runs on this host with a server_log_folder.",
        allow_abbrev=False,
    )
    parser.add_argument("server", metavar="SERVER", help="its id or the beginning of it, or ENGINE:RANK; see ps")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the engine has ended")
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="lines to show (default: %(default)s)")
    parser.set_defaults(execute=execute)


def find_log(server: str) -> Path:
    """The log of the one server that is meant.

    Raises:
        ConfigError: none or several are, or it keeps no log.
    """
    from pathlib import Path

    from trinfer.errors import ConfigError
    from trinfer.process.identity import is_alive
    from trinfer.process.ledger import entries

    known = [entry for _, entry in entries()]
    matching = [e for e in known if e.server.startswith(server) or f"{e.engine}:{e.rank}" == server]
    if len(matching) > 1:  # what a dead owner has left is not meant where there is a living one
        matching = [e for e in matching if is_alive(e.run) is not False] or matching
    if len(matching) != 1:
        shown = ", ".join(f"{e.server} ({e.engine}:{e.rank})" for e in matching or known) or "none"
        what = "names several servers" if matching else "is no server that runs here"
        raise ConfigError(f"{server!r} {what}: {shown}", advice="see `trinfer ps`")
    if not matching[0].log:
        raise ConfigError(
            f"server {matching[0].server} keeps no log", advice="set server_log_folder (--server-log-folder) next time"
        )
    return Path(matching[0].log)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from trinfer.errors import FileError

    path = find_log(arguments.server)
    try:
        _show(path, arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: that is no error
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except OSError as error:
        raise FileError(f"the log {path} cannot be read: {error.strerror}") from error
    return exit_codes.OK


def _show(path: Path, arguments: argparse.Namespace) -> None:
    out = sys.stdout.buffer
    file: IO[bytes] = path.open("rb")
    is_over = False
    try:
        out.write(_tail(file, max(0, arguments.lines)))
        out.flush()
        while arguments.follow:
            while data := file.read(BLOCK):
                out.write(data)
            out.flush()
            if is_over:
                return
            newer = _next_file(file, path)
            if newer is not None:
                # Read to its end only now that nobody writes to it any more.
                shutil.copyfileobj(file, out)
                file.close()
                file = newer
            elif not _is_running(path):
                is_over = True  # once more, for what has come since the last look
            else:
                time.sleep(LOOKS)
    finally:
        file.close()


def _tail(file: IO[bytes], lines: int) -> bytes:
    """The last lines; the file stands at its end afterwards."""
    position = file.seek(0, os.SEEK_END)
    data = b""
    while position and data.count(b"\n") <= lines:
        step = min(BLOCK, position)
        position -= step
        file.seek(position)
        data = file.read(step) + data
    file.seek(0, os.SEEK_END)
    return b"".join(data.splitlines(keepends=True)[-lines:]) if lines else b""


def _next_file(file: IO[bytes], path: Path) -> IO[bytes] | None:
    """The file that was begun after this one; None while this one is the newest.

    It may have been rotated several times since the last look: then the next one is not the newest.
    """
    ours = os.fstat(file.fileno()).st_ino
    newer: IO[bytes] | None = None
    for number in range(ROTATED + 1):
        try:
            found = path.with_name(f"{path.name}.{number}" if number else path.name).open("rb")
        except FileNotFoundError:  # in the midst of a rotation
            if number:
                break
            continue
        if os.fstat(found.fileno()).st_ino == ours:
            found.close()
            return newer
        if newer is not None:
            newer.close()
        newer = found
    # It has been dropped: the oldest that is left goes on.
    return newer


def _is_running(path: Path) -> bool:
    from trinfer.process.identity import is_alive
    from trinfer.process.ledger import entries

    return any(entry.log == str(path) and is_alive(entry.run) is not False for _, entry in entries())
