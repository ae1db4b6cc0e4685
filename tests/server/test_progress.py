"""What an engine's output tells about its start."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.server.progress import StartProgress

LINES = {
    "download": [
        "Fetching 12 files:   0%|          | 0/12 [00:00<?, ?it/s]",
        "model-00001-of-00004.safetensors:  11%|█         | 545M/4.98G [00:05<00:39, 112MB/s]",
        "Downloading shards:  25%|██▌       | 1/4 [00:30<01:30, 30.00s/it]",
    ],
    "load weights": [
        "INFO 11-23 22:00:01 [gpu_model_runner.py:1801] Starting to load model Qwen/Qwen3-8B...",
        "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01,  1.70it/s]",
        "[2026-11-23 22:00:01] Load weight begin. avail mem=138.21 GB",
        "load_tensors: loading model tensors, this can take a while... (mmap = true)",
    ],
    "compile": [
        "INFO 11-23 22:00:20 [backends.py:430] Using cache directory: ... for vLLM's torch.compile",
        "INFO 11-23 22:00:31 [backends.py:441] Dynamo bytecode transform time: 7.28 s",
    ],
    "capture graphs": [
        "Capturing CUDA graph shapes:  64%|██████▍   | 43/67 [00:13<00:07,  3.18it/s]",
        "Capturing batches (bs=160 avail_mem=12.29 GB):   4%|▍         | 1/23 [00:00<00:21,  1.01it/s]",
    ],
    "warm up": ["common_init_from_params: warming up the model with an empty run - please wait ..."],
}


@pytest.mark.parametrize(("phase", "line"), [(phase, line) for phase, lines in LINES.items() for line in lines])
async def test_phases(phase, line):
    progress = StartProgress()
    begun = progress.hear(line)
    assert progress.phase == phase
    assert begun is not None
    assert progress.hear(line) is None  # it begins only once
    assert progress.describe().startswith(phase)


async def test_a_whole_start_in_order(autojump_clock):
    import trio

    progress = StartProgress()
    assert progress.describe() == ""
    for lines in LINES.values():
        await trio.sleep(10)
        progress.hear("\n".join(lines))
    assert [phase.name for phase in progress.phases] == list(LINES)
    assert [phase.began for phase in progress.phases] == pytest.approx([10, 20, 30, 40, 50])


@pytest.mark.parametrize(
    ("lines", "moves"),
    [
        (["a:  10%|█ | 1/10 [00:01<00:09]", "a:  20%|██ | 2/10 [00:02<00:08]"], True),
        (["x 1.5 GB", "x 1.6 GB"], True),
        (["x 900 MB", "x 1.1 GB"], True),
        (["shard 1/4", "shard 2/4"], True),
        (["shard 2/4", "shard 2/4"], False),
        (["shard 2/4", "shard 1/4"], False),
        (["2026-11-23 22:00:01 waiting", "2026-11-23 22:00:02 waiting"], False),
        (["INFO 11-23 22:00:01.100 3/8 are there", "INFO 11-23 22:00:02.200 3/8 are there"], False),
        (["2026/11/23 waiting", "2026/11/24 waiting"], False),
        (["waited 10 seconds", "waited 20 seconds"], False),
        (["connecting to 10.0.0.1:8000", "connecting to 10.0.0.2:8000"], False),
    ],
)
async def test_progress_is_an_amount_that_grows(lines, moves, autojump_clock):
    import trio

    progress = StartProgress()
    progress.hear(lines[0])
    before = progress.moved_at
    await trio.sleep(5)
    progress.hear(lines[1])
    assert (progress.moved_at != before) == moves
    assert progress.heard_at == trio.current_time()


@given(st.lists(st.text(), max_size=5))
async def test_any_text_is_heard(texts):
    progress = StartProgress()
    for text in texts:
        progress.hear(text)


async def test_a_flood_is_heard_in_passing():
    progress = StartProgress()
    line = "flood 17% of 3/4 and 5 GB of words in a line that is neither long nor short " * 2 + "\n"
    chunk = line * (64 * 1024 // len(line))
    began = time.perf_counter()
    for _ in range(200):
        progress.hear(chunk)
    rate = 200 * len(chunk) / 1e6 / (time.perf_counter() - began)
    assert rate > 100, f"{rate:.0f} MB/s"
