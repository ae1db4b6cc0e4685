"""One record of an input, before anybody looks into it, and the key by which it is known for good.

Rule: a key is made of the content, and never of the place: inputs are reordered, split and merged between two runs. The
key of a line is that of its bytes, so that a run that is continued skips a line without reading it; the key of a record
of another format is that of its JSON. Equal records are numbered, and their numbers are part of their keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from trinfer.data.values import told
from trinfer.encoding import decode_json
from trinfer.errors import TrinferError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["InvalidRow", "Raw", "content_key", "numbered", "record_id", "shard_of"]


class InvalidRow(TrinferError):
    """A record of the input that cannot become a request; the message names file and line."""


class Raw(NamedTuple):
    """One record as it was read.

    Attributes:
        place: file and line, for messages.
        size: bytes of the input that it took, for progress.
        data: the line, or the fields.
        error: why it is none; a line that is too long, for instance.
    """

    place: str
    size: int
    data: bytes | Mapping[str, Any]
    error: InvalidRow | None = None

    def fields(self) -> dict[str, Any]:
        """What the record holds.

        Raises:
            InvalidRow: it is not UTF-8, not JSON, or no object.
        """
        if self.error is not None:
            raise self.error
        if not isinstance(self.data, bytes):
            return dict(self.data)
        try:
            text = self.data.decode()
            if text[:1] == "\ufeff":  # sooner than the codec that knows of it
                text = text[1:]
            value = decode_json(text)
        except UnicodeDecodeError as error:
            raise InvalidRow(f"{self.place}: the line is not UTF-8 ({error.reason} at byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise InvalidRow(f"{self.place}: the line is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InvalidRow(f"{self.place}: the line is a JSON {type(value).__name__}, not an object")
        return value


def content_key(data: bytes | Mapping[str, Any]) -> bytes:
    """16 bytes that stand for the content."""
    if not isinstance(data, bytes):
        try:
            data = json.dumps(data, sort_keys=True, default=told).encode()
        except TypeError:  # names that are no texts, which have no order
            data = json.dumps(_named(data), sort_keys=True, default=told).encode()
    return hashlib.blake2b(data, digest_size=16).digest()


def _named(value: Any) -> Any:  # noqa: ANN401  # any value of a record
    """The same, with texts as names all the way down."""
    if isinstance(value, dict):
        return {repr(told(name)): _named(each) for name, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list | tuple) else value


def numbered(key: bytes, number: int) -> bytes:
    """The key of one of several equal records. Its last bytes stay, so that it belongs to the same shard."""
    if number == 0:
        return key
    return hashlib.blake2b(key + number.to_bytes(8, "little"), digest_size=8).digest() + key[8:]


def record_id(key: bytes, number: int) -> str:
    """The id of a record that has none of its own."""
    return key.hex() if number == 0 else f"{key.hex()}-{number}"


def shard_of(key: bytes, world_size: int) -> int:
    """To which of so many shards a record belongs: by content, so that equal ones come together."""
    return int.from_bytes(key[8:], "little") % world_size
