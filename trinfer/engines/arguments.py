"""From ``model_kwargs`` to command-line options, by datatrove's rule and without its traps.

Rule: an option that trinfer sets itself is refused with the name of the config field to use, since two values of one
option are a bug that shows late; the same goes for beginnings of its name, which argparse takes for the whole. Names
may be written with underscores or dashes. After the first dot they are left as they are: vLLM's
``--compilation-config.max_capture_size`` names a key of a dict there.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["chosen_names", "option_name", "options"]

# The same as in the config, which checks its keys when it is made: these functions stand on their own.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def option_name(key: str) -> str:
    """The option's name without its leading dashes.

    Raises:
        ConfigError: the key is not the name of an option.
    """
    if not _NAME.fullmatch(key):
        raise ConfigError(
            f"InferenceConfig.model_kwargs has the key {key!r}: allowed is an option name without leading dashes, such "
            "as max_num_seqs or max-num-seqs"
        )
    head, dot, tail = key.partition(".")
    return head.replace("_", "-") + dot + tail


def chosen_names(model_kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Names of the options that the user has chosen, so that trinfer's defaults for them stay out."""
    return frozenset(option_name(key) for key, value in model_kwargs.items() if value is not None)


def options(
    model_kwargs: Mapping[str, Any],
    *,
    reserved: Mapping[str, str],
    abbreviates: bool = False,
    verbatim: bool = False,
    joined: bool = True,
) -> list[str]:
    """Options for the command line: True is ``--k``, False is ``--no-k``, None is left out, the rest is ``--k=v``.

    Lists and dicts are written as JSON, which is what engines that take them read.

    Args:
        model_kwargs: as in the config.
        reserved: names (with dashes) that the engine's own code sets, with the config field to use instead.
        abbreviates: the engine's parser takes a beginning for the whole name (argparse does): beginnings of reserved
            names are refused too.
        verbatim: names keep their underscores, for programs of the user's own.
        joined: False writes ``--k v``, for programs that do not know ``--k=v``.

    Raises:
        ConfigError: a bad or reserved name, one name twice, or a value that cannot be written down.
    """
    arguments: list[str] = []
    seen: dict[str, str] = {}
    for key, value in model_kwargs.items():
        name = option_name(key)
        _refuse_reserved(key, name, reserved, abbreviates=abbreviates)
        if name in seen:
            raise ConfigError(f"InferenceConfig.model_kwargs has both {seen[name]!r} and {key!r}: allowed is one")
        seen[name] = key
        if verbatim:
            name = key
        if value is None:
            continue
        if value is True:
            arguments.append(f"--{name}")
        elif value is False:
            arguments.append(f"--no-{name}")
        elif joined:
            arguments.append(f"--{name}={_text(key, value)}")
        else:
            arguments += [f"--{name}", _text(key, value)]
    return arguments


def _refuse_reserved(key: str, name: str, reserved: Mapping[str, str], *, abbreviates: bool) -> None:
    head = name.partition(".")[0]
    taken: Iterable[str] = (head,) if head in reserved else ()
    if not taken and abbreviates:
        taken = (other for other in reserved if other.startswith(head))
    for other in taken:
        as_which = "" if other == head else f" (short for {other!r})"
        raise ConfigError(
            f"InferenceConfig.model_kwargs has {key!r}{as_which}, which trinfer sets itself: allowed are other options",
            advice=f"use {reserved[other]}",
        )


def _text(key: str, value: Any) -> str:  # noqa: ANN401  # the user's value, whatever it is
    if isinstance(value, list | tuple | dict):
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"InferenceConfig.model_kwargs[{key!r}] cannot be written as JSON ({error}): allowed are plain values"
            ) from error
    if isinstance(value, str | int | float):
        text = str(value)
        try:
            encoded = os.fsencode(text)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise ConfigError(
                f"InferenceConfig.model_kwargs[{key!r}] holds a NUL or a lone surrogate: allowed is text that a "
                "command line can carry"
            )
        return text
    raise ConfigError(
        f"InferenceConfig.model_kwargs[{key!r}] is a {type(value).__name__}: allowed are texts, numbers, booleans, "
        "None, lists and dicts"
    )
