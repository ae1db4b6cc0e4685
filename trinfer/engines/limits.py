"""What an engine cannot do is refused when its server is made, not ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["refuse_parallel_sizes"]


def refuse_parallel_sizes(config: InferenceConfig, advice: str) -> None:
    """For engines without tensor, pipeline and data parallelism of trinfer's kind.

    Raises:
        ConfigError: tp, pp or dp is not 1.
    """
    for name in ("tp", "pp", "dp"):
        if getattr(config, name) != 1:
            raise ConfigError(
                f"InferenceConfig.{name} is {getattr(config, name)}: allowed with server_type "
                f"{config.server_type!r} is 1",
                advice=advice,
            )
