"""As many requests at once as there can be open files.

Rule: who runs out of file descriptors in the middle of a run loses it to a journal that cannot be opened. Many systems
allow 256 or 1024 at first, and a lot more to whoever asks (``ulimit -Sn`` and ``ulimit -Hn``).
"""

from __future__ import annotations

import contextlib
import resource

__all__ = ["affordable"]

OTHERS = 64  # file descriptors that a run needs besides its connections


def affordable(requests: int, *, each: int) -> int:
    """At most so many requests at once, with ``each`` file descriptors; the soft limit is raised for them."""
    wanted = requests * each + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # macOS has a limit of its own, below a hard one of infinity.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(1, min(requests, (soft - OTHERS) // each))
    return requests
