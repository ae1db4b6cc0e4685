"""Any program that serves ``/v1/models`` and completions: a Python script, or a command template.

- ``model_kwargs={"server_script": "serve.py"}``: ``python serve.py --port PORT`` and the other keys as options, as
  datatrove does it, spelled as they are written. ``executable`` is the interpreter.
- ``model_kwargs={"server_command": "my-engine -m {model} -p {port}"}``: a template, as text or as a list of words, with
  ``{port}`` or ``{uds}``, ``{host}`` and ``{model}``. No shell. With ``{uds}`` the engine gets a unix socket.
- ``executable`` alone: called with ``--port`` and the options.

A configured ``api_key`` stands in the engine's environment, as ``TRINFER_API_KEY``.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines.address import Address
from trinfer.engines.arguments import options
from trinfer.errors import ConfigError
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["CustomServer", "custom_command"]

RESERVED = {"port": "transport", "server-script": "server_script once", "server-command": "server_command once"}
# Not "{}" and not "{"a": 1}": words of JSON go through as they are.
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
KNOWN = ("port", "host", "uds", "model")
KEY_VARIABLE = "TRINFER_API_KEY"


def template_words(config: InferenceConfig) -> list[str] | None:
    """The words of ``server_command``; None where there is none.

    Raises:
        ConfigError: it is no text or list of texts, empty, has an unknown placeholder, has not one of {port} and {uds},
            or stands beside server_script.
    """
    template = config.model_kwargs.get("server_command")
    if template is None:
        return None
    if "server_script" in config.model_kwargs:
        raise ConfigError("InferenceConfig.model_kwargs has server_script and server_command: allowed is one of them")
    try:
        words = shlex.split(template) if isinstance(template, str) else list(template)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"InferenceConfig.model_kwargs['server_command'] cannot be split: {error}") from error
    if not words or not all(isinstance(word, str) for word in words):
        raise ConfigError("InferenceConfig.model_kwargs['server_command']: allowed is a text or a list of texts")
    for word in words:
        for name in PLACEHOLDER.findall(word):
            if name not in KNOWN:
                raise ConfigError(
                    f"InferenceConfig.model_kwargs['server_command'] has {{{name}}}: allowed are "
                    + ", ".join(f"{{{known}}}" for known in KNOWN)
                )
    used = {name for word in words for name in PLACEHOLDER.findall(word)}
    if len(used & {"port", "uds"}) != 1:
        raise ConfigError(
            "InferenceConfig.model_kwargs['server_command']: allowed is exactly one of {port} and {uds}, which tell "
            "the engine where to listen"
        )
    return words


def script_word(config: InferenceConfig) -> str | None:
    """The path in ``server_script``; None where there is none.

    Raises:
        ConfigError: it is no path.
    """
    script = config.model_kwargs.get("server_script")
    if script is not None and (not isinstance(script, str | os.PathLike) or not os.fspath(script)):
        raise ConfigError(f"InferenceConfig.model_kwargs['server_script'] is {script!r}: allowed is a path")
    return None if script is None else str(script)


def custom_command(config: InferenceConfig, address: Address) -> list[str]:
    """The command line.

    Raises:
        ConfigError: see `template_words`.
    """
    words = template_words(config)
    rest = {k: v for k, v in config.model_kwargs.items() if k not in {"server_script", "server_command"}}
    arguments = options(rest, reserved=RESERVED, verbatim=True)
    if words is not None:
        values = {
            "port": str(address.port or ""),
            "host": address.host,
            "uds": address.uds or "",
            "model": config.model_name_or_path,
        }
        return [PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in words] + arguments
    script = script_word(config)
    program = config.executable or sys.executable
    command = [program] if script is None else [program, script]
    if address.port is not None:  # a worker node has none
        command += ["--port", str(address.port)]
    return [*command, *arguments]


class CustomServer(InferenceServer):
    """A script or program of the user's own."""

    engine_name: ClassVar[str] = "custom"

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        words = template_words(config)
        uses_uds = words is not None and any("{uds}" in word for word in words)
        if config.transport == "uds" and not uses_uds:
            raise ConfigError(
                'InferenceConfig.transport is "uds", but server_command has no {uds}: allowed is "tcp" or "auto"'
            )
        if config.transport == "tcp" and uses_uds:
            raise ConfigError(
                'InferenceConfig.transport is "tcp", but server_command has {uds}: allowed is "uds" or "auto"'
            )
        # Whatever would fail at each start shall fail here.
        custom_command(config, Address(config.host, 1, "/"))
        super().__init__(config, rank)
        self._uses_uds = uses_uds

    @property
    def can_serve_uds(self) -> bool:
        return self._uses_uds

    async def start_server(self) -> trio.Process | None:
        # A Python program behind a pipe would keep its words to itself until 8 KiB have come together.
        env = {} if "PYTHONUNBUFFERED" in self.config.env else {"PYTHONUNBUFFERED": "1"}
        if self.config.api_key is not None and KEY_VARIABLE not in self.config.env:
            env[KEY_VARIABLE] = self.config.api_key
        return await self.spawn(custom_command(self.config, Address(self.host, self.port, self.uds)), env=env)

    async def monitor_health(self) -> None:
        await self.engine_exit()
