"""`InferenceRunner` as library authors use it: real engines, real files, failures of every part."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.batch.runs import kept_rows
from tests.engine_configs import fake_config
from trinfer import (
    BadRequestError,
    ConfigError,
    Document,
    FileError,
    InferenceConfig,
    InferenceRunner,
    Media,
    RolloutError,
    RunStopped,
    ServerError,
)
from trinfer.batch.policy import ErrorPolicy
from trinfer.batch.publish import Output
from trinfer.batch.run_directory import RunDirectory
from trinfer.data.readers import Inputs
from trinfer.durable.journal import read_segments
from trinfer.durable.lock import RunLock, one_at_a_time
from trinfer.durable.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
DUMMY = InferenceConfig("dummy", "dummy")


def documents(count: int) -> list[Document]:
    return [Document(f"text {n}", f"d{n}", metadata={"n": n}) for n in range(count)]


def ask(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def rows(path: Path) -> list[dict[str, Any]]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


class Asks:
    """A rollout that counts what it is asked for."""

    def __init__(self, fail: Any = None) -> None:
        self.fail = fail
        self.asked: Counter[str] = Counter()

    async def __call__(self, document: Document, generate: Any, **context: Any) -> Any:
        self.asked[document.id] += 1
        result = await generate(ask(document.text))
        if self.fail is not None:
            self.fail(document)
        return {"text": result.text, **context} if context else result


async def test_results_go_to_the_metadata_and_the_rest_comes_out_as_it_went_in(tmp_path: Path):
    async def rollout(document: Document, generate: Any) -> Any:
        result = await generate({**ask(document.text), "max_tokens": 2})
        kinds = {"d0": None, "d1": result, "d2": [1, {"a": None}], "d3": False, "d4": 0, "d5": "é\ud800"}
        return kinds[document.id]

    source = [
        *documents(5),
        Document("text 5", "d5", media=[Media("m", "image", "http://x/y.png", media_bytes=b"\xff")]),
    ]
    out = tmp_path / "out.jsonl"
    summary = await InferenceRunner(rollout, DUMMY, source, out, metadata_key="r", rollouts_per_document=2).run()
    found = {row["id"]: row for row in rows(out)}
    assert (summary.ok, summary.removed, summary.requests) == (5, 1, 12)
    assert sorted(found) == ["d1", "d2", "d3", "d4", "d5"]
    first, second = found["d1"]["metadata"]["r"]
    assert first == second
    assert first["finish_reason"] == "length"
    assert first["usage"]["completion_tokens"] == 2
    assert found["d1"]["metadata"]["n"] == 1
    assert [found[name]["metadata"]["r"] for name in ("d2", "d3", "d4", "d5")] == [
        [[1, {"a": None}]] * 2,
        [False] * 2,
        [0] * 2,
        ["é\ud800"] * 2,
    ]
    assert found["d5"]["media"] == [
        {"id": "m", "type": "image", "url": "http://x/y.png", "media_bytes": "/w==", "metadata": {}}
    ]


async def test_some_rollouts_of_a_document_may_give_nothing(tmp_path: Path):
    calls = Counter[str]()

    async def rollout(document: Document, generate: Any) -> Any:
        calls[document.id] += 1
        return None if calls[document.id] == 1 else calls[document.id]

    await InferenceRunner(rollout, DUMMY, documents(3), tmp_path / "o.jsonl", rollouts_per_document=3).run()
    assert [sorted(row["metadata"]["rollout_results"]) for row in rows(tmp_path / "o.jsonl")] == [[2, 3]] * 3


SHARED: list[str] = []


@contextmanager
def sync_context():
    SHARED.append("in")
    yield {"shared": 7}
    SHARED.append("out")


@asynccontextmanager
async def async_context():
    await trio.lowlevel.checkpoint()
    SHARED.append("in")
    yield {"shared": 7}
    await trio.lowlevel.checkpoint()
    SHARED.append("out")


async def async_function() -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"shared": 7}


@pytest.mark.parametrize(
    ("context", "managed"),
    [
        ({"shared": 7}, False),
        (lambda: {"shared": 7}, False),
        (async_function, False),
        (sync_context, True),
        (async_context, True),
        (sync_context(), True),
        (async_context(), True),
    ],
)
async def test_a_shared_context_is_entered_once(tmp_path: Path, context, managed):
    SHARED.clear()
    await InferenceRunner(Asks(), DUMMY, documents(5), tmp_path / "o.jsonl", shared_context=context, version="1").run()
    assert all(row["metadata"]["rollout_results"][0]["shared"] == 7 for row in rows(tmp_path / "o.jsonl"))
    assert (["in", "out"] if managed else []) == SHARED


@pytest.mark.parametrize("context", [[1], lambda: 3, "text"])
async def test_a_shared_context_that_is_none(tmp_path: Path, context):
    runner = InferenceRunner(Asks(), DUMMY, documents(1), tmp_path / "o.jsonl", shared_context=context, version="1")
    with pytest.raises(ConfigError, match="shared_context gives a"):
        await runner.run()
    assert list(tmp_path.iterdir()) == []


async def test_an_error_of_the_shared_context_comes_out_as_itself(tmp_path: Path):
    def broken() -> dict[str, Any]:
        raise LookupError("no tokenizer")

    runner = InferenceRunner(Asks(), DUMMY, documents(1), tmp_path / "o.jsonl", shared_context=broken, version="1")
    with pytest.raises(LookupError, match="no tokenizer"):
        await runner.run()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollouts_per_document": 0}, "rollouts_per_document=0"),
        ({"max_concurrent_generations": 0}, "max_concurrent_generations=0"),
        ({"max_concurrent_documents": 0}, "max_concurrent_documents=0"),
        ({"rollouts_per_document": "2"}, "rollouts_per_document='2'"),
        ({"rollouts_per_document": 1.5}, "rollouts_per_document=1.5"),
        ({"max_concurrent_generations": None}, "max_concurrent_generations=None"),
        ({"writer": None}, "writer=None"),
        ({"writer": "-"}, "is a stream"),
        ({"writer": "/dev/null"}, "is a stream"),
        ({"config": InferenceConfig("dummy", "dummy", default_generation_params={"stop": {"a"}})}, "'stop'.*JSON"),
        ({"durable": False, "ordered": True}, "ordered needs a run directory"),
        ({"durable": False, "retry_failed": True}, "retry_failed needs a run directory"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"max_failures": "many"}, "max-failures"),
        ({"rollout_fn": 3}, "rollout_fn=3"),
    ],
)
def test_values_that_are_not_possible(tmp_path: Path, settings, words):
    with pytest.raises(ConfigError, match=words):
        InferenceRunner(
            **{
                "rollout_fn": Asks(),
                "config": DUMMY,
                "reader": documents(1),
                "writer": tmp_path / "o.jsonl",
                **settings,
            }
        )


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0), ("0", "2")])
async def test_ranks_that_are_not_possible(tmp_path: Path, rank, world_size):
    with pytest.raises(ConfigError, match="rank="):
        await InferenceRunner(Asks(), DUMMY, documents(1), f"{tmp_path}/o/", version="1").run(rank, world_size)


async def test_a_failing_document_stops_the_run_and_the_next_call_goes_on(tmp_path: Path):
    def fail(document: Document) -> None:
        if document.id == "d7":
            raise LookupError("my own mistake")

    broken, out = Asks(fail), tmp_path / "o.jsonl"
    with pytest.raises(RunStopped, match=r"document 8: .*LookupError: my own mistake") as caught:
        await InferenceRunner(broken, DUMMY, documents(40), out, max_concurrent_generations=4, version="1").run()
    assert isinstance(caught.value.__cause__, RolloutError)
    assert isinstance(caught.value.__cause__.__cause__, LookupError)
    assert not out.exists()
    done = {row["id"] for row in kept_rows(tmp_path / "o.jsonl.run")}
    assert "d7" not in done
    mended = Asks()
    summary = await InferenceRunner(mended, DUMMY, documents(40), out, version="1").run()
    assert mended.asked.keys() == {f"d{n}" for n in range(40)} - done
    assert sorted(row["id"] for row in rows(out)) == sorted(f"d{n}" for n in range(40))
    assert summary.skipped == len(done)


async def test_failures_are_noted_and_may_be_tried_again(tmp_path: Path):
    def fail(document: Document) -> None:
        if document.metadata["n"] % 4 == 0:
            raise LookupError("not today")

    def runner(rollout: Asks, **settings: Any) -> InferenceRunner:
        return InferenceRunner(
            rollout, DUMMY, documents(20), tmp_path / "o.jsonl", on_error="skip", version="1", **settings
        )

    summary = await runner(Asks(fail)).run()
    assert (summary.ok, summary.failed) == (15, 5)
    assert summary.is_complete
    errors = rows(tmp_path / "o.jsonl.run" / "errors.jsonl")
    assert {(each["custom_id"], each["error"]["code"]) for each in errors} == {
        (f"d{n}", "RolloutError") for n in range(0, 20, 4)
    }
    assert len(rows(tmp_path / "o.jsonl")) == 15
    again = Asks()
    assert (await runner(again).run()).is_complete
    assert not again.asked  # it is finished, and says so
    summary = await runner(again, retry_failed=True).run()
    assert again.asked == dict.fromkeys((f"d{n}" for n in range(0, 20, 4)), 1)
    assert (summary.ok, summary.skipped) == (5, 15)
    assert len(rows(tmp_path / "o.jsonl")) == 20
    assert not (tmp_path / "o.jsonl.run" / "errors.jsonl").exists()


async def test_a_rollout_may_catch_the_errors_of_its_requests(tmp_path: Path):
    async def rollout(document: Document, generate: Any) -> Any:
        try:
            return await generate({"messages": "none"})
        except BadRequestError as error:
            return {"refused": error.status}

    await InferenceRunner(rollout, DUMMY, documents(2), tmp_path / "o.jsonl").run()
    assert [row["metadata"]["rollout_results"] for row in rows(tmp_path / "o.jsonl")] == [[{"refused": 400}]] * 2


async def test_a_failed_engine_is_the_runs_failure_and_not_the_documents(tmp_path: Path):
    config = fake_config("--crash-at", "request:8")
    runner = InferenceRunner(
        Asks(), config, documents(40), tmp_path / "o.jsonl", on_error="skip", max_concurrent_generations=2, version="1"
    )
    with pytest.raises(ServerError):
        await runner.run()
    assert 0 < len(kept_rows(tmp_path / "o.jsonl.run")) <= 8
    # The next engine gets further, and the third as well.
    for _ in range(20):
        try:
            await runner.run()
        except ServerError:
            continue
        break
    assert sorted(row["id"] for row in rows(tmp_path / "o.jsonl")) == sorted(f"d{n}" for n in range(40))


HOT = InferenceConfig("dummy", "dummy", default_generation_params={"temperature": 1.5})


@pytest.mark.parametrize(
    ("config", "version", "hits", "requests"),
    [
        (DUMMY, "1", 0, 10),  # the same code would fail with the same answers: others are asked for
        (DUMMY, "2", 10, 0),  # mended code gets what was paid for
        (HOT, "2", 0, 10),  # but not what was asked with other parameters
    ],
)
async def test_what_becomes_of_answers_with_which_the_code_has_failed(tmp_path, config, version, hits, requests):
    def fail(document: Document) -> None:
        raise LookupError

    def runner(rollout: Any, config: InferenceConfig, version: str, **settings: Any) -> InferenceRunner:
        settings = {"accept_changes": True, **settings}
        return InferenceRunner(
            rollout, config, documents(10), tmp_path / "o.jsonl", version=version, on_error="skip", **settings
        )

    for _ in range(2):
        summary = await runner(Asks(fail), DUMMY, "1", retry_failed=True).run()
        assert (summary.failed, summary.requests) == (10, 10)
    summary = await runner(Asks(), config, version, retry_failed=True).run()
    assert (summary.cache_hits, summary.requests) == (hits, requests)
    assert len(rows(tmp_path / "o.jsonl")) == 10


async def test_a_changed_rollout_is_refused_unless_told(tmp_path: Path):
    def stop(document: Document) -> None:
        raise LookupError

    def runner(rollout: Any, config: InferenceConfig, version: str, **settings: Any) -> InferenceRunner:
        return InferenceRunner(rollout, config, documents(10), tmp_path / "o.jsonl", version=version, **settings)

    with pytest.raises(RunStopped):
        await runner(Asks(stop), DUMMY, "1").run()
    with pytest.raises(ConfigError, match=r'- rollout = "1"\n.*[+] rollout = "2"'):
        await runner(Asks(), DUMMY, "2").run()
    with pytest.raises(ConfigError, match=r"params.temperature = \(not set\)"):
        await runner(Asks(), HOT, "1").run()
    await runner(Asks(), DUMMY, "2", accept_changes=True).run()
    history = json.loads((tmp_path / "o.jsonl.run" / "manifest.json").read_text())["notes"]["history"]
    assert [each["rollout"] for each in history] == ["1"]


def test_the_source_of_a_rollout_is_its_version():
    async def one(document: Document, generate: Any) -> int:
        return 1

    async def two(document: Document, generate: Any) -> int:
        return 2

    def version(rollout: Any, **settings: Any) -> Any:
        runner = InferenceRunner(rollout, DUMMY, [], "o.jsonl", **settings)
        return runner._options.job["rollout"]

    assert version(one) == version(one) != version(two)
    assert version(one, version="x") == "x"
    assert version(Asks()) == "Asks"  # an object that can be called has no source of its own
    # What `partial` gives a function is a part of it; where an object lies in memory is not.
    given = [version(partial(one, a=1)), version(partial(one, a=2)), version(partial(partial(one, 1), a=1))]
    assert len({*given, version(one)}) == 4
    assert version(partial(one, a=object())) == version(partial(one, a=object()))
    assert version(partial(Asks(), a=1)) == version(partial(Asks(), a=1)) != version(partial(Asks(), a=2))


async def test_shards_share_the_documents_and_may_become_more_or_less(tmp_path: Path):
    asked: Counter[str] = Counter()

    async def shard(rank: int, world_size: int, fail: Any = None) -> None:
        rollout = Asks(fail)
        runner = InferenceRunner(
            rollout, DUMMY, documents(60), f"{tmp_path}/out/", max_concurrent_generations=4, version="1"
        )
        try:
            await runner.run(rank, world_size)
        except RunStopped:
            assert fail is not None
        finally:
            asked.update(rollout.asked)

    def stops_half_way(document: Document) -> None:
        if document.metadata["n"] == 30:
            raise LookupError

    async with trio.open_nursery() as nursery:
        for rank in range(3):
            nursery.start_soon(shard, rank, 3, stops_half_way)
    assert len(kept_rows(tmp_path / "out.run")) < 60
    for rank in range(2):
        await shard(rank, 2)
    found = [row["id"] for row in rows(tmp_path / "out")]
    assert sorted(found) == sorted(f"d{n}" for n in range(60))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"part-0000{rank}-of-00002-00000.jsonl" for rank in range(2)
    }
    assert sum(asked.values()) <= 60 + 3 * 4
    with pytest.raises(ConfigError, match="allowed is a folder"):
        await InferenceRunner(Asks(), DUMMY, documents(2), tmp_path / "o.jsonl", version="1").run(0, 2)


async def test_stopping_finishes_what_is_under_way(tmp_path: Path):
    stop = trio.Event()
    rollout = Asks(lambda document: stop.set())
    slow = InferenceConfig("dummy", "dummy", model_kwargs={"latency": 0.2})

    def runner() -> InferenceRunner:
        return InferenceRunner(
            rollout, slow, documents(30), tmp_path / "o.jsonl", max_concurrent_generations=5, version="1"
        )

    summary = await runner().run(stop=stop)
    assert not summary.is_complete
    assert summary.ok == 5
    assert not (tmp_path / "o.jsonl").exists()
    assert (await runner().run()).ok == 25
    assert rollout.asked == dict.fromkeys((f"d{n}" for n in range(30)), 1)


async def test_a_cancelled_run_keeps_what_was_answered(tmp_path: Path):
    answered: list[str] = []

    def cancel_after_a_while(document: Document) -> None:
        answered.append(document.id)
        if len(answered) == 20:
            scope.cancel()

    rollout = Asks(cancel_after_a_while)
    config = InferenceConfig("dummy", "dummy", model_kwargs={"latency": 0.03})
    runner = InferenceRunner(
        rollout, config, documents(200), tmp_path / "o.jsonl", max_concurrent_generations=5, version="1"
    )
    with trio.CancelScope() as scope:
        await runner.run()
    assert scope.cancelled_caught
    kept = len(kept_rows(tmp_path / "o.jsonl.run"))
    assert 5 <= kept < 200
    summary = await runner.run()
    assert summary.skipped == kept
    assert rollout.asked.total() <= 205
    assert len(rows(tmp_path / "o.jsonl")) == 200


async def test_readers_of_every_kind(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"id": f"d{n}", "body": f"text {n}", "x": n}) + "\n" for n in range(6))
    for name, part in (("a.jsonl", lines[: len(lines) // 2]), ("b.jsonl", lines[len(lines) // 2 :])):
        (folder / name).write_text(part)
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    for number, reader in enumerate([f"{folder}/*.jsonl", paths, Inputs(paths, limit=6), str(folder)]):
        out = tmp_path / f"out-{number}.parquet"
        summary = await InferenceRunner(Asks(), DUMMY, reader, out, text_field="body", version="1", ordered=True).run()
        assert summary.ok == 6
        out.unlink()
    out = tmp_path / "out.jsonl"
    await InferenceRunner(
        Asks(), DUMMY, paths, Output(str(out)), text_field="body", version="1", ordered=True, durable=True
    ).run()
    assert [row["metadata"]["x"] for row in rows(out)] == list(range(6))


async def test_an_iterator_can_be_read_once_and_says_so(tmp_path: Path):
    source = iter(documents(4))
    runner = InferenceRunner(Asks(), DUMMY, source, tmp_path / "o.jsonl", version="1")
    assert (await runner.run()).ok == 4
    (tmp_path / "o.jsonl").unlink()
    with pytest.raises(FileError, match=r"the input is empty.*\n.*can be read only once"):
        await runner.run()


async def test_a_reader_that_breaks_is_the_runs_failure(tmp_path: Path):
    def broken():
        yield from documents(3)
        raise ZeroDivisionError("in the reader")

    runner = InferenceRunner(Asks(), DUMMY, broken(), tmp_path / "o.jsonl", version="1")
    with pytest.raises(ZeroDivisionError, match="in the reader"):
        await runner.run()


async def test_a_run_that_is_not_durable_leaves_only_the_output(tmp_path: Path):
    await InferenceRunner(Asks(), DUMMY, documents(4), tmp_path / "o.jsonl", durable=False, version="1").run()
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]
    assert len(rows(tmp_path / "o.jsonl")) == 4


async def test_a_policy_of_ones_own(tmp_path: Path):
    failures = iter([True, False])

    def fail(document: Document) -> None:
        if next(failures):
            raise LookupError

    policy = ErrorPolicy("retry", retries=1)
    summary = await InferenceRunner(
        Asks(fail), DUMMY, documents(1), tmp_path / "o.jsonl", on_error=policy, version="1"
    ).run()
    assert summary.ok == 1
    assert (summary.requests, summary.cache_hits) == (1, 1)


async def test_a_worker_node_sends_no_requests(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
    rollout = Asks()
    config = fake_config("--crash-after", "0.2", tp=2, multi_node=True)
    runner = InferenceRunner(rollout, config, documents(4), tmp_path / "o.jsonl", version="1")
    with suppress(ServerError):  # its engine dies, as ordered
        await runner.run()
    assert not rollout.asked
    assert not (tmp_path / "o.jsonl").exists()


PROGRAM = """
import sys
from trinfer import Document, InferenceConfig, InferenceRunner

