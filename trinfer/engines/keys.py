"""Which API key an engine will ask for.

Rule: client and engine must agree on it. An engine also reads its variable where it was set for other reasons, in the
shell or in ``config.env``; a client that did not know would be refused for ever.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["engine_key"]


def engine_key(config: InferenceConfig, variable: str) -> str | None:
    """The configured key, else the one in the engine's own variable as the engine will see it; None without any."""
    return config.api_key or config.env.get(variable, os.environ.get(variable)) or None
