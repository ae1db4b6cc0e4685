"""Files that have their name only when they are whole, and say why where they cannot be."""

from __future__ import annotations

import errno
import gc
import gzip
import os
import random
import stat
import subprocess
import sys
import threading
from typing import ClassVar

import fsspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import ROOT, SUFFIXES, as_nobody, read, rows, standard, write
from tests.durable.test_faults import FaultyDisk
from trinfer import ConfigError, FileError
from trinfer.batch.items import encode
from trinfer.data.writers import OutputFile, check_format, check_output, is_stream, output_format

ALL = (*SUFFIXES, "parquet")
NOISE = [{"n": n, "text": random.Random(n).randbytes(600).hex()} for n in range(300)]


def partial(path) -> str:
    return f"{path}.partial"


def write_much(path, **options) -> None:
    """Until it fails."""
    write(path, ({"n": n, "text": os.urandom(600).hex()} for n in range(10_000)), **options)


# -- the name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ALL)
def test_a_file_has_its_name_when_it_is_whole(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    file = OutputFile(str(path))
    file.write(encode({"n": 1}))
    file.flush()
    assert sorted(os.listdir(tmp_path)) == [path.name, f"{path.name}.partial"]
    assert path.read_bytes() == b"old"
    file.finish()
    assert os.listdir(tmp_path) == [path.name]
    file.close()
    file.close()
    assert rows(path) == [{"n": 1}]


@pytest.mark.parametrize("suffix", ALL)
def test_what_is_not_finished_is_removed_or_kept_beside(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    for keep in (False, True):
        file = OutputFile(str(path))
        for row in NOISE:
            file.write(encode(row))
        file.close(keep=keep)
        file.close(keep=keep)
        if keep and suffix != "parquet":
            assert os.listdir(tmp_path) == [f"{path.name}.partial"] == [file.partial.name]
            os.rename(partial(path), path)
            assert rows(path) == NOISE  # readable to its end
        else:
            assert os.listdir(tmp_path) == []
            assert file.partial is None


def test_an_earlier_partial_file_is_kept_until_there_is_something_to_write(tmp_path):
    path = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.partial").write_text("an hour's work")
    OutputFile(str(path)).close()
    assert (tmp_path / "a.jsonl.partial").read_text() == "an hour's work"
    write(path, [{"n": 1}])
    assert rows(path) == [{"n": 1}]
    assert os.listdir(tmp_path) == ["a.jsonl"]


WRITER = r"""
import os, sys
from trinfer.data.writers import OutputFile

file = OutputFile(sys.argv[1])
while True:
    for _ in range(1000):
        file.write(b'{"text": "%s"}\n' % os.urandom(500).hex().encode())
    file.flush()
    print("more", flush=True)
"""


@pytest.mark.parametrize("suffix", ALL)
def test_a_killed_writer_leaves_a_partial_file_only(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"more\n"
        writer.kill()
    assert os.listdir(tmp_path) == [f"{path.name}.partial"]
    assert rows(write(path, NOISE)) == NOISE
    assert os.listdir(tmp_path) == [path.name]


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "a.jsonl", tmp_path / "disk" / "b.jsonl"
    link.symlink_to(target)
    for number in (1, 2):
        write(link, [{"n": number}])
        assert link.is_symlink()
        assert rows(target) == [{"n": number}]
    assert os.listdir(tmp_path / "disk") == ["b.jsonl"]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk"]


def test_permissions(tmp_path):
    path = tmp_path / "a.jsonl"
    mask = os.umask(0o027)
    try:
        write(path, [])
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664):  # what was private stays so, and what was shared
            path.chmod(mode)
            write(path, [{"n": 1}])
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(mask)


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    first = OutputFile(str(path))
    first.write(encode({"n": 1}))
    with pytest.raises(FileError, match="is being written by another process") as caught:
        OutputFile(str(path))
    assert "another name" in caught.value.advice
    first.finish()
    first.close()
    assert rows(path) == [{"n": 1}]
    assert rows(write(path, [{"n": 2}])) == [{"n": 2}]


# -- disks that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ALL)
def test_a_full_disk_is_told(small_disk, suffix):
    path = small_disk / f"a.{suffix}"
    write(path, [{"n": "old"}])
    with pytest.raises(FileError, match=rf"the output .*/a\.{suffix} failed: No space left on device") as caught:
        write_much(path)
    assert "make room" in caught.value.advice
    # Also rows of Parquet wait on this disk: that for temporary files is often the memory.
    assert caught.value.message.startswith("writing")
    assert os.listdir(small_disk) == [path.name]
    assert rows(path) == [{"n": "old"}]


def test_a_full_disk_keeps_the_part_that_was_written(small_disk):
    file = OutputFile(str(small_disk / "a.jsonl"))

    def fill() -> None:
        for row in NOISE:
            file.write(encode(row))
            file.flush()

    with pytest.raises(FileError, match="No space left"):
        fill()
    file.close(keep=True)
    assert os.listdir(small_disk) == ["a.jsonl.partial"]
    kept = (small_disk / "a.jsonl.partial").read_bytes().splitlines(keepends=True)
    assert len(kept) > 40
    assert kept[:-1] == [encode(row) for row in NOISE[: len(kept) - 1]]


def test_a_disk_that_is_read_only_is_told_before_anything_is_done(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    path = small_disk / "a.jsonl"
    with pytest.raises(FileError, match="disk is read-only") as caught:
        check_output(str(path), [])
    assert "make the folder writable" in caught.value.advice
    with pytest.raises(FileError, match=r"opening the output .*a\.jsonl failed: Read-only file system") as caught:
        OutputFile(str(path))
    assert "make the folder writable" in caught.value.advice


def test_a_folder_that_may_not_be_written_is_told(open_folder):
    path = open_folder / "a.jsonl"
    with as_nobody():
        if os.access(open_folder, os.W_OK, effective_ids=True):
            pytest.skip("the folder is the user's own: this needs root")
        with pytest.raises(FileError, match=r"opening the output .*a\.jsonl failed: Permission denied") as caught:
            OutputFile(str(path))
        assert "make the folder writable" in caught.value.advice


@given(
    suffix=st.sampled_from(ALL),
    fail_at=st.integers(0, 14),
    code=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EDQUOT]),
    part=st.integers(0, 40),
    keep=st.booleans(),
)
def test_a_failing_disk_leaves_the_old_file_or_the_new_one(tmp_path_factory, suffix, fail_at, code, part, keep):
    folder = tmp_path_factory.mktemp("w")
    path = write(folder / f"a.{suffix}", [{"n": "old", "text": ""}])
    failure = None
    file = None
    try:
        file = OutputFile(path, disk=FaultyDisk(fail_at, code, part))
        for row in NOISE[:40]:
            file.write(encode(row))
            if row["n"] % 8 == 0:
                file.flush()
        file.finish()
    except FileError as error:
        failure = error
    finally:
        if file is not None:
            file.close(keep=keep)
    found = rows(path)
    if failure is None:
        assert found == NOISE[:40]
    else:
        assert os.strerror(code) in failure.message
        assert failure.advice
        assert found in ([{"n": "old", "text": ""}], NOISE[:40])  # the folder's sync comes after the name
    left = set(os.listdir(folder)) - {f"a.{suffix}"}
    assert left <= ({f"a.{suffix}.partial"} if keep and failure else set())


# -- outputs that cannot be -----------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_are_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", [{"n": 1}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "none" / "a.jsonl")
    os.link(source, tmp_path / "x.jsonl.partial")
    for path, said in (
        (tmp_path / "folder", "is a folder"),
        ("", "is a folder"),
        (source, "would overwrite the input"),
        ("./in.jsonl", "would overwrite the input"),
        (f"file://{source}", "would overwrite the input"),
        (tmp_path / "link.jsonl", "would overwrite the input"),
        (tmp_path / "x.jsonl", "would overwrite the input"),
        ("memory://in.jsonl", "would overwrite the input"),
        (tmp_path / "none" / "a.jsonl", "its folder does not exist"),
        (tmp_path / "dangling.jsonl", "its folder does not exist"),
    ):
        with pytest.raises(FileError, match=said) as caught:
            check_output(str(path), [source, "memory://in.jsonl"])
        assert caught.value.advice
    for path in ("-", "/dev/null", "out.jsonl", "memory://out.jsonl", f"file://{tmp_path}/new.jsonl"):
        check_output(path, [source, "-"])


def test_formats_that_cannot_be_written():
    assert [output_format(path) for path in ("a.jsonl", "a.parquet", "a", "-", "memory://a.jsonl.gz")] == [
        *("jsonl", "parquet", "jsonl", "jsonl", "jsonl"),
    ]
    assert output_format("a.csv", "jsonl") == "jsonl"
    for path, format_ in (("a.csv", None), ("a.txt.gz", None), ("a.jsonl", "csv"), ("hf:owner/name", None)):
        for call in (output_format, check_format):
            with pytest.raises(ConfigError, match="allowed are jsonl, parquet"):
                call(path, format_)
    check_format("memory://a.jsonl.zst")
    check_format("a.parquet")


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(FileError, match=r"opening the output .*/none/a\.jsonl failed: No such file"):
        OutputFile(str(tmp_path / "none" / "a.jsonl"))
    with pytest.raises(FileError, match=r"opening the output .* failed: Not a directory"):
        OutputFile(f"{write(tmp_path / 'file', [])}/a.jsonl")


# -- streams --------------------------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Reads a pipe, by its name or its descriptor, to its end."""

    def __init__(self, pipe: int | os.PathLike[str]) -> None:
        super().__init__()
        self.pipe, self.data = pipe, b""
        self.start()

    def run(self) -> None:
        with open(self.pipe, "rb") as file:
            self.data = file.read()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("blocking", [True, False])
def test_standard_output_is_a_pipe(tmp_path, kind, blocking):
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    with standard(1, writing):
        reader = Reader(reading)
        write("-", NOISE, format=kind)
    reader.join()
    (tmp_path / f"a.{kind}").write_bytes(reader.data)
    assert rows(tmp_path / f"a.{kind}") == NOISE


def test_lines_to_a_stream_come_at_once():
    reading, writing = os.pipe()
    with standard(1, writing):
        file = OutputFile("-")
        file.write(b'{"n": 1}\n')
        assert os.read(reading, 100) == b'{"n": 1}\n'
        file.close()
    os.close(reading)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_named_pipe_gets_what_a_file_would(tmp_path, suffix):
    pipe = tmp_path / f"a.{suffix}"
    os.mkfifo(pipe)
    assert is_stream(str(pipe))
    reader = Reader(pipe)
    write(pipe, NOISE)
    reader.join()
    data = reader.data
    if suffix.endswith("gz"):
        data = gzip.decompress(data)
    elif suffix.endswith("zst"):
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    assert data == b"".join(map(encode, NOISE))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == [pipe.name]


def test_streams_that_fail_are_told(tmp_path):
    for kind in ("jsonl", "parquet"):
        with pytest.raises(FileError, match="the output /dev/full failed: No space left on device"):
            write("/dev/full", NOISE, format=kind)
    reading, writing = os.pipe()
    os.close(reading)
    with standard(1, writing), pytest.raises(FileError, match=r"failed: Broken pipe\n.*write to a file"):
        write_much("-")
    assert not is_stream(str(tmp_path / "none"))
    assert not is_stream(str(tmp_path))
    assert is_stream("/dev/null")
    write("/dev/null", NOISE)


# -- remote ---------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """As the libraries of clouds have them: related to nothing."""


class Store(fsspec.AbstractFileSystem):
    """An object store: a file appears when its upload is complete. It refuses to order."""

    protocol = "teststore"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}  # each test sets it anew
    refuse_at = None

    def _open(self, path, mode="rb", **options):
        if self.refuse_at == "open":
            raise Refused("no rights to open")
        return Upload(self, path, mode, **options)

    def rm_file(self, path):
        self.objects.pop(path, None)


