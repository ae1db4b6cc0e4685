"""Values that no format of trinfer has, and that documents of the caller's own may have all the same."""

from __future__ import annotations

import datetime

import numpy as np


class Thing:
    """An object whose repr tells its address."""


VALUES = {
    "thing": Thing,
    "set": lambda: {"a", "b", "c", "d", "e"},
    "names": lambda: {1: "a", "x": {2.5: None, None: 1}, (1, 2): 3},
    "array": lambda: np.arange(3),
    "number": lambda: np.float32(0.5),
    "time": lambda: datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
}
