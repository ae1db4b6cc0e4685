"""Configs for the fake engine, a real process with faults to order."""

from __future__ import annotations

import sys
from typing import Any

from trinfer import InferenceConfig
from trinfer.testing import fake_engine

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def fake_command(*options: str, address: tuple[str, ...] = ("--port", "{port}")) -> list[str]:
    return [sys.executable, "-S", "-E", fake_engine.__file__, *address, *options]


def fake_config(*options: str, address: tuple[str, ...] = ("--port", "{port}"), **settings: Any) -> InferenceConfig:
    """A custom server that runs the fake engine; impatient, so that tests are quick."""
    settings = {
        "shutdown_grace_sec": 1.0,
        "server_start_max_retries": 0,
        "max_restarts": 0,
        "request_timeout": 20.0,
        **settings,
    }
    return InferenceConfig(
        "custom", "fake", model_kwargs={"server_command": fake_command(*options, address=address)}, **settings
    )


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]
