"""SGLang: ``sglang.launch_server``, through a small launcher that keeps the API key out of the command line.

Checked against ``ServerArgs`` of SGLang 0.5.23. It serves on no unix socket, and takes its key by ``--api-key`` only:
anybody on the machine could read it there, so the launcher adds it from the environment, inside the process.
``launch_server`` and not ``sglang serve``, which newer versions recommend: both run the same code, the first exists in
all versions, and it never takes a model for a diffusion model by looking it up on the hub. Ranks above 0 of a
multi-node engine ignore SIGTERM; the guard ends them after the grace period.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines import sglang_launcher
from trinfer.engines.address import Address
from trinfer.engines.arguments import chosen_names, options
from trinfer.errors import ConfigError
from trinfer.process.addresses import PortLease, lease_port
from trinfer.server.base import InferenceServer
from trinfer.server.node import SINGLE, Node

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["SGLangServer", "sglang_command", "sglang_environment"]

_NODES = "the environment of the nodes (DATATROVE_NODE_RANK and DATATROVE_NODE_IPS, SLURM or torchrun)"
RESERVED = {
    "model-path": "model_name_or_path",
    "model": "model_name_or_path",
    "host": "host",
    "port": "transport",
    "api-key": "api_key",
    "context-length": "model_max_context",
    "trust-remote-code": "trust_remote_code",
    "tp-size": "tp",
    "tensor-parallel-size": "tp",
    "tp": "tp",
    "pp-size": "pp",
    "pipeline-parallel-size": "pp",
    "pp": "pp",
    "dp-size": "dp",
    "data-parallel-size": "dp",
    "dp": "dp",
    "served-model-name": "served_model_name",
    "nnodes": _NODES,
    "node-rank": _NODES,
    "dist-init-addr": f"master_port, and {_NODES}",
    "nccl-init-addr": f"master_port, and {_NODES}",
}


def sglang_command(
    config: InferenceConfig, address: Address, node: Node = SINGLE, *, nccl_port: int | None = None
) -> list[str]:
    """The command line of one node.

    Args:
        nccl_port: a leased port for the engine's processes to meet, on a single node; two engines on one machine
            would otherwise take the same.

    Raises:
        ConfigError: ``model_kwargs`` has what trinfer sets itself, or nothing tells where the first node is.
    """
    chosen = chosen_names(config.model_kwargs)
    command = [config.executable or sys.executable, str(Path(sglang_launcher.__file__))]
    command += ["--model-path", config.model_name_or_path, "--context-length", str(config.model_max_context)]
    if not node.is_worker:
        command += ["--host", address.host, "--port", str(address.port)]
    if config.served_model_name:
        command += ["--served-model-name", config.served_model_name]
    for option, size in (("--tp-size", config.tp), ("--pp-size", config.pp), ("--dp-size", config.dp)):
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
        first = f"[{node.master_addr}]" if ":" in node.master_addr else node.master_addr
        command += ["--dist-init-addr", f"{first}:{config.master_port}"]
    elif nccl_port is not None and "nccl-port" not in chosen:
        command += ["--nccl-port", str(nccl_port)]
    if "log-level-http" not in chosen:
        # A line per request would drown the log, and the news in it.
        command += ["--log-level-http", "warning"]
    return [*command, *options(config.model_kwargs, reserved=RESERVED, abbreviates=True)]


def sglang_environment(config: InferenceConfig) -> dict[str, str]:
    """What does not belong in a command line."""
    return {sglang_launcher.KEY_VARIABLE: config.api_key} if config.api_key else {}


class SGLangServer(InferenceServer):
    """An SGLang engine. ``executable`` is the Python interpreter of its environment."""

    engine_name: ClassVar[str] = "sglang"

    @property
    def program(self) -> str | None:
        return self.config.executable or sys.executable

    async def start_server(self) -> trio.Process | None:
        lease: PortLease | None = None
        if self.node.count == 1:
            lease = lease_port(host=self.host, rank=self.rank, avoid=() if self.port is None else (self.port,))
            self.release_with_attempt(lease.release)
        command = sglang_command(
            self.config,
            Address(self.host, self.port),
            self.node,
            nccl_port=lease.port if lease else None,
        )
        return await self.spawn(command, env=sglang_environment(self.config))

    async def monitor_health(self) -> None:
        await self.engine_exit()
