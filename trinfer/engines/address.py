"""Where an engine shall listen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Address"]


@dataclass(frozen=True)
class Address:
    """A port on a host, or the path of a unix socket; neither on the worker nodes of an engine."""

    host: str
    port: int | None = None
    uds: str | None = None
