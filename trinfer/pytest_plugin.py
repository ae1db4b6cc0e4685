"""Fixtures for tests of code that uses trinfer: engines that are real processes, cheap, and fail to order.

Known to pytest by its entry point. Tests that enter a server run under trio, with pytest-trio or anyio's plugin:

.. code-block:: python

    async def test_my_rollout(fake_engine, trinfer_server):
        async with trinfer_server(fake_engine(crash_at_request=3, only_first=1)) as server:
            ...  # the engine crashes once, and is started again
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from trinfer.config import InferenceConfig
    from trinfer.server.base import InferenceServer

__all__ = ["fake_engine", "trinfer_server"]

PATIENCE = 5.0  # seconds that the last processes may take to go
# Quick to fail: a test shall not wait for what takes minutes in life.
IMPATIENT = {
    "shutdown_grace_sec": 1.0,
    "request_timeout": 30.0,
    "restart_backoff_sec": 0.05,
    "restart_backoff_max_sec": 0.5,
    "stall_timeout": 2.0,
}


@pytest.fixture
def fake_engine(tmp_path: Path) -> Callable[..., InferenceConfig]:
    """``fake_engine(**faults, config={...})``: the config of a fake engine.

    The faults are the fields of `trinfer.testing.faults.Faults`; ``config`` are fields of `trinfer.InferenceConfig`.
    """
    made = 0

    def make(*, config: dict[str, Any] | None = None, **faults: Any) -> InferenceConfig:  # noqa: ANN401  # see Faults
        nonlocal made
        from trinfer.config import InferenceConfig
        from trinfer.testing.faults import Faults

        made += 1
        command = Faults(**faults).command(str(tmp_path / f"starts-of-fake-engine-{made}"))
        return InferenceConfig(
            "custom", "fake", model_kwargs={"server_command": command}, **{**IMPATIENT, **(config or {})}
        )

    return make


@pytest.fixture
def trinfer_server() -> Generator[Callable[..., InferenceServer], None, None]:
    """``async with trinfer_server(config, rank=0) as server``; the test fails if processes of it are left."""
    from trinfer.engines.create import create_server
    from trinfer.process.identity import SERVER_VARIABLE, find_trees
    from trinfer.process.spawn import CLEAN_LOOKS

    made: list[InferenceServer] = []

    def make(config: InferenceConfig, rank: int = 0) -> InferenceServer:
        made.append(create_server(config, rank))
        return made[-1]

    yield make
    ids = {server.marker[SERVER_VARIABLE] for server in made}
    give_up = time.monotonic() + PATIENCE
    clean = 0
    while ids:
        left = [pid for tree in find_trees() if tree.server in ids for pid in tree.pids]
        clean = 0 if left else clean + 1
        if clean == CLEAN_LOOKS:
            break
        if left and time.monotonic() > give_up:
            pytest.fail(f"processes of a server are left: {left} (own pid {os.getpid()})", pytrace=False)
        time.sleep(0.02)
