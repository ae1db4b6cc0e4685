"""vLLM: ``vllm serve``.

Checked against the argument parser of vLLM 0.32. It serves on unix sockets (``--uds``), reads its API key from
``VLLM_API_KEY``, and spans nodes with ``--nnodes``: the same command on each, and ``--headless`` on all but the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trinfer.engines.address import Address
from trinfer.engines.arguments import options
from trinfer.errors import ConfigError
from trinfer.server.base import InferenceServer
from trinfer.server.node import SINGLE, Node

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["VLLMServer", "vllm_command", "vllm_environment"]

# Part of the grace period that is left to vLLM's own shutdown after it has let requests finish.
SHUTDOWN_MARGIN = 3.0  # seconds

RESERVED = {
    "model": "model_name_or_path",
    "host": "host",
    "port": "transport",
    "uds": "transport",
    "api-key": "api_key",
    "max-model-len": "model_max_context",
    "trust-remote-code": "trust_remote_code",
    "tensor-parallel-size": "tp",
    "pipeline-parallel-size": "pp",
    "data-parallel-size": "dp",
    "served-model-name": "served_model_name",
    "nnodes": "the environment of the nodes (DATATROVE_NODE_RANK, SLURM, torchrun)",
    "node-rank": "the environment of the nodes (DATATROVE_NODE_RANK, SLURM, torchrun)",
    "master-addr": "the environment of the nodes (DATATROVE_NODE_IPS, SLURM, torchrun)",
    "master-port": "master_port",
    "headless": "the environment of the nodes (DATATROVE_NODE_RANK, SLURM, torchrun)",
}


def vllm_command(config: InferenceConfig, address: Address, node: Node = SINGLE) -> list[str]:
    """The command line of one node."""
    command = [config.executable or "vllm", "serve", config.model_name_or_path]
    if not node.is_worker:
        if address.uds is not None:
            command += ["--uds", address.uds]
        else:
            command += ["--host", address.host, "--port", str(address.port)]
    command += ["--max-model-len", str(config.model_max_context)]
    if config.served_model_name:
        command += ["--served-model-name", config.served_model_name]
    for option, size in (
        ("--tensor-parallel-size", config.tp),
        ("--pipeline-parallel-size", config.pp),
        ("--data-parallel-size", config.dp),
    ):
        if size > 1:
            command += [option, str(size)]
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    if node.count > 1:
        if node.master_addr is None:
            raise ConfigError(
                "nothing tells the address of the engine's first node",
                advice="set DATATROVE_NODE_IPS, or start under srun or torchrun",
            )
        command += ["--nnodes", str(node.count), "--node-rank", str(node.rank)]
        command += ["--master-addr", node.master_addr, "--master-port", str(config.master_port)]
        if node.is_worker:
            command.append("--headless")
    defaults = {"uvicorn-log-level": "warning", "disable-uvicorn-access-log": True}
    if config.shutdown_grace_sec > SHUTDOWN_MARGIN:
        # vLLM's own default is 0: requests in flight are dropped at once.
        defaults["shutdown-timeout"] = int(config.shutdown_grace_sec - SHUTDOWN_MARGIN)
    given = options(config.model_kwargs, reserved=RESERVED)
    chosen = {key.replace("_", "-") for key in config.model_kwargs}
    return [*command, *options({k: v for k, v in defaults.items() if k not in chosen}, reserved={}), *given]


def vllm_environment(config: InferenceConfig) -> dict[str, str]:
    """What does not belong in a command line."""
    return {"VLLM_API_KEY": config.api_key} if config.api_key else {}


class VLLMServer(InferenceServer):
    """A vLLM engine; on a unix socket unless ``transport="tcp"``."""

    engine_name: ClassVar[str] = "vllm"
    supports_uds: ClassVar[bool] = True

    async def start_server(self) -> trio.Process | None:
        command = vllm_command(self.config, Address(self.host, self.port, self.uds), self.node)
        return await self.spawn(command, env=vllm_environment(self.config))

    async def monitor_health(self) -> None:
        await self.engine_exit()
