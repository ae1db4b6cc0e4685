"""Where an engine shall listen, and under which address other nodes reach this one."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import trio

__all__ = ["Address", "own_address"]

RESOLVING = 10.0  # seconds for the name of the first node
ANY_PORT = 9  # "discard": nothing is sent there


@dataclass(frozen=True)
class Address:
    """A port on a host, or the path of a unix socket; neither on the worker nodes of an engine."""

    host: str
    port: int | None = None
    uds: str | None = None


async def own_address(peer: str) -> str | None:
    """The address of this machine on the way to ``peer``, a name or an address; None where that cannot be told.

    Nothing is sent: a connected datagram socket only asks the routing table. A loopback address is no answer, since
    other nodes cannot use it; Debian gives a machine's own name 127.0.1.1.

    Cancelled: nothing is left behind.
    """
    try:
        with trio.fail_after(RESOLVING):
            found = await trio.socket.getaddrinfo(peer, ANY_PORT, type=trio.socket.SOCK_DGRAM)
        for family, kind, protocol, _, target in found:
            with trio.socket.socket(family, kind, protocol) as probe:
                await probe.connect(target)
                own = str(probe.getsockname()[0]).partition("%")[0]
            if not ipaddress.ip_address(own).is_loopback:
                return own
    except (OSError, trio.TooSlowError, ValueError):
        return None
    return None
