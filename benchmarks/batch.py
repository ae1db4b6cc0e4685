"""Figures of the durable batch: documents a second, memory, resume, and how busy the engine is kept.

python -m benchmarks.batch [rates] [slow-disk] [memory] [slots] [--datatrove PYTHON] [--rounds N] [--documents N] …

The stand-in for the engine is nginx, which answers at once, so that the figures are those of the runner alone; for
``slots`` it is `benchmarks.simulated_engine`. ``--datatrove`` names the Python of an environment made by
``pip install 'datatrove[io]==0.10.0' aiofiles aiosqlite orjson xxhash httpx``. (Without one of these, datatrove drops
every document with a warning, which is noticed here.)

``rates`` are those of the disk of this machine. What durability costs depends on how long a sync of it takes, and cloud
disks and file servers take milliseconds; ``slow-disk`` makes each sync of both programs so much slower (slow_sync.c).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import nginx
from benchmarks.figures import Figures

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS = Path(__file__).parent / "batch_workers.py"
PARTS = ("rates", "slow-disk", "memory", "slots")
SYNC_MS = (2, 5)
IN_FLIGHT = (64, 500)
PROMPT_BYTES = 1000


def documents(path: Path, count: int) -> None:
    """Documents of about 1 KB, each of its own."""
    filler = "w" * (PROMPT_BYTES - 12)
    with open(path, "w") as file:
        file.writelines(f'{{"id": "{n}", "text": "{n:011d} {filler}"}}\n' for n in range(count))


def work(
    python: str,
    worker: str,
    folder: Path,
    source: Path,
    url: str,
    *,
    durable: bool = True,
    in_flight: int = 64,
    env: dict[str, str] | None = None,
) -> dict[str, float]:
    """One run in a process of its own; a run directory that is there is continued."""
    output = folder / ("out" if worker == "datatrove" else "out.jsonl")
    job = {"input": str(source), "output": str(output), "url": url, "durable": durable, "in_flight": in_flight}
    done = subprocess.run(
        [python, str(WORKERS), worker, json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise SystemExit(f"{worker} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trinfer-batch-") as name:
        yield Path(name)


def count_lines(path: Path) -> int:
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    total = 0
    for file in files:
        with open(file, "rb") as lines:
            total += sum(1 for _ in lines)
    return total


def rates(figures: Figures, rounds: int, count: int, datatrove: str | None) -> None:
    """Documents a second of trinfer and of datatrove, durable and not, in turn."""
    kinds = [("trinfer", False, count), ("trinfer", True, count)]
    if datatrove is not None:
        kinds += [("datatrove", False, count // 4), ("datatrove", True, count // 20)]
    sources = {}
    with nginx.running() as server, fresh() as inputs:
        for size in {size for _, _, size in kinds}:
            sources[size] = inputs / f"documents-{size}.jsonl"
            documents(sources[size], size)
        for in_flight in IN_FLIGHT:
            found: dict[tuple[str, bool], list[float]] = {}
            for _ in range(rounds):
                for worker, durable, size in kinds:
                    with fresh() as folder:
                        python = datatrove if worker == "datatrove" else sys.executable
                        assert python is not None
                        result = work(
                            python, worker, folder, sources[size], server.url, durable=durable, in_flight=in_flight
                        )
                        out = folder / ("out" if worker == "datatrove" else "out.jsonl")
                        assert count_lines(out) == size, f"{worker} wrote {count_lines(out)} of {size}"
                        found.setdefault((worker, durable), []).append(size / result["seconds"])
            for (worker, durable), values in found.items():
                how = "durable" if durable else "not durable"
                figures.add(f"{worker}, {how}, {in_flight} in flight", values, "docs/s")
            own = [100 * a / b for a, b in zip(found["trinfer", True], found["trinfer", False], strict=True)]
            figures.add(f"durable of not durable, {in_flight} in flight", own, "%", ">= 80")
            if datatrove is not None:
                for durable, bound in ((False, ">= 4"), (True, ">= 50")):
                    ratio = [a / b for a, b in zip(found["trinfer", durable], found["datatrove", durable], strict=True)]
                    how = "durable" if durable else "not durable"
                    figures.add(f"trinfer to datatrove, {how}, {in_flight} in flight", ratio, "times", bound)


def sync_time() -> list[float]:
    """Milliseconds that this machine's disk takes to sync 4 KiB."""
    took = []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(200):
            os.write(file.fileno(), bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(1e3 * (time.perf_counter() - began))
    return took


def slow_disk(figures: Figures, rounds: int, count: int, datatrove: str | None) -> None:
    """The durable modes on a disk whose syncs take milliseconds."""
    figures.add("a sync of this disk", sync_time(), "ms")
    with nginx.running() as server, fresh() as inputs:
        library = inputs / "slow_sync.so"
        source = Path(__file__).with_name("slow_sync.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
        sizes = {"trinfer": count, "datatrove": max(50, count // 80)}
        for worker, size in sizes.items():
            documents(inputs / f"{worker}.jsonl", size)
        for more in SYNC_MS:
            env = {"LD_PRELOAD": str(library), "SLOW_SYNC_US": str(1000 * more)}
            found: dict[str, list[float]] = {}
            for _ in range(rounds):
                for worker, size in sizes.items():
                    python = sys.executable if worker == "trinfer" else datatrove
                    if python is None:
                        continue
                    with fresh() as folder:
                        result = work(python, worker, folder, inputs / f"{worker}.jsonl", server.url, env=env)
                        found.setdefault(worker, []).append(size / result["seconds"])
            for worker, values in found.items():
                figures.add(f"{worker}, durable, syncs {more} ms slower", values, "docs/s")
            if "datatrove" in found:
                ratio = [a / b for a, b in zip(found["trinfer"], found["datatrove"], strict=True)]
                figures.add(f"trinfer to datatrove, durable, syncs {more} ms slower", ratio, "times", ">= 50")


def memory(figures: Figures, million: int) -> None:
    """Peak memory by the number of documents, and how soon a run that was complete is taken up again."""
    small = million // 100
    with nginx.running() as server, fresh() as inputs:
        documents(inputs / "small.jsonl", small)
        documents(inputs / "million.jsonl", million)
        with fresh() as folder:
            little = work(sys.executable, "trinfer", folder, inputs / "small.jsonl", server.url, in_flight=500)
        with fresh() as folder:
            source = inputs / "million.jsonl"
            much = work(sys.executable, "trinfer", folder, source, server.url, in_flight=500)
            figures.add(f"peak RSS, {small:,} documents", [little["rss_mib"]], "MiB")
            figures.add(f"peak RSS, {million:,} documents", [much["rss_mib"]], "MiB")
            figures.add("peak RSS of many to that of few", [much["rss_mib"] / little["rss_mib"]], "times", "<= 1.1")
            figures.add(f"{million:,} documents, durable", [million / much["seconds"]], "docs/s")
            again = work(sys.executable, "trinfer", folder, source, server.url, in_flight=500)
            figures.add("the same call again: it is finished", [again["all_seconds"]], "s", "<= 15")
            # As after a kill between the last row and the output's last rename.
            (folder / "out.jsonl").unlink()
            shutil.rmtree(folder / "out.jsonl.run" / "finished")
            again = work(sys.executable, "trinfer", folder, source, server.url, in_flight=500)
            figures.add("resume: every row done, nothing published", [again["all_seconds"]], "s", "<= 15")
            figures.add("peak RSS of that resume", [again["rss_mib"]], "MiB")
            assert count_lines(folder / "out.jsonl") == million


@contextlib.contextmanager
def simulated(slots: int) -> Iterator[str]:
    """The simulated engine in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.simulated_engine", "--slots", str(slots)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=WORKERS.parent.parent,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def slots(figures: Figures, rounds: int, count: int) -> None:
    """How much of an engine's capacity is used: in the steady state, and over the whole life of the program."""
    size = 256
    with fresh() as inputs:
        documents(inputs / "documents.jsonl", count)
        for worker, name in (("trinfer", "trinfer, durable"), ("read-first", "reading everything first")):
            steady: list[float] = []
            overall: list[float] = []
            for _ in range(rounds):
                with fresh() as folder, simulated(size) as url:
                    done = work(sys.executable, worker, folder, inputs / "documents.jsonl", url, in_flight=2 * size)
                    with urllib.request.urlopen(url + "/slots") as answer:
                        told = json.load(answer)
                    assert told["served"] == count, told
                    (begin, before), (end, after) = told["full"], told["last_arrival"]
                    steady.append(100 * (after - before) / (size * (end - begin)))
                    overall.append(100 * told["integral"] / (size * (done["ended"] - done["started"])))
            bound = ">= 99" if worker == "trinfer" else ""
            figures.add(f"{name}: slots busy in the steady state", steady, "%", bound)
            figures.add(f"{name}: slots busy from start to end", overall, "%")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    add("--datatrove", metavar="PYTHON", help="compare with the datatrove of this Python")
    add("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    add("--documents", type=int, default=40_000, help="of a measurement of rates (default: %(default)s)")
    add("--million", type=int, default=1_000_000, help="documents of the long run (default: %(default)s)")
    add("--slot-documents", type=int, default=20_000, help="for the simulated engine (default: %(default)s)")
    add("--json", metavar="FILE", help="write the figures here too")
    add("--markdown", metavar="FILE", help="write a page of the documentation here")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed are {', '.join(PARTS)}")
    parts = arguments.parts or PARTS
    figures = Figures()
    figures.head()
    if "rates" in parts:
        rates(figures, arguments.rounds, arguments.documents, arguments.datatrove)
    if "slow-disk" in parts:
        slow_disk(figures, arguments.rounds, arguments.documents, arguments.datatrove)
    if "slots" in parts:
        slots(figures, arguments.rounds, arguments.slot_documents)
    if "memory" in parts:
        memory(figures, arguments.million)
    figures.save(arguments, "The durable batch", "benchmarks.batch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