async def rollout(document, generate):
    return await generate({"messages": [{"role": "user", "content": document.text}]})

runner = InferenceRunner(
    rollout,
    InferenceConfig("dummy", "dummy", model_kwargs={"latency": 0.02}),
    [Document(f"t{n}", f"d{n}") for n in range(400)],
    sys.argv[1],
    max_concurrent_generations=5,
)
print(runner.run_sync().ok)
"""


def test_ctrl_c_ends_a_program_and_the_next_one_goes_on(tmp_path: Path):
    out = tmp_path / "o.jsonl"
    command = [sys.executable, "-c", PROGRAM, str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    give_up = time.monotonic() + 30
    while len(kept_rows(tmp_path / "o.jsonl.run")) < 20:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in err
    assert b"ExceptionGroup" not in err
    kept = len(kept_rows(tmp_path / "o.jsonl.run"))
    assert 20 <= kept < 400
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert int(done.stdout) == 400 - kept
    assert sorted(row["id"] for row in rows(out)) == sorted(f"d{n}" for n in range(400))


MEMORY = """
import resource, sys
from trinfer import Document, InferenceConfig, InferenceRunner

class Documents:
    def __iter__(self):
        return (Document(f"t{n} " * 50, f"d{n}") for n in range(int(sys.argv[2])))

