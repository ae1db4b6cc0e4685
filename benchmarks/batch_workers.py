"""The programs that `benchmarks.batch` measures, each in a process of its own, with one line of JSON as its result.

python benchmarks/batch_workers.py trinfer|datatrove|read-first '{"input": …, "output": …, "url": …, …}'

Standard library only, up to the function that runs: datatrove lives in an environment without trinfer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

began: list[float] = []  # when the first document was begun


async def rollout(document: Any, generate: Any) -> Any:
    """One generation for each document, as in most runs."""
    if not began:
        began.append(time.monotonic())
    return await generate({"messages": [{"role": "user", "content": document.text}], "max_tokens": 100})


def trinfer(job: dict[str, Any]) -> None:
    """`InferenceRunner` from a file to a file."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from trinfer import InferenceConfig, InferenceRunner

    config = InferenceConfig("endpoint", "fixed", endpoint_url=job["url"])
    runner = InferenceRunner(
        rollout,
        config,
        job["input"],
        job["output"],
        durable=job["durable"],
        overwrite=True,
        max_concurrent_generations=job["in_flight"],
        version="benchmark",
    )
    runner.run_sync()


def datatrove(job: dict[str, Any]) -> None:
    """datatrove's runner with the same rollout, from a file to files."""
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    durable = {}
    name = "${rank}.jsonl"
    if job["durable"]:
        durable = {"checkpoints_local_dir": job["output"] + ".checkpoints", "records_per_chunk": 6000}
        name = "${rank}_${chunk_index}.jsonl"
    runner = InferenceRunner(
        rollout,
        InferenceConfig(
            "endpoint",
            "fixed",
            endpoint_url=job["url"],
            max_concurrent_generations=job["in_flight"],
            metric_interval=3600,
        ),
        JsonlWriter(job["output"], output_filename=name, compression=None),
        **durable,
    )
    folder, name = os.path.split(job["input"])
    runner.run(JsonlReader(folder, glob_pattern=name, doc_progress=False).run(), 0, 1)


def read_first(job: dict[str, Any]) -> None:
    """Read everything, ask everything, write everything in the end: what ``vllm run-batch`` does, over HTTP."""
    import asyncio

    import aiohttp

    async def main() -> list[Any]:
        connector = aiohttp.TCPConnector(limit=job["in_flight"])
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

            async def ask(text: str) -> Any:
                body = {"messages": [{"role": "user", "content": text}], "max_tokens": 100, "model": "fixed"}
                async with session.post(job["url"] + "/v1/chat/completions", json=body) as response:
                    return await response.json()

            return await asyncio.gather(*[ask(document["text"]) for document in documents])

    began.append(time.monotonic())
    with open(job["input"], "rb") as file:
        documents = [json.loads(line) for line in file]
    answers = asyncio.run(main())
    with open(job["output"], "w") as out:
        pairs = zip(documents, answers, strict=True)
        out.writelines(json.dumps({**document, "answer": answer}) + "\n" for document, answer in pairs)


def peak_mib() -> float:
    """Of this program. ``ru_maxrss`` would count what its parent had when it was forked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    started = time.monotonic()
    work = json.loads(sys.argv[2])
    {"trinfer": trinfer, "datatrove": datatrove, "read-first": read_first}[sys.argv[1]](work)
    ended = time.monotonic()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "seconds": ended - (began[0] if began else started),
        "all_seconds": ended - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "rss_mib": peak_mib(),
    }
    print(json.dumps({**figures, "started": started, "ended": ended}))
