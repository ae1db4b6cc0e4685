"""The ledger on real files, and without a disk."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from trinfer.errors import ConfigError
from trinfer.process.addresses import runtime_dir
from trinfer.process.identity import pid_space
from trinfer.process.ledger import Entry, Ledger, entries

ENTRY = Entry("id1", "12-34", "vllm", 0, "m", "ready", "/s", "", 1.0)


@pytest.fixture(autouse=True)
def own_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_what_is_written_is_read_and_removed(own_runtime):
    ledger = Ledger()
    ledger.write(ENTRY)
    [(path, entry)] = entries()
    assert entry == ENTRY
    assert path.stat().st_mode & 0o777 == 0o600
    ENTRY2 = Entry("id1", "12-34", "vllm", 0, "m", "restarting", "", "", 1.0, restarts=2)
    ledger.write(ENTRY2)
    assert [entry for _, entry in entries()] == [ENTRY2]
    ledger.remove()
    ledger.remove()
    assert entries() == []
    assert list(path.parent.iterdir()) == []


def test_damaged_and_newer_entries(own_runtime):
    ledger = Ledger()
    ledger.write(ENTRY)
    folder = own_runtime / "ledger"
    (folder / "cut.json").write_text('{"server": "x", "ru')
    (folder / "list.json").write_text("[]")
    (folder / "less.json").write_text('{"server": "x"}')
    (folder / "noise.json").write_bytes(b"\xff\xfe\0")
    text = (folder / "id1.json").read_text()
    (folder / "newer.json").write_text(text.replace('"id1"', '"newer"').replace("{", '{"from_the_future": 1, ', 1))
    assert sorted(entry.server for _, entry in entries()) == ["id1", "newer"]
    ledger.remove()


def test_a_full_disk_is_logged_once_and_breaks_nothing(small_disk, monkeypatch, caplog):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(small_disk / "run"))
    (small_disk / "run" / "ledger").mkdir(mode=0o700, parents=True)
    (small_disk / "run").chmod(0o700)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(b"x" * 4096)
            filler.flush()
    ledger = Ledger()
    for _ in range(3):
        ledger.write(ENTRY)
    assert caplog.text.count("`trinfer ps` will not show this server") == 1
    assert entries() == []
    assert os.listdir(small_disk / "run" / "ledger") == []
    ledger.remove()


def test_half_an_entry_does_not_replace_a_whole_one(small_disk, monkeypatch, caplog):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(small_disk / "run"))
    ledger = Ledger()
    ledger.write(ENTRY)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 4096)  # room for one block
    ledger.write(replace(ENTRY, processes=[[number, 123456789] for number in range(1000)]))
    assert "No space left on device" in caplog.text
    assert [entry for _, entry in entries()] == [ENTRY]
    ledger.remove()


def test_entries_of_other_hosts_are_left_out():
    for space in ("", pid_space(), "another host"):
        Ledger().write(replace(ENTRY, server=f"in {space[:7]}", space=space))
    assert len(entries()) == 2
    Ledger().sweep()  # the owners of two of them are gone
    assert [path.name for path in (runtime_dir() / "ledger").iterdir()] == ["in another.json"]


def test_a_folder_that_is_not_private_is_not_used(own_runtime, caplog):
    own_runtime.mkdir(mode=0o755)
    Path(own_runtime).chmod(0o755)
    Ledger().write(ENTRY)
    assert "is not private" in caplog.text
    with pytest.raises(ConfigError, match="is not private"):
        entries()