async def rollout(document, generate):
    return await generate({"messages": [{"role": "user", "content": document.text}]})

InferenceRunner(
    rollout, InferenceConfig("dummy", "dummy"), Documents(), sys.argv[1], max_concurrent_generations=50
).run_sync()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path):
    """Ten times the documents, the same memory; the figure for a million is printed by benchmarks.batch."""
    peaks = []
    for count in (500, 5000):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / f"{count}.jsonl"), str(count)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0], peaks


async def test_the_torn_tail_of_another_sharding_is_seen(tmp_path: Path):
    """As after a crash of the machine: the head of a commit has reached the disk, and its rows have not."""

    def stop(document: Document) -> None:
        if document.metadata["n"] == 30:
            raise LookupError

    def runner(rollout: Any) -> InferenceRunner:
        return InferenceRunner(
            rollout, DUMMY, documents(60), f"{tmp_path}/out/", max_concurrent_generations=4, version="1"
        )

    for rank in range(2):
        with suppress(RunStopped):
            await runner(Asks(stop)).run(rank, 2)
    for segment in (
        each for rank in range(2) for each in read_segments(tmp_path / f"out.run/journal/0000{rank}-of-00002")
    ):
        last = list(segment.frames(verify=True))[-1]
        with segment.path.open("r+b") as file:
            file.seek(last.bodies)
            file.write(b"?" * last.length)
    await runner(Asks()).run()
    assert sorted(row["id"] for row in rows(tmp_path / "out")) == sorted(f"d{n}" for n in range(60))


