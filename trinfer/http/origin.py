"""Where requests go: scheme, host and port, or a unix socket, and the path under which the API stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote, urlsplit

__all__ = ["Origin"]

DEFAULT_PORTS = {"http": 80, "https": 443}


def _quoted(path: str) -> str:
    """A base path as it can stand in a request: what is quoted already stays as it is."""
    return quote(path, safe="/%:@!$&'()*+,;=~").rstrip("/")


@dataclass(frozen=True)
class Origin:
    """One server, as a client sees it.

    Attributes:
        scheme: "http" or "https".
        host: name or address; "localhost" for a unix socket, where it only fills the Host header.
        port: TCP port.
        uds: path of the unix socket, or None for TCP.
        base_path: prefix of every path, without a slash at its end.
    """

    scheme: str
    host: str
    port: int
    uds: str | None = None
    base_path: str = ""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``http://host:port/base``, or ``http+unix://QUOTED-PATH/base``.

        Raises:
            ValueError: it is none of both.
        """
        parts = urlsplit(url)
        if parts.scheme == "http+unix":
            path = unquote(parts.netloc)
            if not path:
                raise ValueError(f"{url!r} names no unix socket")
            return cls("http", "localhost", 80, path, _quoted(parts.path))
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            raise ValueError(f"{url!r} is no http or https URL")
        try:
            # As it goes over the wire (IDNA); an address of IPv6 is no name.
            host = parts.hostname if ":" in parts.hostname else parts.hostname.encode("idna").decode()
        except UnicodeError as error:
            raise ValueError(f"{url!r} holds no proper host name: {error}") from error
        return cls(parts.scheme, host, parts.port or DEFAULT_PORTS[parts.scheme], None, _quoted(parts.path))

    @classmethod
    def unix(cls, path: str) -> Self:
        """A server on a unix socket."""
        return cls("http", "localhost", 80, path)

    @property
    def url(self) -> str:
        """What `from_url` reads."""
        if self.uds is not None:
            return f"http+unix://{quote(self.uds, safe='')}{self.base_path}"
        return f"{self.scheme}://{self.authority}{self.base_path}"

    @property
    def authority(self) -> str:
        """The Host header: host, and port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def is_tls(self) -> bool:
        return self.scheme == "https"
