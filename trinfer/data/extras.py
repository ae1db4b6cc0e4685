"""Libraries that are only needed for some formats: loaded on use, with an error that names what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trinfer.errors import ConfigError

__all__ = ["load"]

EXTRAS = {
    "pyarrow": "parquet",
    "pyarrow.parquet": "parquet",
    "zstandard": "zstd",
    "datasets": "hf",
    "fsspec": "remote",
    "jinja2": "templates",
}


def load(module: str, purpose: str) -> Any:  # noqa: ANN401  # a module, of which type checkers know nothing
    """Import an optional library.

    Raises:
        ConfigError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs {name}, which cannot be imported: {error}",
            advice=f"pip install 'trinfer[{EXTRAS[module]}]'",
        ) from error
