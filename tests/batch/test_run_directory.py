"""What a run finds in its journals, and publishes: against a plain reading of the same records, one by one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from trinfer.batch.calls import encode_call
from trinfer.batch.committer import CALL, FAILED, REMOVED, ROW, VOID, failed_body
from trinfer.batch.items import Item
from trinfer.batch.publish import Output, list_failures, publish
from trinfer.batch.run_directory import FINAL, RunDirectory
from trinfer.durable.frames import Record
from trinfer.durable.journal import Journal
from trinfer.durable.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

CODE = "code"
KEYS = [bytes([n]) * 16 for n in range(1, 6)]
OUTCOMES = {ROW, REMOVED, FAILED}


def body_of(kind: int, number: int) -> bytes:
    """A body that only this record has; its length differs, too."""
    text = json.dumps({"n": number, "x": "x" * (number % 7)}).encode()
    match kind:
        case 1:
            return text + b"\n"
        case 2:
            return b""
        case 3:
            return failed_body(text + b"\n" if number % 2 else None, {"n": number})
        case 4:
            return encode_call(bytes([number % 3]) * 16, {"n": number})
        case _:
            return (CODE if number % 2 else "another").encode()


@st.composite
def journals(draw: st.DrawFn) -> dict[str, list[list[Record]]]:
    """Commits of several shardings."""
    names = draw(st.lists(st.sampled_from(["00000-of-00003", "00002-of-00003", "00000-of-00001"]), unique=True))
    number = 0
    found: dict[str, list[list[Record]]] = {}
    kinds = draw(st.sampled_from([[ROW], [ROW, REMOVED], [ROW, REMOVED, FAILED, CALL, VOID], [FAILED, CALL, VOID]]))
    for name in names:
        found[name] = []
        for size in draw(st.lists(st.integers(1, 5), max_size=4)):
            commit = []
            for _ in range(size):
                number += 1
                kind, key = draw(st.sampled_from(kinds)), draw(st.sampled_from(KEYS))
                if kind == REMOVED and any((each.kind, each.key) == (REMOVED, key) for each in commit):
                    continue  # no session removes a row twice; without a body they would lie at one place
                commit.append(Record(kind, key, body_of(kind, number)))
            found[name].append(commit)
    return found


def write(folder: Path, commits: list[list[Record]]) -> None:
    journal = Journal(folder, segment_bytes=300)
    for commit in commits:
        journal.append(commit)
    journal.close()


def plain_reading(records: list[Record], done: frozenset[int]) -> tuple[dict[bytes, Record], dict[bytes, list[bytes]]]:
    """The outcome of each row, and the answers of those that are not done."""
    outcomes: dict[bytes, Record] = {}
    calls: dict[bytes, list[bytes]] = {}
    for record in records:
        if record.kind == CALL:
            calls.setdefault(record.key, []).append(record.body)
        elif record.kind == VOID:
            if record.body == CODE.encode():
                calls.pop(record.key, None)
        else:
            if record.kind in done:
                calls.pop(record.key, None)
            if record.key not in outcomes or outcomes[record.key].kind not in FINAL:
                outcomes[record.key] = record
    return outcomes, calls


@given(before=journals(), added=journals(), retry_failed=st.booleans(), missing=st.sets(st.sampled_from(KEYS)))
def test_a_run_finds_and_publishes_what_its_journals_say(tmp_path_factory, before, added, retry_failed, missing):
    path = tmp_path_factory.mktemp("r")
    run_dir = path / "o.run"
    manifest = Manifest({"rollout": CODE})
    own = "00000-of-00001"
    with RunDirectory(run_dir, manifest):
        for name, commits in before.items():
            write(run_dir / "journal" / name, commits)
        (run_dir / "finished").mkdir()  # so that nothing is taken for an attempt that came to nothing
        (run_dir / "finished" / own).write_text("{}")
    run = RunDirectory(run_dir, manifest, retry_failed=retry_failed)
    with run:
        run.load().close()
        order = [record for name in sorted(before) if name != own for commit in before[name] for record in commit]
        order += [record for commit in before.get(own, []) for record in commit]
        outcomes, calls = plain_reading(order, run.done)
        compare(run, order, outcomes)
        for key in KEYS:
            item = Item(key, None, "", 0)
            run.recall(item)
            assert item.calls == ({body[4:20]: body for body in calls[key]} if key in calls else None)
        # This session adds to its own journal, and publishes what is in the input.
        write(run_dir / "journal" / own, added.get(own, []))
        run.load_new()
        order += [record for commit in added.get(own, []) for record in commit]
        outcomes, _ = plain_reading(order, run.done)
        compare(run, order, outcomes)
        rows = {key: record for key, record in outcomes.items() if key not in missing}
        for key in rows:
            run.index.see(key)
        published = publish(run, Output(str(path / "o.jsonl")), expected=len(rows))
        list_failures(run)
        errors = run.errors_file.read_bytes()
    failed = [record for record in rows.values() if record.kind == FAILED]
    lines = [record.body for record in rows.values() if record.kind == ROW]
    lines += [line.encode() for record in failed if (line := json.loads(record.body)["line"]) is not None]
    written = (path / "o.jsonl").read_bytes() if (path / "o.jsonl").exists() else b""
    assert sorted(written.splitlines(keepends=True)) == sorted(lines)
    assert (published.rows, published.failed) == (len(lines), len(failed))
    assert published.removed == sum(record.kind == REMOVED for record in rows.values())
    told = [json.loads(line)["n"] for line in errors.splitlines()]
    all_failed = [record for record in outcomes.values() if record.kind == FAILED]
    assert sorted(told) == sorted(json.loads(record.body)["error"]["n"] for record in all_failed)


def compare(run: RunDirectory, order: list[Record], outcomes: dict[bytes, Record]) -> None:
    assert run.known == len(outcomes)
    assert run.superseded == sum(record.kind in OUTCOMES for record in order) - len(outcomes)
    for key, record in outcomes.items():
        place = run.index.get(key)
        assert place is not None
        assert (place.state, run.body(place)) == (record.kind, record.body)
