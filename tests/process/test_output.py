"""The engine's output: any length, any bytes, any rate, any disk."""

from __future__ import annotations

import itertools
import stat
import time
from typing import TYPE_CHECKING

import trio
from hypothesis import example, given
from hypothesis import strategies as st

from trinfer.process.output import BUFFER, EngineLog

if TYPE_CHECKING:
    from pathlib import Path

MB = 2**20
BYTES = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\r\n", b"\xe2\x96", b"\xff", b"x" * 30, b"\n\n"])).map(
    b"".join
)


def ring(**kwargs) -> EngineLog:
    return EngineLog(None, max_bytes=MB, **{"ring_lines": 5, "max_line": 20, **kwargs})


@given(BYTES, st.lists(st.integers(0, 200)))
@example(b"ab\r\n\rc", [3])
@example(b"a\rb", [2])
def test_how_output_is_cut_into_chunks_makes_no_difference(data, cuts):
    whole, parts = ring(), ring()
    whole.feed(data)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        parts.feed(data[start:end])
    assert parts.tail() == whole.tail()


@given(BYTES)
def test_the_ring_holds_the_last_lines(data):
    log = ring(max_line=1000, ring_lines=1000)
    log.feed(data)
    expected = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in data.split(b"\n")]
    assert list(log.tail(10**6)) == [line.decode("utf-8", "replace") for line in expected if line.strip()]


@given(st.lists(st.binary(max_size=300)))
def test_memory_is_bounded_for_any_output(chunks):
    log = ring()
    for chunk in chunks:
        log.feed(chunk)
    assert len(log._partial) <= 20
    assert len(log._ring) <= 5
    assert all(len(line) <= 20 + 40 for line in log._ring)


def test_a_long_line_is_cut_and_says_so():
    log = ring()
    for _ in range(10):
        log.feed(b"x" * 100_000)
    log.feed(b"\nnext\n")
    assert log.tail() == ("x" * 20 + " ... [999980 more bytes]", "next")


def test_of_a_progress_bar_only_the_last_state_is_kept():
    log = ring(max_line=100)
    for percent in range(101):
        log.feed(b"\rLoading: %3d%%" % percent)
    assert log.tail() == ("Loading: 100%",)
    log.feed(b"\ndone\n")
    assert log.tail() == ("Loading: 100%", "done")


def test_the_beginning_of_another_attempt_forgets_the_one_before():
    log = ring()
    log.feed(b"old\nhalf")
    log.begin("start attempt 2")
    log.feed(b"new\n")
    assert log.tail() == ("new",)


def test_listeners_get_complete_lines_of_text():
    log, heard = ring(), []
    remove = log.listen(heard.append)
    for chunk in (b"one\ntw", b"o \xe2\x96", b"\x8f\nthree\r", b"four"):
        log.feed(chunk)
    assert "\n".join(heard).split("\n") == ["one", "two \u258f", "three"]
    remove()
    remove()
    log.feed(b"\nfive\n")
    assert "five" not in heard


def test_a_listener_is_told_of_a_line_without_end():
    log, heard = ring(), []
    log.listen(heard.append)
    for _ in range(20):
        log.feed(b"y" * 65536)
    assert sum(map(len, heard)) >= 15 * 65536


# -- the file -------------------------------------------------------------------------------------------------------


async def written(log: EngineLog, *chunks: bytes) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        for chunk in chunks:
            log.feed(chunk)
            await trio.sleep(0)
        with trio.fail_after(10):
            await log.aclose()


async def test_the_file_holds_everything_and_is_private(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "server.log"
    await written(EngineLog(path, max_bytes=MB), b"one\n", b"two", b"\xff\n")
    await written(EngineLog(path, max_bytes=MB), b"three\n")
    assert path.read_bytes() == b"one\ntwo\xff\nthree\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_files_are_rotated_and_the_oldest_goes(tmp_path: Path):
    path = tmp_path / "server.log"
    for number in range(6):
        await written(EngineLog(path, max_bytes=4096, keep=2), b"%d" % number * 3000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["server.log", "server.log.1", "server.log.2"]
    assert path.read_bytes() == b"5" * 3000
    assert (tmp_path / "server.log.2").read_bytes() == b"3" * 3000


async def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path, caplog):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "server.log").symlink_to(target)
    await written(EngineLog(tmp_path / "server.log", max_bytes=MB), b"gone\n")
    assert target.read_text() == "mine"
    assert "cannot be written" in caplog.text


async def test_a_slow_disk_costs_lines_and_not_memory_or_time(tmp_path: Path, monkeypatch):
    log = EngineLog(tmp_path / "server.log", max_bytes=10**12)
    chunk = b"z" * 65535 + b"\n"
    write = log._write
    monkeypatch.setattr(log, "_write", lambda path, data: (time.sleep(0.3), write(path, data)))
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        log.feed(b"first\n")
        await trio.sleep(0.1)  # the writer is in its slow write now
        began = trio.current_time()
        for _ in range(2 * BUFFER // len(chunk)):
            log.feed(chunk)
        assert trio.current_time() - began < 0.25
        assert log._waiting_bytes <= BUFFER
        with trio.fail_after(10):
            await log.aclose()
    text = (tmp_path / "server.log").read_bytes()
    assert b"bytes of output were dropped" in text
    assert len(text) <= BUFFER + 1000


async def test_a_full_disk_is_told_once_and_does_not_stop_anything(small_disk: Path, caplog):
    log = EngineLog(small_disk / "server.log", max_bytes=MB)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        for _ in range(5):
            log.feed(b"f" * 50_000 + b"\n")
            await trio.sleep(0.05)
        with trio.fail_after(5):
            await log.aclose()
    assert caplog.text.count("No space left on device") == 1
    assert log.tail()[-1].startswith("fff")


async def test_a_flood_does_not_hold_up_the_loop():
    log = EngineLog(None, max_bytes=MB)
    chunk = (b"flood " + b"." * 90 + b"\n") * 675
    log.listen(lambda text: None).__call__()  # listened during the start only
    began = time.perf_counter()
    for _ in range(1600):
        log.feed(chunk)
    seconds = time.perf_counter() - began
    # 105 MB: a tenth of a second each is what the pump may take of a second at 100 MB/s, and far from it here.
    assert seconds < 1.0