# -- how it is called -----------------------------------------------------------------------------------------------


async def test_from_within_trio_and_from_without(tmp_path: Path):
    runner = InferenceRunner(Asks(), DUMMY, documents(1), tmp_path / "o.jsonl", version="1")
    with pytest.raises(ConfigError, match=r"allowed is `await runner\.run\(\)`"):
        runner.run_sync()

    async def in_asyncio() -> None:
        with pytest.raises(ConfigError, match=r"allowed are `trio\.run\(runner\.run\)`"):
            await runner.run()

    await trio.to_thread.run_sync(asyncio.run, in_asyncio())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (3, "the reader is a int"),
        ([{"text": "t"}], "number 1 of the reader is a dict"),
        ([Document("t", "d"), None], "number 2 of the reader is a NoneType"),
    ],
)
async def test_readers_that_give_no_documents(tmp_path: Path, reader, words):
    with pytest.raises(ConfigError, match=words):
        await InferenceRunner(Asks(), DUMMY, reader, tmp_path / "o.jsonl", version="1").run()


async def test_the_callers_documents_stay_as_they_are(tmp_path: Path):
    async def rollout(document: Document, generate: Any) -> Any:
        document.metadata["n"] = None
        document.metadata["deep"]["list"].append(1)
        document.text = ""
        return 1

    mine = [Document("t", "d", metadata={"n": 1, "deep": {"list": []}})]
    before = deepcopy(mine)
    runner = InferenceRunner(rollout, DUMMY, mine, tmp_path / "o.jsonl", version="1")
    await runner.run()
    assert mine == before
    summary = await runner.run()
    assert (summary.is_complete, summary.skipped) == (True, 1)  # they are the same documents still


