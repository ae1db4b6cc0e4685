"""Files for the tests: written by trinfer's writer, read by trinfer's reader."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinfer.batch.items import encode
from trinfer.data.readers import Inputs
from trinfer.data.records import InvalidRow, Raw, content_key
from trinfer.data.writers import OutputFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parent.parent.parent
SUFFIXES = ("jsonl", "jsonl.gz", "jsonl.zst")
NOBODY = 65534


def write(path: object, rows: Iterable[Any], **options: Any) -> str:
    """Write rows, one call each, and finish."""
    file = OutputFile(str(path), **options)
    try:
        for row in rows:
            file.write(encode(row))
        file.finish()
    finally:
        file.close()
    return str(path)


def read(paths: object, **options: Any) -> list[Raw]:
    return list(Inputs([str(each) for each in paths] if isinstance(paths, list) else str(paths), **options))


def rows(paths: object, **options: Any) -> list[dict[str, Any]]:
    return [raw.fields() for raw in read(paths, **options)]


def outcomes(paths: object, **options: Any) -> list[Any]:
    """The fields of good records, and what is wrong with the others."""
    found: list[Any] = []
    for raw in read(paths, **options):
        try:
            found.append(raw.fields())
        except InvalidRow as error:
            found.append(error.message)
    return found


def keys(paths: object, **options: Any) -> list[bytes]:
    return [content_key(raw.data) for raw in read(paths, **options)]


def program(code: str, *arguments: object, **environment: str) -> str:
    """What a Python program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def standard(number: int, fd: int) -> Iterator[None]:
    """Another standard input (0) or output (1) for a while; the descriptor is closed then."""
    before = os.dup(number)
    try:
        os.dup2(fd, number)
        os.close(fd)
        yield
    finally:
        os.dup2(before, number)
        os.close(before)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read and write everything."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
