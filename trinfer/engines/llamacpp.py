"""llama.cpp: ``llama-server`` where it is installed, else the same C++ server inside the Python package xllamacpp.

Both answer 503 while the model loads, and read their key from the environment (``LLAMA_API_KEY``).

Rule: ``model_max_context`` is what one request may use. llama.cpp divides ``--ctx-size`` among its slots, so it is
given the product, and the number of slots explicitly: by default it would let four slots share one context, and break
off requests when they outgrow it together. ``model_kwargs={"parallel": 1}`` takes the least memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines import llamacpp_runner
from trinfer.engines.address import Address
from trinfer.engines.arguments import chosen_names, options
from trinfer.engines.keys import engine_key
from trinfer.engines.limits import refuse_parallel_sizes
from trinfer.errors import ConfigError, ServerError
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["LlamaCppServer", "llamacpp_command", "llamacpp_environment", "llamacpp_program"]

KEY_VARIABLE = "LLAMA_API_KEY"
SLOTS = 4  # requests worked on at once, llama-server's own number
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

RESERVED = {
    "model": "model_name_or_path",
    "m": "model_name_or_path",
    "hf-repo": "model_name_or_path",
    "alias": "served_model_name",
    "host": "host",
    "port": "transport",
    "ctx-size": "model_max_context",
    "c": "model_max_context",
    "n-ctx": "model_max_context",
    "n-parallel": "parallel (model_kwargs)",
    "api-key": "api_key",
}


def llamacpp_program(config: InferenceConfig) -> list[str]:
    """What to execute: ``executable``, ``llama-server`` on PATH, or our runner for xllamacpp.

    Raises:
        ServerError: none is there.
    """
    program = config.executable or shutil.which("llama-server", path=config.env.get("PATH"))
    if program is not None:
        return [program]
    if importlib.util.find_spec("xllamacpp") is not None:
        # -P: the runner's folder holds modules that are called like packages.
        return [sys.executable, "-P", str(Path(llamacpp_runner.__file__))]
    raise ServerError(
        "llama.cpp is not installed: there is neither llama-server on PATH nor the package xllamacpp",
        advice="install it: pip install 'trinfer[llamacpp]', or set InferenceConfig.executable",
    )


def llamacpp_command(config: InferenceConfig, address: Address, program: list[str], *, cpus: int = 2) -> list[str]:
    """The command line; the same options for both programs.

    Args:
        program: see `llamacpp_program`.
        cpus: logical CPUs that this process may use. Half of them become threads: llama.cpp's threads spin, and more
            than there are cores slow small models down by orders of magnitude.

    Raises:
        ConfigError: ``model_kwargs`` has what trinfer sets itself, or no number of slots.
    """
    slots = config.model_kwargs.get("parallel")
    slots = SLOTS if slots is None else slots
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise ConfigError(f"InferenceConfig.model_kwargs['parallel'] is {slots!r}: allowed is an integer >= 1")
    name = config.model_name_or_path
    is_hub_name = HUB_NAME.fullmatch(name) and not name.endswith(".gguf") and not Path(name).exists()
    command = [*program, "--hf-repo" if is_hub_name else "--model", name, "--alias", config.model]
    command += ["--host", address.host, "--port", str(address.port)]
    command += ["--ctx-size", str(config.model_max_context * slots)]
    chosen = chosen_names(config.model_kwargs)
    if "parallel" not in chosen:
        command += ["--parallel", str(slots)]
    if "threads" not in chosen:
        command += ["--threads", str(max(1, cpus // 2))]
    # llama-server looks for the whole word among its options, and so knows no "--name=value".
    return [*command, *options(config.model_kwargs, reserved=RESERVED, joined=False)]


def llamacpp_environment(config: InferenceConfig) -> dict[str, str]:
    """What does not belong in a command line."""
    return {KEY_VARIABLE: config.api_key} if config.api_key else {}


class LlamaCppServer(InferenceServer):
    """A llama.cpp engine for one GGUF file, or a model of the hub where ``llama-server`` is installed.

    It uses the GPUs that it sees by itself; tp, pp and dp are not for it.
    """

    engine_name: ClassVar[str] = "llamacpp"
    spans_nodes: ClassVar[bool] = False

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        refuse_parallel_sizes(config, "llama.cpp spreads a model over the GPUs in `gpus` by itself")
        super().__init__(config, rank)

    @property
    def program(self) -> str | None:
        return llamacpp_program(self.config)[0]

    async def start_server(self) -> trio.Process | None:
        command = llamacpp_command(
            self.config,
            Address(self.host, self.port),
            llamacpp_program(self.config),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2,
        )
        return await self.spawn(command, env=llamacpp_environment(self.config))

    async def monitor_health(self) -> None:
        await self.engine_exit()

    def _api_key(self) -> str | None:
        return engine_key(self.config, KEY_VARIABLE)