async def test_a_finished_run_with_other_documents_is_continued(tmp_path: Path):
    asks = Asks()
    for count in (2, 3):
        await InferenceRunner(asks, DUMMY, documents(count), tmp_path / "o.jsonl", version="1").run()
        assert len(rows(tmp_path / "o.jsonl")) == count
    assert asks.asked == dict.fromkeys(("d0", "d1", "d2"), 1)


async def test_the_order_of_what_is_read_once_cannot_be_kept(tmp_path: Path):
    runner = InferenceRunner(Asks(), DUMMY, iter(documents(2)), tmp_path / "o.jsonl", version="1", ordered=True)
    with pytest.raises(ConfigError, match="the order of standard input, a pipe or an iterator"):
        await runner.run()
    assert list(tmp_path.iterdir()) == []
    runner = InferenceRunner(Asks(), DUMMY, documents(30), tmp_path / "o.jsonl", version="1", ordered=True)
    await runner.run()
    assert [row["id"] for row in rows(tmp_path / "o.jsonl")] == [f"d{n}" for n in range(30)]


async def test_ranks_side_by_side_have_a_context_each(tmp_path: Path):
    numbers = iter((1, 2))

    @asynccontextmanager
    async def context():
        number = next(numbers)
        await trio.sleep(0.05)
        yield {"number": number}

    runner = InferenceRunner(
        Asks(), DUMMY, documents(40), f"{tmp_path}/o/", version="1", shared_context=context, max_concurrent_documents=1
    )
    async with trio.open_nursery() as nursery:
        for rank in range(2):
            nursery.start_soon(runner.run, rank, 2)
    found = {
        path.name[:10]: {row["metadata"]["rollout_results"][0]["number"] for row in rows(path)}
        for path in (tmp_path / "o").iterdir()
    }
    assert sorted(map(sorted, found.values())) == [[1], [2]]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, LookupError])
