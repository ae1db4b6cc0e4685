"""Names of inputs: globs, folders, links, and what fsspec opens."""

from __future__ import annotations

import gzip
import importlib.util
import os
import signal
import subprocess
import sys

import fsspec
import pytest

from tests.data.files import program, rows, write
from trinfer import FileError
from trinfer.data.files import compression_of, expand, format_of, local_path
from trinfer.data.readers import Inputs


def names(paths, folder) -> list[str]:
    return [os.path.relpath(path, folder) for path in expand(paths)]


@pytest.mark.parametrize(
    ("path", "kind", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("A.JSONL.GZ", "jsonl", "gz"),
        ("a.ndjson.zst", "jsonl", "zst"),
        ("a.json.zstd", "jsonl", "zst"),
        ("a.csv.gz", "csv", "gz"),
        ("a.tsv", "tsv", None),
        ("a.txt", "text", None),
        ("a.parquet", "parquet", None),
        ("a.b", None, None),
        ("a.gz", None, "gz"),
        ("gz", None, None),
        ("-", None, None),
        ("hf:owner/name?split=test", "hf", None),
        ("hf://datasets/owner/name/a.jsonl.gz", "jsonl", "gz"),  # a file, and not a data set
        ("s3://bucket/a.parquet", "parquet", None),
        ("s3://bucket/what?.csv", "csv", None),
        ("https://host/a.jsonl.gz?download=true", "jsonl", "gz"),
        ("https://host/a.csv#top", "csv", None),
        ("https://host/file?name=a.csv", None, None),
    ],
)
def test_names_tell_format_and_compression(path, kind, compression):
    assert (format_of(path), compression_of(path)) == (kind, compression)


