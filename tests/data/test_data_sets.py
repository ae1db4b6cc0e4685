"""Data sets of Hugging Face, by the real library: saved in folders, read from files, missing. No network is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.files import program

MAKE = """
import datetime, sys
import datasets, pyarrow
from datasets import Dataset, DatasetDict, Features, Image, Value

folder = sys.argv[1]
# The smallest picture that there is. It is not decoded, which would need another library.
picture = b"GIF89a" + bytes([1, 0, 1, 0, 0, 0, 0, 59])
columns = {
    "text": ["one", None],
    "when": [datetime.datetime(2024, 1, 2, 3, 4, 5), None],
    "image": [{"bytes": picture, "path": None}, None],
    "images": [[{"bytes": picture, "path": None}], []],
    "label": [1, 0],
    "score": [float("nan"), 0.5],
    "parts": [[{"a": 1}], []],
}
features = Features({
    "text": Value("string"), "when": Value("timestamp[us]"), "image": Image(), "images": [Image()],
    "label": datasets.ClassLabel(names=["no", "yes"]), "score": Value("float64"), "parts": [{"a": Value("int64")}],
})
rows = Dataset(datasets.table.InMemoryTable(pyarrow.table(columns, schema=features.arrow_schema)))
rows.save_to_disk(f"{folder}/one")
DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(f"{folder}/many")
Dataset.from_dict({"n": [1]}, split="test").save_to_disk(f"{folder}/test")
"""
READ = """
import json, sys
from tests.data.files import content_key, rows
from trinfer import TrinferError
from trinfer.data.readers import Inputs

folder = sys.argv[1]
told = {}
for name in sys.argv[2:]:
    try:
        inputs = Inputs(name.replace("FOLDER", folder))
        found = list(inputs)
        told[name] = [[raw.place, raw.fields(), content_key(raw.data).hex()] for raw in found]
        assert [raw.data for raw in found] == [raw.data for raw in inputs]
        assert inputs.total_bytes is None and inputs.describe() == [{"path": inputs.paths[0]}]
    except TrinferError as error:
        told[name] = [type(error).__name__, error.message, error.advice]
print(json.dumps(told, allow_nan=False))
"""
NAMES = (
    "hf:FOLDER/one",
    "hf:FOLDER/many?split=test",
    "hf:FOLDER/many",
    "hf:FOLDER/files?split=train",
    "hf:FOLDER/many?split=nothing",
    "hf:FOLDER/test?split=train",
    "hf:FOLDER/none",
    "hf:FOLDER/files?split=nothing",
    "hf:owner/name",
    "hf:",
    "hf:owner/name?what=1",
)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    """What is read, by name. One process for all: the library takes seconds to load."""
    folder = tmp_path_factory.mktemp("sets")
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    (folder / "files").mkdir()
    (folder / "files" / "a.jsonl").write_text('{"n": 1, "t": "2024-01-02T03:04:05"}\n')
    found = json.loads(program(f"{MAKE}\n{READ}", folder, *NAMES, **home))
    return {**found, "folder": str(folder)}


def test_a_data_set_in_a_folder(told):
    (place, fields, _), (_, empty, _) = told["hf:FOLDER/one"]
    assert place == f"{told['folder']}/one:1"
    picture = {"bytes": "R0lGODlhAQABAAAAADs=", "path": None}
    assert fields == {
        "text": "one",
        "when": "2024-01-02T03:04:05",
        "image": picture,
        "images": [picture],
        "label": 1,
        "score": None,
        "parts": [{"a": 1}],
    }
    assert empty == {
        "text": None,
        "when": None,
        "image": None,
        "images": [],
        "label": 0,
        "score": 0.5,
        "parts": [],
    }
    assert len(told["hf:FOLDER/many"]) == 2
    assert [fields for _, fields, _ in told["hf:FOLDER/many?split=test"]] == [empty]


def test_the_same_row_has_the_same_key_in_each_data_set(told):
    first, second = (key for _, _, key in told["hf:FOLDER/one"])
    assert first != second
    assert [key for _, _, key in told["hf:FOLDER/many"]] == [first, second]
    assert [key for _, _, key in told["hf:FOLDER/many?split=test"]] == [second]


def test_a_data_set_of_files(told):
    ((_, fields, _),) = told["hf:FOLDER/files?split=train"]
    assert fields["n"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "said", "advice"),
    [
        ("hf:FOLDER/many?split=nothing", "FileError", "/many has no split 'nothing'", "one of train, test"),
        ("hf:FOLDER/test?split=train", "FileError", "holds the split test, and not train", "leave ?split= out"),
        ("hf:FOLDER/files?split=nothing", "FileError", "/files (split nothing) cannot be read", "check name, split"),
        ("hf:FOLDER/none", "FileError", "/none does not exist", "check the name"),
        ("hf:owner/name", "FileError", "owner/name (split train) cannot be read", "HF_TOKEN"),
        ("hf:", "ConfigError", "allowed is hf:NAME", None),
        ("hf:owner/name?what=1", "ConfigError", "allowed is hf:NAME", None),
    ],
)
def test_data_sets_that_cannot_be_read_say_why(told, name, kind, said, advice):
    found, message, advised = told[name]
    assert found == kind
    assert said in message
    assert advised is None if advice is None else advice in advised