async def test_errors_out_of_a_contexts_nursery_come_out_as_themselves(tmp_path: Path, kind):
    @asynccontextmanager
    async def context():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
            yield {}

    async def rollout(document: Document, generate: Any) -> Any:
        raise kind

    runner = InferenceRunner(rollout, DUMMY, documents(1), tmp_path / "o.jsonl", version="1", shared_context=context)
    with pytest.raises(RunStopped if kind is LookupError else kind):
        await runner.run()


async def test_shards_that_wait_for_their_engines_agree_on_the_job(tmp_path: Path):
    out = f"{tmp_path}/o/"
    slow = InferenceConfig("dummy", "dummy", model_kwargs={"load_time": 0.3})
    first = InferenceRunner(Asks(), slow, documents(40), out, version="1")
    second = InferenceRunner(Asks(), slow, documents(40), out, version="2")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.run, 0, 2)
        with trio.fail_after(10):
            while not (tmp_path / "o.run" / "manifest.json").exists():
                await trio.sleep(0.01)
        with pytest.raises(ConfigError, match=r'- rollout = "1"\n.*[+] rollout = "2"'):
            await second.run(1, 2)
        # One that fails before its first row does not take away what the other one has noted.
        broken = InferenceRunner(
            Asks(),
            slow,
            documents(40),
            out,
            version="1",
            shared_context=lambda: 3,
        )
        with pytest.raises(ConfigError, match="shared_context gives"):
            await broken.run(1, 2)
        assert (tmp_path / "o.run" / "manifest.json").exists()
        nursery.start_soon(first.run, 1, 2)
    assert sorted(row["id"] for row in rows(tmp_path / "o")) == sorted(f"d{n}" for n in range(40))


