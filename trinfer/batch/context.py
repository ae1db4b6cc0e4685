"""What all rollouts share: a dict, a function that makes one, or a context manager around one, sync or async."""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

from trinfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = ["entered"]


@asynccontextmanager
async def entered(shared: object) -> AsyncIterator[Mapping[str, Any]]:
    """The dict in ``shared``, whatever that is; a context manager is left when the block is.

    Raises:
        ConfigError: it is, or gives, nothing that holds a dict.
    """
    # A context manager first: what @contextmanager makes may be called, too.
    if callable(shared) and not isinstance(shared, AbstractContextManager | AbstractAsyncContextManager):
        shared = shared()
        if inspect.isawaitable(shared):
            shared = await shared
    if isinstance(shared, AbstractAsyncContextManager):
        async with shared as value:
            yield _checked(value)
    elif isinstance(shared, AbstractContextManager):
        with shared as value:
            yield _checked(value)
    else:
        yield _checked(shared)


def _checked(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"shared_context gives a {type(value).__name__}: allowed is a dict, a function that returns one, or a "
            "context manager around one"
        )
    return value
