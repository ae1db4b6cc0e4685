"""Files by name: globs, folders, compression, remote paths, standard input and output. Blocking calls."""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import io
import os
import select
import stat
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from trinfer.data.extras import load
from trinfer.data.zstd import open_zstd
from trinfer.errors import FileError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "STANDARD",
    "compression_of",
    "expand",
    "format_of",
    "is_data_set",
    "is_remote",
    "local_path",
    "open_input",
    "size_of",
]

STANDARD = "-"
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}
DATASET = "hf:"
WEB = ("http://", "https://")


def is_remote(path: str) -> bool:
    """s3://, gs://, hf://, https://, memory://, …: what fsspec opens."""
    return "://" in path


def is_data_set(path: str) -> bool:
    """hf:NAME, of the library datasets; hf:// names a file."""
    return path.startswith(DATASET) and not is_remote(path)


def local_path(path: str) -> str:
    """file:// names a local file, which is read and written as one."""
    return path.removeprefix("file://")


def _name(path: str) -> str:
    """Without what stands after the name of a file in an URL: …/a.jsonl.gz?download=true."""
    return urlsplit(path).path if path.startswith(WEB) else path


def compression_of(path: str) -> str | None:
    """ "gz", "zst" or None, by the name."""
    return COMPRESSIONS.get(os.path.splitext(_name(path))[1].lower())


def format_of(path: str) -> str | None:
    """The format that a name tells; None where it tells none."""
    if is_data_set(path):
        return "hf"
    name = _name(path)
    stem = os.path.splitext(name)[0] if compression_of(path) else name
    return FORMATS.get(os.path.splitext(stem)[1].lower())


def expand(paths: Sequence[str]) -> list[str]:
    """Files for names, globs and folders, each once, in order.

    Raises:
        FileError: one of them matches nothing, or a folder cannot be read.
    """
    found: dict[str, str] = {}
    for each in paths:
        path = local_path(each)
        if path == STANDARD or is_data_set(path):
            matches = [path]
        else:
            matches = _expand_remote(path) if is_remote(path) else _expand_local(path)
        if not matches:
            raise FileError(f"the input {path} matches no file", advice="check the name; ** goes into folders")
        for match in matches:
            # One file has many names: a.jsonl, ./a.jsonl, folder/../a.jsonl. Links are left alone: in caches, names
            # of different data lead to one file where their content is the same.
            plain = match == STANDARD or is_remote(match) or is_data_set(match)
            found.setdefault(match if plain else os.path.abspath(match), match)
    return list(found.values())


def _expand_local(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(_walk(path))
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]  # one that is missing is told when it is opened
    return [each for each in sorted(glob.glob(path, recursive=True)) if os.path.isfile(each)]


def _walk(folder: str) -> Iterator[str]:
    """Files of a format that trinfer reads. Hidden ones are left out, as by a glob."""

    def fail(error: OSError) -> None:
        raise _unreadable(str(error.filename), error) from error

    visited = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        kept = []
        for name in folders:
            real = os.path.realpath(os.path.join(root, name))
            # Links may go in circles, and what a run keeps is nobody's input.
            if not name.startswith(".") and real not in visited and not _is_run_directory(real):
                visited.add(real)
                kept.append(name)
        folders[:] = kept
        for name in names:
            path = os.path.join(root, name)
            if not name.startswith(".") and format_of(name) is not None and os.path.isfile(path):
                yield path


def _is_run_directory(folder: str) -> bool:
    return folder.endswith(".run") and os.path.isfile(os.path.join(folder, "manifest.json"))


def _expand_remote(path: str) -> list[str]:
    # A question mark in the name of a web page begins its options.
    if not glob.has_magic(path.replace("?", "") if path.startswith(WEB) else path):
        return [path]
    fsspec = load("fsspec", f"reading {path}")
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        found = filesystem.glob(inner, detail=True)
        return [filesystem.unstrip_protocol(name) for name in sorted(found) if found[name]["type"] == "file"]
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(path, error) from error


def size_of(path: str) -> int | None:
    """Bytes of a plain local file; None for all others."""
    if is_remote(path) or is_data_set(path) or compression_of(path):
        return None
    with contextlib.suppress(OSError):
        status = os.fstat(0) if path == STANDARD else os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


class _StandardInput(io.RawIOBase):
    """Standard input. Whoever shares it may have made it non-blocking, and what is late would be taken for its end."""

    def __init__(self) -> None:
        self._fd = os.dup(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return stat.S_ISREG(os.fstat(self._fd).st_mode)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return os.lseek(self._fd, offset, whence)

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  # whatever takes bytes
        while True:
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:
                select.select([self._fd], [], [])

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


@contextlib.contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed.

    Raises:
        FileError: it cannot be opened, or what is read from it is broken.
    """
    try:
        with contextlib.ExitStack() as stack:
            if path == STANDARD:
                file: IO[bytes] = stack.enter_context(io.BufferedReader(_StandardInput(), 1 << 16))
            elif is_remote(path):
                file = stack.enter_context(load("fsspec", f"reading {path}").open(path, "rb"))
            else:
                file = stack.enter_context(open(path, "rb"))
            compression = compression_of(path)
            if compression == "gz":
                file = cast("IO[bytes]", stack.enter_context(gzip.open(file)))
            elif compression == "zst":
                file = stack.enter_context(open_zstd(file, load("zstandard", f"reading {path}")))
            yield file
    except (TrinferError, MemoryError):
        raise
    except Exception as error:
        # zlib, zstandard, pyarrow and the file systems of fsspec have errors of their own, with no common base.
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> FileError:
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    name = "standard input" if path == STANDARD else path
    cause = None
    if isinstance(error, ImportError):
        advice = "install the library that it names"
    elif is_remote(path):
        advice = "check the name, the network and your rights there"
    elif os.path.isdir(path) and not isinstance(error, PermissionError):
        advice = "a folder holds no files that trinfer reads"
    elif isinstance(error, OSError) and error.errno == errno.EIO:
        advice = "check the disk (dmesg, smartctl)"
    elif isinstance(error, OSError) and error.errno is not None:
        advice = "check the name, and the permissions"
    else:  # of a decoder
        cause = "the file is damaged, was not copied to its end, or is not what its name says"
        advice = "make or fetch it again"
    return FileError(f"the input {name} cannot be read: {what}", cause=cause, advice=advice)