def test_shards_that_begin_in_the_same_moment_agree_on_the_job(tmp_path: Path):
    count = 6
    begin, end = threading.Barrier(count), threading.Barrier(count)

    def work(rank: int) -> str:
        directory = RunDirectory(tmp_path / "o.run", Manifest({"version": rank}), rank=rank, world_size=count)
        begin.wait()
        with ExitStack() as stack:
            try:
                stack.enter_context(directory)
            except ConfigError as error:
                return error.message
            finally:
                end.wait()
            (tmp_path / "o.run" / "journal" / "x").mkdir(parents=True)
            (tmp_path / "o.run" / "journal" / "x" / "000001.journal").touch()
        return ""

    with ThreadPoolExecutor(count) as threads:
        refused = sorted(threads.map(work, range(count)))
    assert refused.count("") == 1
    assert all("was started with other settings" in message for message in refused[1:])
    assert {each.name for each in (tmp_path / "o.run").iterdir()} == {"journal", "manifest.json", "owners"}


def test_a_shard_that_finishes_while_another_begins_has_begun(tmp_path: Path, monkeypatch):
    def finish_meanwhile(self: RunLock) -> bool:
        (tmp_path / "journal" / "x").mkdir(parents=True)
        (tmp_path / "journal" / "x" / "000001.journal").touch()
        return True

    Manifest({"version": 1}).save(tmp_path)
    monkeypatch.setattr(RunLock, "is_alone", finish_meanwhile)
    with pytest.raises(ConfigError, match="other settings"), RunDirectory(tmp_path, Manifest({"version": 2})):
        pass


