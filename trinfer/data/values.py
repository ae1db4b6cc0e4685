"""Values of Parquet and of data sets that JSON does not know, as values that it does.

Rule: the same value gives the same JSON in every process, and whatever other libraries are installed: the key of a
record is made of it.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import re
import uuid
from collections.abc import Mapping
from typing import Any

__all__ = ["plain", "told"]

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def plain(value: Any) -> Any:  # noqa: ANN401  # from any value to a JSON value
    """Make a JSON value.

    Bytes become base64; times, dates and decimals texts; durations seconds; what is no number (NaN, infinity) None.

    Raises:
        TypeError: it is of a type for which there is no such thing; the message is its name.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key if isinstance(key, str) else str(plain(key)): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        listed = value.tolist()
        if type(listed) is not type(value):
            return plain(listed)
    raise TypeError(type(value).__qualname__)


def told(value: Any) -> Any:  # noqa: ANN401  # of any value
    """For keys: something that stands for any value, also one of a type that `plain` does not know."""
    if isinstance(value, set | frozenset):
        return sorted(repr(told(each)) for each in value)  # their order is another in each process
    try:
        return plain(value)
    except TypeError:
        return ADDRESS.sub("", repr(value))