class Upload(fsspec.spec.AbstractBufferedFile):
    DEFAULT_BLOCK_SIZE = 1000

    def _initiate_upload(self):
        self.parts = []
        if self.fs.refuse_at == "start":
            raise Refused("no rights to write")

    def _upload_chunk(self, final=False):
        if self.fs.refuse_at == "part" or (final and self.fs.refuse_at == "end"):
            raise Refused(f"no rights to upload the {self.fs.refuse_at}")
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.parts)
        return True


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("teststore", Store, clobber=True)
    monkeypatch.setattr(Store, "objects", {})
    return Store


@pytest.mark.parametrize("suffix", ALL)
def test_a_remote_file_appears_when_it_is_whole(store, suffix, tmp_path):
    file = OutputFile(f"teststore://a.{suffix}")
    for row in NOISE:
        file.write(encode(row))
    assert store.objects == {}
    file.finish()
    file.close()
    (tmp_path / f"a.{suffix}").write_bytes(store.objects[f"a.{suffix}"])
    assert rows(tmp_path / f"a.{suffix}") == NOISE


def test_a_remote_file_that_is_given_up_never_appears(store):
    old = {f"{amount}.{suffix}": b"old" for suffix in ALL for amount in (1, 300)}
    store.objects.update(old)
    for name in old:
        file = OutputFile(f"teststore://{name}")
        for row in NOISE[: int(name.partition(".")[0])]:
            file.write(encode(row))
        file.close(keep=True)
        file.close()
    del file
    gc.collect()  # fsspec's files complete themselves when they are freed
    assert store.objects == old


