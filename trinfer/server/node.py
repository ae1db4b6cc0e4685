"""Which node of a multi-node engine this process is, as the environment tells.

Rule: an explicit word wins. datatrove's own variables are written for exactly this purpose and always count. Those of
SLURM and torchrun also stand in jobs whose nodes work independently, so they count only for engines that can span
nodes, and ``InferenceConfig.multi_node=False`` silences them all.

Sources: datatrove ``DATATROVE_NODE_RANK`` (-1 single node, 0 master, > 0 worker) and ``DATATROVE_NODE_IPS``; srun(1)
``SLURM_NODEID``, ``SLURM_STEP_NUM_NODES``, ``SLURM_STEP_NODELIST``; torchrun ``GROUP_RANK``, ``GROUP_WORLD_SIZE``,
``MASTER_ADDR``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SINGLE", "Node", "find_node", "first_host"]


@dataclass(frozen=True)
class Node:
    """One node of an engine.

    Attributes:
        rank: 0 is the master, which serves requests; higher ranks are workers.
        count: nodes that the engine spans; 1 where it spans none.
        master_addr: host name or address of rank 0; None where the environment does not tell.
    """

    rank: int = 0
    count: int = 1
    master_addr: str | None = None

    @property
    def is_worker(self) -> bool:
        return self.rank > 0


SINGLE = Node()


def find_node(environ: Mapping[str, str], *, multi_node: bool | None, spans_nodes: bool) -> Node:
    """Read the node from the environment.

    Args:
        environ: usually ``os.environ``.
        multi_node: the config's word: False is always a single node, True makes a missing answer an error.
        spans_nodes: whether this kind of engine can span nodes.

    Raises:
        ConfigError: a variable holds no integer, or multi_node is True and nothing tells the rank.
    """
    if multi_node is False:
        return SINGLE
    node = _from_datatrove(environ)
    if node is None and spans_nodes:
        node = _from_slurm(environ) or _from_torchrun(environ)
    if node is None:
        if multi_node:
            raise ConfigError(
                "InferenceConfig.multi_node is True, but nothing tells this node's rank",
                advice="set DATATROVE_NODE_RANK and DATATROVE_NODE_IPS, or start under srun or torchrun",
            )
        return SINGLE
    return node


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text[:40]!r}: allowed is an integer") from None


def _from_datatrove(environ: Mapping[str, str]) -> Node | None:
    rank = _integer(environ, "DATATROVE_NODE_RANK")
    if rank is None:
        return None
    if rank < 0:
        return SINGLE
    hosts = [host.strip() for host in environ.get("DATATROVE_NODE_IPS", "").split(",") if host.strip()]
    return Node(rank, max(len(hosts), rank + 1), hosts[0] if hosts else None)


def _from_slurm(environ: Mapping[str, str]) -> Node | None:
    # The step's size, not the job's: a batch script on a job of several nodes is itself a single process.
    count = _integer(environ, "SLURM_STEP_NUM_NODES") or _integer(environ, "SLURM_NNODES") or 1
    rank = _integer(environ, "SLURM_NODEID")
    if rank is None or count < 2:
        return None
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    return Node(rank, count, first_host(nodelist))


def _from_torchrun(environ: Mapping[str, str]) -> Node | None:
    rank, count = _integer(environ, "GROUP_RANK"), _integer(environ, "GROUP_WORLD_SIZE") or 1
    if rank is None or count < 2:
        return None
    return Node(rank, count, environ.get("MASTER_ADDR") or None)


def first_host(nodelist: str) -> str | None:
    """The first host of a SLURM node list: ``gpu[03-07,12],cpu1`` -> ``gpu03``. None for an empty list."""
    match = re.match(r"\s*([^,\[\s]+)(?:\[([^\]]*)\](\S*?)(?=,|$))?", nodelist)
    if match is None:
        return None
    prefix, ranges, suffix = match.groups()
    if ranges is None:
        return prefix
    return prefix + re.split(r"[,-]", ranges, maxsplit=1)[0] + suffix
