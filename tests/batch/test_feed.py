"""The feed alone: what a thread that is abandoned in the middle of reading may still touch."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from trinfer.batch.feed import Feed
from trinfer.batch.jobs import GenerationJob
from trinfer.batch.prompts import PromptOptions, Prompts
from trinfer.data.records import Raw
from trinfer.durable.index import Index

if TYPE_CHECKING:
    from pathlib import Path


def test_a_reader_that_nobody_waits_for_leaves_the_index_alone(tmp_path: Path):
    """Its descriptor may be another file's by then."""
    waits, goes_on = threading.Event(), threading.Event()

    def records():
        yield Raw("f:1", 20, b'{"prompt": "a"}')
        waits.set()
        assert goes_on.wait(10)
        yield Raw("f:2", 20, b'{"prompt": "b"}')

    index = Index(tmp_path)
    number = index._fd
    feed = Feed(records(), GenerationJob(Prompts(PromptOptions())), index)
    ended: list[object] = []

    def read() -> None:
        try:
            ended.append(feed.next_batch())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=read, daemon=True)  # without the rule, it would never end
    thread.start()
    assert waits.wait(10)
    feed.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.dup2(other, number)  # the index is closed, and its number is given away
    goes_on.set()
    thread.join(10)
    assert not thread.is_alive()
    os.close(other)
    index.close()
    assert ended == [[]]
    assert (tmp_path / "other").read_bytes() == b""
