"""The request cache: answers within rollouts that are not finished, so that a crash costs only what was under way.

A call is known by its document, its rollout, its payload, and how often the rollout has asked for that same payload
before. Counting per payload, and not over all calls, keeps the keys right for rollouts that send several requests at
once, which trio starts in no particular order.

Why the journal and not SQLite: see docs/explanation/durable-batch.md, and ``python -m benchmarks.request_cache``.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["call_key", "decode_call", "encode_call", "payload_hash"]

_ENCODER = json.JSONEncoder(sort_keys=True, default=repr)


def payload_hash(payload: Mapping[str, Any]) -> bytes:
    """16 bytes that stand for a payload; the order of its keys does not matter."""
    return hashlib.blake2b(_ENCODER.encode(payload).encode(), digest_size=16).digest()


def call_key(rollout: int, payload: bytes, number: int) -> bytes:
    """16 bytes that stand for one call of a document: rollout, hash of the payload, number among equal ones."""
    return hashlib.blake2b(b"%d %d " % (rollout, number) + payload, digest_size=16).digest()


def encode_call(key: bytes, response: Mapping[str, Any]) -> bytes:
    """The body of a journal's record. Bodies are read one by one, so that each has its checksum."""
    data = key + json.dumps(response).encode()
    return zlib.crc32(data).to_bytes(4, "little") + data


def decode_call(body: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """Key and answer; None for a damaged body, which is asked for again."""
    if zlib.crc32(body[4:]) != int.from_bytes(body[:4], "little"):
        return None
    return body[4:20], json.loads(body[20:])
