"""From ``model_kwargs`` to command-line options, by datatrove's rule and without its traps.

Rule: an option that trinfer sets itself is refused with the name of the config field to use, since two values of one
option are a bug that shows late. Names may be written with underscores or dashes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["options"]


def options(model_kwargs: Mapping[str, Any], *, reserved: Mapping[str, str]) -> list[str]:
    """Options for the command line: True is ``--k``, False is ``--no-k``, None is left out, the rest is ``--k=v``.

    Lists and dicts are written as JSON, which is what engines that take them read.

    Args:
        model_kwargs: as in the config.
        reserved: names (with dashes) that the engine's own code sets, with the config field to use instead.

    Raises:
        ConfigError: a reserved name, one name twice, or a value that cannot be written down.
    """
    arguments: list[str] = []
    seen: dict[str, str] = {}
    for key, value in model_kwargs.items():
        name = key.replace("_", "-")
        if name in reserved:
            raise ConfigError(
                f"InferenceConfig.model_kwargs has {key!r}, which trinfer sets itself: allowed are other options",
                advice=f"use {reserved[name]}",
            )
        if name in seen:
            raise ConfigError(f"InferenceConfig.model_kwargs has both {seen[name]!r} and {key!r}: allowed is one")
        seen[name] = key
        if value is None:
            continue
        if value is True:
            arguments.append(f"--{name}")
        elif value is False:
            arguments.append(f"--no-{name}")
        else:
            arguments.append(f"--{name}={_text(key, value)}")
    return arguments


def _text(key: str, value: Any) -> str:  # noqa: ANN401  # the user's value, whatever it is
    if isinstance(value, list | tuple | dict):
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"InferenceConfig.model_kwargs[{key!r}] cannot be written as JSON ({error}): allowed are plain values"
            ) from error
    if isinstance(value, str | int | float):
        text = str(value)
        if "\0" in text:
            raise ConfigError(f"InferenceConfig.model_kwargs[{key!r}] holds a NUL: allowed is text without")
        return text
    raise ConfigError(
        f"InferenceConfig.model_kwargs[{key!r}] is a {type(value).__name__}: allowed are texts, numbers, booleans, "
        "None, lists and dicts"
    )
