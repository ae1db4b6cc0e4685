"""Which failed requests are worth another try, and when. Pure: no clock, no sleep, no I/O.

Rule: what the server has refused for good (400, 401, 403, 404, 413, 422) is never sent again; what may pass by itself
is, with full jitter, so that a thousand clients do not come back in the same moment, and no sooner than the server
asks for with Retry-After.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["NO_RETRIES", "RetryPolicy", "retry_after_seconds"]

PASSING = frozenset({408, 425, 429, 502, 503, 504})


@dataclass(frozen=True)
class RetryPolicy:
    """When a request is sent again.

    Attributes:
        max_attempts: how many times it is sent at most; 1 never sends it again.
        base: upper bound of the first pause, in seconds; it doubles with each attempt.
        cap: upper bound of any pause, in seconds, and of what Retry-After may ask for.
        server_errors: how often status 500 is tried again: it may be a hiccup, or the payload's own fault.
    """

    max_attempts: int = 6
    base: float = 0.5
    cap: float = 60.0
    server_errors: int = 1

    def pause(
        self, attempts: int, status: int | None, retry_after: str | None = None, *, now: datetime | None = None
    ) -> float | None:
        """Seconds to wait before the next attempt; None when there shall be none.

        Args:
            attempts: how many were made.
            status: the answer's; None for a connection that could not be made or broke.
            retry_after: the header, if there was one.
            now: for tests.
        """
        if attempts >= self.max_attempts:
            return None
        if status == 500:
            if attempts > self.server_errors:
                return None
        elif status is not None and status not in PASSING:
            return None
        jitter = random.uniform(0, min(self.cap, self.base * 2.0 ** min(attempts - 1, 60)))
        asked = retry_after_seconds(retry_after, now=now)
        # The jitter comes on top: all who were told the same second would else come back together.
        return jitter if asked is None else min(asked, self.cap) + min(jitter, self.base)


NO_RETRIES = RetryPolicy(max_attempts=1)


def retry_after_seconds(value: str | None, *, now: datetime | None = None) -> float | None:
    """Read a Retry-After header, seconds or an HTTP date (RFC 9110, 10.2.3); None where it says nothing usable."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
