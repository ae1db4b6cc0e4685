"""Where huggingface_hub keeps models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["hub_cache", "is_offline"]


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The hub's cache folder, by the variables of huggingface_hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    caches = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(environ.get("HF_HOME") or caches / "huggingface").expanduser() / "hub"


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the hub may not be asked."""
    return environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
