"""Where the answers of unfinished rollouts are kept: the journal, or SQLite. Both are durable, and commit equal groups.

python -m benchmarks.request_cache [--json FILE] [--markdown FILE] [--rounds N]

Each document asks four times. In the journal an answer is one more record, and is forgotten when the document's row
is written; in SQLite it is a row of a table, and is deleted with the document's row.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figures, arguments_for
from benchmarks.nginx import answer
from trinfer.batch.calls import answer_of, encode_call, key_of
from trinfer.batch.committer import CALL, ROW
from trinfer.durable.frames import Record
from trinfer.durable.journal import Journal, read_segments

DOCUMENTS = 10_000
CALLS = 4
GROUP = 64  # records in one commit
ANSWER = json.loads(answer())
LINE = json.dumps({"id": "x", "text": "w" * 1000, "metadata": {"rollout_results": [ANSWER]}}).encode() + b"\n"


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def groups() -> list[list[Record]]:
    """All answers and rows in the order in which 64 documents at once would give them."""
    records: list[Record] = []
    for first in range(0, DOCUMENTS, GROUP):
        numbers = range(first, min(first + GROUP, DOCUMENTS))
        for call in range(CALLS):
            records += [Record(CALL, key(n), encode_call(key(call), ANSWER)) for n in numbers]
        records += [Record(ROW, key(n), LINE) for n in numbers]
    return [records[at : at + GROUP] for at in range(0, len(records), GROUP)]


def journal(folder: Path) -> tuple[float, float, float, int]:
    target = Journal(folder)
    work = groups()
    began, used = time.perf_counter(), time.process_time()
    for group in work:
        target.append(group)
    took, used = time.perf_counter() - began, time.process_time() - used
    target.close()
    began = time.perf_counter()
    found = 0
    for segment in read_segments(folder):
        for frame in segment.frames(verify=True):
            for entry in frame.entries():
                if entry.kind == CALL:
                    body = segment.read_one(entry.offset, entry.length)
                    found += key_of(body) is not None and bool(answer_of(body))
    assert found == DOCUMENTS * CALLS
    return took, used, time.perf_counter() - began, sum(file.stat().st_size for file in folder.rglob("*.journal"))


def sqlite(folder: Path) -> tuple[float, float, float, int]:
    base = sqlite3.connect(folder / "cache.db", isolation_level=None)
    base.execute("pragma journal_mode=wal")
    base.execute("pragma synchronous=full")  # as durable as the journal: each commit is synced
    base.execute(
        "create table calls (document blob, call blob, answer blob, primary key (document, call)) without rowid"
    )
    base.execute("create table done (document blob primary key, line blob) without rowid")
    work = groups()
    began, used = time.perf_counter(), time.process_time()
    for group in work:
        base.execute("begin")
        calls = [(record.key, record.body[4:20], record.body) for record in group if record.kind == CALL]
        rows = [(record.key, record.body) for record in group if record.kind == ROW]
        base.executemany("insert or replace into calls values (?, ?, ?)", calls)
        base.executemany("insert or replace into done values (?, ?)", rows)
        base.executemany("delete from calls where document = ?", [(document,) for document, _ in rows])
        base.execute("commit")
    took, used = time.perf_counter() - began, time.process_time() - used
    size = sum(file.stat().st_size for file in folder.iterdir())
    base.close()
    base = sqlite3.connect(folder / "cache.db")
    began = time.perf_counter()
    assert sum(1 for _ in base.execute("select document, call, answer from calls")) == 0
    assert sum(1 for _ in base.execute("select document from done")) == DOCUMENTS
    loaded = time.perf_counter() - began
    base.close()
    return took, used, loaded, size


def main() -> int:
    arguments = arguments_for("benchmarks.request_cache", __doc__ or "", 3)
    figures = Figures()
    figures.head()
    records = DOCUMENTS * (CALLS + 1)
    found: dict[str, list[tuple[float, float, float, int]]] = {"journal": [], "SQLite": []}
    for _ in range(arguments.rounds):
        for name, store in (("journal", journal), ("SQLite", sqlite)):
            with tempfile.TemporaryDirectory(
                prefix="trinfer-cache-", dir=os.environ.get("TMPDIR", "/var/tmp")
            ) as folder:
                found[name].append(store(Path(folder)))
    for name, results in found.items():
        figures.add(f"{name}: records a second", [records / took for took, _, _, _ in results], "1/s")
        figures.add(f"{name}: CPU of a record", [1e6 * used / records for _, used, _, _ in results], "us")
        figures.add(f"{name}: reading it again", [1e3 * loaded for _, _, loaded, _ in results], "ms")
        figures.add(f"{name}: bytes on disk", [size / 2**20 for _, _, _, size in results], "MiB")
    figures.save(arguments, "The request cache", "benchmarks.request_cache")
    return 0


if __name__ == "__main__":
    sys.exit(main())
