"""Libraries that are not installed: the error names what to install, and comes before an engine starts."""

from __future__ import annotations

import json

import pytest

from tests.data.files import program, write
from trinfer import ConfigError
from trinfer.data.extras import load

CODE = """
import json, os, sys
missing = ("pyarrow", "pyarrow.parquet", "zstandard", "datasets", "fsspec", "jinja2")
for name in missing:
    sys.modules[name] = None

from trinfer import ConfigError
from trinfer.batch.prompts import PromptOptions, Prompts
from trinfer.data.files import open_input
from trinfer.data.readers import Inputs
from trinfer.data.writers import OutputFile, check_format

folder = sys.argv[1]
calls = {
    "read parquet": lambda: Inputs(f"{folder}/a.parquet"),
    "read zstd": lambda: Inputs(f"{folder}/a.jsonl.zst"),
    "open zstd": lambda: open_input(f"{folder}/a.jsonl.zst").__enter__(),
    "read data set": lambda: Inputs("hf:owner/name"),
    "read remote": lambda: Inputs("memory://a.jsonl"),
    "read remote glob": lambda: Inputs("memory://*.jsonl"),
    "read stdin": lambda: Inputs("-", format="parquet"),
    "write parquet": lambda: OutputFile(f"{folder}/b.parquet"),
    "write zstd": lambda: OutputFile(f"{folder}/b.jsonl.zst"),
    "write remote": lambda: OutputFile("memory://a.jsonl"),
    "check parquet": lambda: check_format("part.parquet"),
    "check zstd": lambda: check_format("b.jsonl.zst"),
    "check remote": lambda: check_format("memory://a.jsonl"),
    "template": lambda: Prompts(PromptOptions(template="x")),
}
told = {}
for name, call in calls.items():
    try:
        call()
    except ConfigError as error:
        told[name] = [error.message, error.advice]
told["left"] = sorted(os.listdir(folder))
told["jsonl"] = len(list(Inputs(f"{folder}/a.jsonl")))
print(json.dumps(told))
"""
EXTRAS = {
    "parquet": ("read parquet", "read stdin", "write parquet", "check parquet"),
    "zstd": ("read zstd", "open zstd", "write zstd", "check zstd"),
    "remote": ("read remote", "read remote glob", "write remote", "check remote"),
    "hf": ("read data set",),
    "templates": ("template",),
}


def test_what_is_missing_is_named_with_the_extra_that_brings_it(tmp_path):
    names = [f"a.{suffix}" for suffix in ("jsonl", "jsonl.zst", "parquet")]
    for name in names:
        write(tmp_path / name, [{"n": 1}])
    told = json.loads(program(CODE, tmp_path))
    for extra, calls in EXTRAS.items():
        for call in calls:
            message, advice = told.pop(call)
            assert advice == f"pip install 'trinfer[{extra}]'", call
            assert "cannot be imported" in message
    assert told == {"left": names, "jsonl": 1}  # nothing was left, and what needs nothing works


def test_a_library_that_is_there_is_loaded():
    assert load("zstandard", "a test").__name__ == "zstandard"


def test_a_library_that_is_broken_says_how(monkeypatch, tmp_path):
    (tmp_path / "zstandard.py").write_text("from json import what_it_never_had")
    code = "from trinfer.data.extras import load; load('zstandard', 'reading a.zst')"
    with pytest.raises(AssertionError, match=r"reading a\.zst needs zstandard.*what_it_never_had") as caught:
        program(code, PYTHONPATH=str(tmp_path))
    assert ConfigError.__name__ in str(caught.value)