@pytest.mark.parametrize("refuse_at", ["open", "start", "part", "end"])
def test_a_remote_file_that_fails_is_told(store, monkeypatch, refuse_at):
    monkeypatch.setattr(store, "refuse_at", refuse_at)
    for suffix in ALL:
        with pytest.raises(FileError, match=rf"the output teststore://a\.{suffix} failed: no rights to") as caught:
            write(f"teststore://a.{suffix}", NOISE)
        assert "network" in caught.value.advice
    del caught
    monkeypatch.setattr(store, "refuse_at", None)
    gc.collect()
    assert store.objects == {}


def test_a_remote_file_that_is_seen_while_it_is_written_is_removed():
    filesystem = fsspec.filesystem("memory")
    file = OutputFile("memory://a.jsonl")
    file.write(encode(NOISE[0]))
    assert filesystem.exists("/a.jsonl")
    file.close(keep=True)
    assert not filesystem.exists("/a.jsonl")
    assert rows(write("memory://a.jsonl", NOISE)) == NOISE
    filesystem.rm("/a.jsonl")


def test_protocols_that_nobody_knows_are_told():
    with pytest.raises(FileError, match=r"opening the output nosuch://a\.jsonl failed: .*nosuch"):
        OutputFile("nosuch://a.jsonl")


def test_a_partial_file_is_no_input_of_a_folder(tmp_path):
    file = OutputFile(str(tmp_path / "b.jsonl"))
    file.write(encode({"n": 1}))
    write(tmp_path / "a.jsonl", [{"n": 0}])
    assert len(read(tmp_path)) == 1
    file.close()
