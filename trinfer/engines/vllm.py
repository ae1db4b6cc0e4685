"""vLLM: ``vllm serve``.

Checked against vLLM 0.32. It serves on unix sockets (``--uds``), reads its API key from ``VLLM_API_KEY``, and spans
nodes with ``--nnodes``: the same command on each, and ``--headless`` on all but the first, which serves. Of the nodes,
each must announce an address that the others reach: ``VLLM_HOST_IP``, since its own guess takes the default route.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from trinfer.engines.address import Address, own_address
from trinfer.engines.arguments import chosen_names, option_name, options
from trinfer.engines.keys import engine_key
from trinfer.errors import ConfigError
from trinfer.process.addresses import lease_socket
from trinfer.server.base import InferenceServer
from trinfer.server.node import SINGLE, Node

if TYPE_CHECKING:
    from collections.abc import Mapping

    import trio

    from trinfer.config import InferenceConfig

__all__ = ["VLLMServer", "vllm_command", "vllm_environment"]

PROGRAM = "vllm"
KEY_VARIABLE = "VLLM_API_KEY"
ADDRESS_VARIABLE = "VLLM_HOST_IP"
SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"  # folder of the sockets between vLLM's own processes: see vllm/envs.py
SOCKET_NAME = str(uuid.UUID(int=0))  # as long as the names that vLLM gives them
# Connectors give their sockets longer names, of a host or of two uuids, which fit into /tmp and hardly anywhere else.
NAMING_SOCKETS = ("kv-transfer-config", "ec-transfer-config", "kv-offloading-backend")
# With Ray, vLLM copies its variables to the processes on other nodes, which have no such folder.
RAY_OPTIONS = ("distributed-executor-backend", "data-parallel-backend")
# Part of the grace period that is left to vLLM's own shutdown after it has let requests finish.
SHUTDOWN_MARGIN = 3.0  # seconds

_NODES = "the environment of the nodes (DATATROVE_NODE_RANK and DATATROVE_NODE_IPS, SLURM or torchrun)"
RESERVED = {
    "model": "model_name_or_path",
    "host": "host",
    "port": "transport",
    "uds": "transport",
    "api-key": "api_key",
    "max-model-len": "model_max_context",
    "trust-remote-code": "trust_remote_code",
    "tensor-parallel-size": "tp",
    "tp": "tp",
    "pipeline-parallel-size": "pp",
    "pp": "pp",
    "data-parallel-size": "dp",
    "dp": "dp",
    "served-model-name": "served_model_name",
    "nnodes": _NODES,
    "node-rank": _NODES,
    "master-addr": _NODES,
    "master-port": "master_port",
    "headless": _NODES,
}
# These belong to the process that serves; a headless node refuses them.
SERVING_ONLY = frozenset({"api-server-count"})


def vllm_command(config: InferenceConfig, address: Address, node: Node = SINGLE) -> list[str]:
    """The command line of one node.

    Raises:
        ConfigError: ``model_kwargs`` has what trinfer sets itself, or the nodes cannot share the engine.
    """
    command = [config.executable or PROGRAM, "serve", config.model_name_or_path]
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
        command += _node_options(config, node)
    given = config.model_kwargs
    chosen = chosen_names(given)
    if node.is_worker:
        given = {key: value for key, value in given.items() if key.replace("_", "-") not in SERVING_ONLY}
    defaults = {name: value for name, value in _defaults(config).items() if name not in chosen}
    return [*command, *options(defaults, reserved={}), *options(given, reserved=RESERVED, abbreviates=True)]


def _node_options(config: InferenceConfig, node: Node) -> list[str]:
    if node.master_addr is None:
        raise ConfigError(
            "nothing tells the address of the engine's first node",
            advice="set DATATROVE_NODE_IPS, or start under srun or torchrun",
        )
    world = config.tp * config.pp * config.dp
    if world % node.count:
        raise ConfigError(
            f"InferenceConfig: tp x pp x dp is {world}, which {node.count} nodes cannot share evenly: allowed is a "
            f"multiple of {node.count}",
            advice="change tp, pp or dp, or set multi_node=False for an engine per node",
        )
    command = ["--nnodes", str(node.count), "--node-rank", str(node.rank)]
    command += ["--master-addr", node.master_addr, "--master-port", str(config.master_port)]
    return [*command, "--headless"] if node.is_worker else command


def _defaults(config: InferenceConfig) -> dict[str, Any]:
    # A line per request would drown the log, and the news in it.
    defaults: dict[str, Any] = {"disable-uvicorn-access-log": True}
    seconds = int(config.shutdown_grace_sec - SHUTDOWN_MARGIN)
    if seconds > 0:
        # vLLM's own default is 0: requests in flight are dropped at once.
        defaults["shutdown-timeout"] = seconds
    return defaults


def vllm_environment(
    config: InferenceConfig, *, host_ip: str | None = None, sockets: str | None = None
) -> dict[str, str]:
    """What does not belong in a command line.

    Args:
        host_ip: address of this node for the other nodes; None for a single node.
        sockets: folder for the sockets of vLLM's processes; None for the folder of temporary files, in which those of
            a killed engine stay for ever.
    """
    environment = {KEY_VARIABLE: config.api_key} if config.api_key else {}
    if host_ip is not None and ADDRESS_VARIABLE not in config.env:
        environment[ADDRESS_VARIABLE] = host_ip
    if sockets is not None and SOCKETS_VARIABLE not in config.env:
        environment[SOCKETS_VARIABLE] = sockets
    return environment


def private_sockets(config: InferenceConfig) -> bool:
    """Whether the sockets of vLLM's processes can be in a folder of their own, as far as the options tell."""
    for key, value in config.model_kwargs.items():
        head = option_name(key).partition(".")[0]
        # The parser takes the beginning of a name for the whole.
        if value is not None and any(name.startswith(head) for name in NAMING_SOCKETS):
            return False
        if value == "ray" and any(name.startswith(head) for name in RAY_OPTIONS):
            return False
    return SOCKETS_VARIABLE not in config.env


class VLLMServer(InferenceServer):
    """A vLLM engine; on a unix socket unless ``transport="tcp"``."""

    engine_name: ClassVar[str] = "vllm"
    supports_uds: ClassVar[bool] = True

    @property
    def program(self) -> str | None:
        return self.config.executable or PROGRAM

    async def start_server(self) -> trio.Process | None:
        command = vllm_command(self.config, Address(self.host, self.port, self.uds), self.node)
        host_ip = await self._host_ip(os.environ)
        return await self.spawn(
            command, env=vllm_environment(self.config, host_ip=host_ip, sockets=self._sockets(os.environ))
        )

    def _sockets(self, environ: Mapping[str, str]) -> str | None:
        """A folder that goes with this start attempt; None where the user names one, or it could not serve."""
        if SOCKETS_VARIABLE in environ or not private_sockets(self.config):
            return None
        try:
            lease = lease_socket(SOCKET_NAME)
        except (ConfigError, OSError):  # paths in it were too long, or it cannot be made: no reason not to start
            return None
        self.release_with_attempt(lease.release)
        return os.path.dirname(lease.path)

    async def _host_ip(self, environ: Mapping[str, str]) -> str | None:
        if self.node.count == 1 or self.node.master_addr is None or ADDRESS_VARIABLE in environ:
            return None
        return await own_address(self.node.master_addr)

    async def monitor_health(self) -> None:
        await self.engine_exit()

    def _api_key(self) -> str | None:
        return engine_key(self.config, KEY_VARIABLE)
