"""Files by name: globs, folders, compression, remote paths, standard input and output. Blocking calls."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from trinfer.data.extras import load
from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["STANDARD", "compression_of", "expand", "format_of", "is_remote", "open_input", "size_of"]

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


def is_remote(path: str) -> bool:
    """s3://, gs://, hf://, https://, memory://, …: what fsspec opens."""
    return "://" in path


def compression_of(path: str) -> str | None:
    """ "gz", "zst" or None, by the name."""
    return COMPRESSIONS.get(os.path.splitext(path)[1].lower())


def format_of(path: str) -> str | None:
    """The format that a name tells; None where it tells none."""
    if path.startswith(DATASET):
        return "hf"
    stem = os.path.splitext(path)[0] if compression_of(path) else path
    return FORMATS.get(os.path.splitext(stem)[1].lower())


def expand(paths: Sequence[str]) -> list[str]:
    """Files for names, globs and folders, each once, in order.

    Raises:
        FileError: one of them matches nothing.
    """
    found: dict[str, None] = {}
    for path in paths:
        if path == STANDARD or path.startswith(DATASET):
            found[path] = None
            continue
        matches = _expand_remote(path) if is_remote(path) else _expand_local(path)
        if not matches:
            raise FileError(f"the input {path} matches no file", advice="check the name; ** goes into folders")
        found.update(dict.fromkeys(matches))
    return list(found)


def _expand_local(path: str) -> list[str]:
    if os.path.isdir(path):
        return [each for each in sorted(glob.glob(os.path.join(path, "**"), recursive=True)) if _is_data(each)]
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]  # one that is missing is told when it is opened
    return [each for each in sorted(glob.glob(path, recursive=True)) if os.path.isfile(each)]


def _is_data(path: str) -> bool:
    return os.path.isfile(path) and format_of(path) is not None


def _expand_remote(path: str) -> list[str]:
    if not glob.has_magic(path):
        return [path]
    fsspec = load("fsspec", f"reading {path}")
    try:
        filesystem, _, _ = fsspec.get_fs_token_paths(path)
        return [filesystem.unstrip_protocol(each) for each in sorted(filesystem.glob(path))]
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(path, error) from error


def size_of(path: str) -> int | None:
    """Bytes of a plain local file; None for all others."""
    if path == STANDARD:
        status = os.fstat(0)
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    if is_remote(path) or path.startswith(DATASET) or compression_of(path):
        return None
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return None


@contextlib.contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed.

    Raises:
        FileError: it cannot be opened, or what is read from it is broken.
    """
    try:
        with contextlib.ExitStack() as stack:
            if path == STANDARD:
                file: IO[bytes] = stack.enter_context(os.fdopen(os.dup(0), "rb"))
            elif is_remote(path):
                file = stack.enter_context(load("fsspec", f"reading {path}").open(path, "rb"))
            else:
                file = stack.enter_context(open(path, "rb"))
            compression = compression_of(path)
            if compression == "gz":
                file = cast("IO[bytes]", stack.enter_context(gzip.open(file)))
            elif compression == "zst":
                reader = (
                    load("zstandard", f"reading {path}").ZstdDecompressor().stream_reader(file, read_across_frames=True)
                )
                file = stack.enter_context(io.BufferedReader(reader, 1 << 20))
            yield file
    except FileError:
        raise
    except (OSError, EOFError, ValueError, ImportError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        # zlib, zstandard and fsspec's file systems have errors of their own, with no common base.
        if type(error).__module__.partition(".")[0] in {"trinfer", "trio"}:
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> FileError:
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    name = "standard input" if path == STANDARD else path
    folder = isinstance(error, IsADirectoryError) or Path(path).is_dir()
    return FileError(
        f"the input {name} cannot be read: {what}",
        advice="a folder holds no files that trinfer reads" if folder else "check the name, and the permissions",
    )