async def _stale_cancellation(document: Document) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep(1)
        except trio.Cancelled as error:
            kept = error
    raise kept


async def _stale_cancellation_in_a_nursery(document: Document) -> None:
    try:
        await _stale_cancellation(document)
    except trio.Cancelled as error:
        raise BaseExceptionGroup("", [error]) from None


async def _error_without_a_text(document: Document) -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise LookupError

    raise Silent


async def _document_in_pieces(document: Document) -> int:
    document.metadata = None
    return 1


async def _result_without_a_text(document: Document) -> Any:
    class Silent:
        def __repr__(self) -> str:
            raise LookupError

    return Silent()


@pytest.mark.parametrize("rollouts", [1, 2])
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (_stale_cancellation, "trio.Cancelled, and nobody"),
        (_stale_cancellation_in_a_nursery, "trio.Cancelled, and nobody"),
        (_error_without_a_text, "Silent"),
        (_document_in_pieces, "TypeError"),
        (_result_without_a_text, "LookupError"),
    ],
)
async def test_odd_mistakes_of_a_rollout_are_its_documents_failure(tmp_path: Path, mistake, words, rollouts):
    async def rollout(document: Document, generate: Any) -> Any:
        result = await generate(ask(document.text))
        return await mistake(document) if document.id == "d3" else result

    out = tmp_path / "o.jsonl"
    runner = InferenceRunner(rollout, DUMMY, documents(6), out, on_error="skip", rollouts_per_document=rollouts)
    summary = await runner.run()
    assert summary.is_complete
    assert (summary.ok, summary.failed, summary.removed) == (5, 1, 0)
    [failure] = rows(tmp_path / "o.jsonl.run" / "errors.jsonl")
    assert failure["custom_id"] == "d3"
    assert words in failure["error"]["message"]


async def test_versions_and_budgets_may_be_numbers(tmp_path: Path):
    def fail(document: Document) -> None:
        raise LookupError

    runner = InferenceRunner(
        Asks(fail),
        DUMMY,
        documents(20),
        tmp_path / "o.jsonl",
        on_error="skip",
        max_failures=3,
        version=2,
    )
    with pytest.raises(RunStopped, match="and 3 rows may"):
        await runner.run()


async def test_documents_that_are_none_are_told_and_the_rest_goes_on(tmp_path: Path):
    odd = [
        Document("a", "1"),
        Document("b", "2", media=["x"]),
        Document("c", "3", media=3),
        Document("d", "4"),
    ]
    for retried in (False, True):
        runner = InferenceRunner(
            Asks(), DUMMY, odd, tmp_path / "o.jsonl", on_error="skip", version="1", retry_failed=retried
        )
        summary = await runner.run()
        assert (summary.failed, summary.is_complete) == (2, True)
        assert sorted(row["id"] for row in rows(tmp_path / "o.jsonl")) == ["1", "4"]
        errors = [each["error"] for each in rows(tmp_path / "o.jsonl.run" / "errors.jsonl")]
        assert {error["code"] for error in errors} == {"InvalidRow"}
        assert {error["message"].partition(":")[0] for error in errors} == {"document 2", "document 3"}


async def test_the_text_of_documents_is_where_documents_have_it(tmp_path: Path):
    rollout = Asks()
    runner = InferenceRunner(rollout, DUMMY, documents(3), tmp_path / "o.jsonl", version="1", text_field="body")
    assert (await runner.run()).ok == 3


def test_shards_that_begin_together_are_not_held_to_an_attempt_that_came_to_nothing(tmp_path: Path, monkeypatch):
    count = 4
    locked = threading.Barrier(count, timeout=5)

    @contextmanager
    def when_all_are_there(path: Path) -> Iterator[None]:
        locked.wait()
        with one_at_a_time(path):
            yield

    monkeypatch.setattr("trinfer.batch.run_directory.one_at_a_time", when_all_are_there)
    Manifest({"version": "killed before its first row"}).save(tmp_path)

    def work(rank: int) -> str:
        try:
            with RunDirectory(tmp_path, Manifest({"version": 2}), rank=rank, world_size=count):
                return ""
        except ConfigError as error:
            locked.abort()
            return error.message

    with ThreadPoolExecutor(count) as threads:
        assert list(threads.map(work, range(count))) == [""] * count
