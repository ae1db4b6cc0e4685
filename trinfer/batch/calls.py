"""The request cache: answers within rollouts that are not finished, so that a crash costs only what was under way.

A call is known by its document, its rollout, its payload, and how often the rollout has asked for that same payload
before. Counting per payload, and not over all calls, keeps the keys right for rollouts that send several requests at
once, which trio starts in no particular order.

Why the journal and not SQLite: see docs/explanation/durable-batch.md, and ``python -m benchmarks.request_cache``.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import zlib
from typing import TYPE_CHECKING, Any

from trinfer.encoding import make_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Call", "answer_of", "call_key", "encode_call", "key_of", "payload_hash"]

_dump = make_encoder(json.JSONEncoder())
_encode = make_encoder(json.JSONEncoder(sort_keys=True, default=repr))


def payload_hash(payload: Mapping[str, Any], settings: bytes = b"") -> bytes:
    """16 bytes that stand for a payload; the order of its keys does not matter.

    Args:
        settings: hash of what else decides an answer (model, parameters): a run may go on with others.
    """
    return hashlib.blake2b(_encode(payload).encode(), digest_size=16, key=settings).digest()


def call_key(payload: bytes, rollout: int, number: int) -> bytes:
    """16 bytes that stand for one call of a document.

    Args:
        payload: hash of what the rollout asked for.
        rollout: its number.
        number: how often it has asked for the same before.
    """
    if not (rollout or number):
        return payload  # most calls
    return hashlib.blake2b(b"%d %d " % (rollout, number) + payload, digest_size=16).digest()


def encode_call(key: bytes, response: Mapping[str, Any]) -> bytes:
    """The body of a journal's record. Bodies are read one by one, so that each has its checksum."""
    data = key + _dump(response).encode()
    return zlib.crc32(data).to_bytes(4, "little") + data


def key_of(body: bytes) -> bytes | None:
    """The key of a call; None for a damaged body, which is asked for again."""
    return body[4:20] if zlib.crc32(body[4:]) == int.from_bytes(body[:4], "little") else None


def answer_of(body: bytes) -> dict[str, Any]:
    """The answer in a body that is whole; a new one each time, for the caller to change."""
    answer: dict[str, Any] = json.loads(body[20:])
    return answer


class Call:
    """The first call of a document, as it was asked and answered.

    Most documents ask once, and are finished before anybody asks again: key and body are made when they are needed.
    Until then there is a copy in the form that Python makes soonest: payload and answer are the rollout's, which may
    take them to pieces.

    Args:
        settings: see `payload_hash`.

    Raises:
        ValueError: the payload holds something of another type than JSON has.
    """

    __slots__ = ("_answer", "_payload", "_settings")

    def __init__(self, payload: Mapping[str, Any], settings: bytes) -> None:
        self._payload, self._settings = marshal.dumps(payload), settings  # type: ignore[arg-type]  # or ValueError
        self._answer = b""

    def answered(self, response: Mapping[str, Any]) -> None:
        """Note the answer. Raises ValueError as above."""
        self._answer = marshal.dumps(response)  # type: ignore[arg-type]  # or ValueError

    def hash(self) -> bytes:
        """That of its payload, which is its key too: it is the first of the only rollout."""
        return payload_hash(marshal.loads(self._payload), self._settings)

    def body(self) -> bytes:
        """See `encode_call`."""
        return encode_call(self.hash(), marshal.loads(self._answer))