def test_globs_and_folders(tmp_path):
    for name in ("b.jsonl", "a.csv", "sub/c.jsonl.gz", "sub/deep/d.parquet", "notes.md", ".hidden.jsonl", ".h/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "x.jsonl.partial").touch()
    (tmp_path / "folder.jsonl").mkdir()
    everything = ["a.csv", "b.jsonl", "sub/c.jsonl.gz", "sub/deep/d.parquet"]
    assert names([str(tmp_path)], tmp_path) == everything
    assert names([f"{tmp_path}/"], tmp_path) == everything
    assert names([f"{tmp_path}/*.jsonl"], tmp_path) == ["b.jsonl"]
    assert names([f"{tmp_path}/**/*.jsonl*"], tmp_path) == ["b.jsonl", "sub/c.jsonl.gz", "x.jsonl.partial"]
    assert names([f"{tmp_path}/s*"[:-1] + "ub", f"{tmp_path}/[ab].*"], tmp_path) == [*everything[2:], *everything[:2]]
    for path in (f"{tmp_path}/*.xml", f"{tmp_path}/.h/deep*", f"{tmp_path}/folder.jsonl"):
        with pytest.raises(FileError, match="matches no file") as caught:
            expand([path])
        assert "check the name" in caught.value.advice


def test_names_that_look_like_globs(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl", "set[2]/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names([f"{tmp_path}/a[1].jsonl"], tmp_path) == ["a[1].jsonl"]
    assert names([f"{tmp_path}/set[2]"], tmp_path) == ["set[2]/b.jsonl"]


def test_one_file_by_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", [{"n": 1}])
    write("b.jsonl", [{"n": 2}])
    several = [
        "b.jsonl",
        "./a.jsonl",
        "a.jsonl",
        "*.jsonl",
        str(tmp_path),
        "file://a.jsonl",
        f"file://{tmp_path}/b.jsonl",
    ]
    assert expand(several) == ["b.jsonl", "./a.jsonl"]
    assert [row["n"] for row in rows(several)] == [2, 1]
    assert expand(["-", "-"]) == ["-"]
    # Caches link names of different data to one file where their content is the same.
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    assert len(expand([str(tmp_path)])) == 3


def test_links_that_go_in_circles(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").touch()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub" / "up")
    (tmp_path / "broken.jsonl").symlink_to("none")
    assert names([str(tmp_path)], tmp_path) == ["sub/a.jsonl"]


# -- remote ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)
    filesystem.pseudo_dirs[:] = [""]


def test_remote_files_and_globs(memory):
    write("memory://in/b.jsonl.gz", [{"n": 2}])
    write("memory://in/a.jsonl", [{"n": 1}])
    write("memory://in/sub/c.parquet", [{"n": 3}])
    memory.pipe("/in/d.csv", b"n\n4\n")
    memory.makedirs("/in/folder.jsonl")
    assert expand(["memory://in/*.jsonl*"]) == ["memory:///in/a.jsonl", "memory:///in/b.jsonl.gz"]
    found = rows(["memory://in/**/*.parquet", "memory://in/[ab].*", "memory://in/d.csv", "memory://in/a.jsonl"])
    assert found[:3] == [{"n": 3}, {"n": 1}, {"n": 2}]
    assert found[3] == {"n": "4"}
    with pytest.raises(FileError, match=r"memory://in/\*\.xml matches no file"):
        expand(["memory://in/*.xml"])
    with pytest.raises(FileError, match=r"memory://in/none\.jsonl cannot be read") as caught:
        rows("memory://in/none.jsonl")
    assert "check the name, the network" in caught.value.advice
    memory.pipe("/in/cut.jsonl.gz", gzip.compress(b"{}\n" * 1000)[:-9])
    with pytest.raises(FileError, match=r"cut\.jsonl\.gz cannot be read: Compressed file ended"):
        rows("memory://in/cut.jsonl.gz")


def test_a_file_url_is_a_local_file(tmp_path):
    path = write(f"file://{tmp_path}/a.jsonl.zst", [{"n": 1}])
    assert local_path(path) == f"{tmp_path}/a.jsonl.zst"
    assert os.listdir(tmp_path) == ["a.jsonl.zst"]
    inputs = Inputs([f"file://{tmp_path}/*.zst"])
    assert [raw.fields() for raw in inputs] == [{"n": 1}]
    assert inputs.describe()[0]["bytes"] == (tmp_path / "a.jsonl.zst").stat().st_size
    with pytest.raises(FileError, match="No such file"):
        Inputs(f"file://{tmp_path}/none.jsonl")


def test_protocols_that_nobody_knows_are_told():
    for path in ("nosuch://a.jsonl", "nosuch://*.jsonl"):
        with pytest.raises(FileError, match=r"nosuch://.*cannot be read: .*nosuch"):
            rows(path)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed, and would use the network")
def test_a_library_for_a_protocol_that_is_missing_is_named():
    for path in ("s3://bucket/a.jsonl", "s3://bucket/*.jsonl"):
        with pytest.raises(FileError, match="s3fs") as caught:
            rows(path)
        assert "install" in caught.value.advice


SERVER = """
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
FETCH = """
import sys
from tests.data.files import outcomes
from trinfer import FileError
for url in sys.argv[1:]:
    try:
        print(outcomes(url))
    except FileError as error:
        print(error.message)
"""


def test_files_of_a_web_server(tmp_path):
    write(tmp_path / "a.jsonl.gz", [{"n": 1}])
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            found = program(FETCH, f"{url}/a.jsonl.gz?download=true", f"{url}/none.jsonl").splitlines()
        finally:
            server.send_signal(signal.SIGKILL)
    assert found[0] == "[{'n': 1}]"
    assert found[1].startswith(f"the input {url}/none.jsonl cannot be read: ")


HUB = """
from trinfer import FileError
from trinfer.data.readers import Inputs
try:
    list(Inputs("hf://datasets/owner/name/a.jsonl"))
except FileError as error:
    print(type(error.__cause__).__module__, error.message)
"""


def test_files_of_the_hub_are_no_data_sets(tmp_path):
    # Without the network, that the hub's library is asked is what can be seen.
    told = program(HUB, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "the input hf://datasets/owner/name/a.jsonl cannot be read" in told
    assert told.startswith("huggingface_hub")


def test_what_a_run_keeps_is_nobodys_input(tmp_path):
    run = tmp_path / "out.jsonl.run"
    run.mkdir()
    for path in (tmp_path / "a.jsonl", run / "errors.jsonl", run / "manifest.json"):
        path.write_text("{}\n")
    assert expand([str(tmp_path)]) == [str(tmp_path / "a.jsonl")]
    (run / "manifest.json").unlink()  # a folder that is only called so
    assert len(expand([str(tmp_path)])) == 2
