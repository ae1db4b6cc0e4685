"""``trinfer ps``: the engines of this user on this host."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from trinfer.cli import exit_codes

if TYPE_CHECKING:
    import argparse

__all__ = ["add_parser", "execute", "servers"]

COLUMNS = ("server", "engine", "model", "state", "owner", "pids", "gpu_mib", "address", "up", "restarts", "requests")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer ps``."""
    parser = commands.add_parser(
        "ps",
        help="show the engines of this user on this host",
        description="Shows the engines of this user on this host, and whether their owners are alive. Those whose "
        "owner is gone are ended by `trinfer gc`.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.set_defaults(execute=execute)


def servers() -> list[dict[str, Any]]:
    """Every server that has an entry in the ledger, or processes, oldest first.

    Raises:
        ConfigError: the runtime folder is not private.
    """
    from dataclasses import asdict

    from trinfer.process.gpus import gpu_users
    from trinfer.process.identity import find_trees, is_alive
    from trinfer.process.ledger import entries, living

    found: dict[str, dict[str, Any]] = {}
    known = []  # also processes that have lost their environment: vLLM's, which hold the GPUs
    for path, entry in entries():
        found[entry.server] = {**asdict(entry), "pids": [], "entry": str(path)}
        known.append((entry.run, entry.server, living(entry)))
    for tree in find_trees(known):
        nothing_known = {"server": tree.server, "run": tree.run, "engine": "", "model": "", "state": "unknown"}
        found.setdefault(tree.server, nothing_known)["pids"] = sorted(tree.pids)
    memory = {user.pid: user.used for user in gpu_users() or ()}
    for server in found.values():
        alive = is_alive(server["run"])
        server["owner_pid"] = int(server["run"].partition("-")[0]) if server["run"][:1].isdigit() else 0
        server["owner_alive"] = alive
        server["gpu_mib"] = sum(memory.get(pid, 0) for pid in server["pids"])
    return sorted(found.values(), key=lambda server: server.get("started_at", 0.0))


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    found = servers()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return exit_codes.OK
    if not found:
        print("no engines")
        return exit_codes.OK
    rows = [[name.upper().replace("_", " ") for name in COLUMNS]]
    rows += [[_cell(server, name) for name in COLUMNS] for server in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return exit_codes.OK


def _cell(server: dict[str, Any], name: str) -> str:
    match name:
        case "engine":
            return f"{server['engine']}:{server['rank']}" if "rank" in server else "-"
        case "owner":
            words = {True: "", False: " (gone)", None: " (unknown)"}
            return f"{server['owner_pid']}{words[server['owner_alive']]}"
        case "pids":
            return str(len(server["pids"]))
        case "up":
            return _duration(time.time() - server["started_at"]) if "started_at" in server else "-"
        case _:
            return str(server.get(name, "")) or "-"


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
