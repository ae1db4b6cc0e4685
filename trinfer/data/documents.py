"""A document, as datatrove's users know it: text, id, media and metadata."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Document", "Media"]

OWN_FIELDS = ("id", "media", "metadata")  # and that of the text


@dataclass
class Media:
    """Something that belongs to a document and is not text.

    Attributes:
        id: its name.
        type: "image", "audio", …, or datatrove's number.
        url: where it came from, or a data URL.
        path, offset, length: where its bytes lie, where they are in a file.
        media_bytes: the bytes themselves, where they were loaded.
    """

    id: str = ""
    type: str | int = ""
    url: str = ""
    path: str | None = None
    offset: int | None = None
    length: int | None = None
    media_bytes: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: bytes in base64."""
        value = {name: each for name, each in vars(self).items() if each is not None}
        if self.media_bytes is not None:
            value["media_bytes"] = base64.b64encode(self.media_bytes).decode()
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Media:
        """The inverse of `to_dict`; names that it does not know go to metadata.

        Raises:
            ValueError: a field has the wrong type; the message says which.
        """
        # Formats with columns have a value for every name: None is one that is not there.
        known = {name: each for name, each in value.items() if name in cls.__dataclass_fields__ and each is not None}
        if isinstance(known.get("media_bytes"), str):
            try:
                known["media_bytes"] = base64.b64decode(known["media_bytes"], validate=True)
            except ValueError as error:
                raise ValueError(f"the field 'media_bytes' of a medium is no base64: {error}") from error
        metadata = known.pop("metadata", {})
        if not isinstance(metadata, dict):
            raise ValueError("the field 'metadata' of a medium is no object")
        rest = {name: each for name, each in value.items() if name not in cls.__dataclass_fields__}
        return cls(**known, metadata={**rest, **metadata})


@dataclass
class Document:
    """One document of a run.

    Attributes:
        text: what it says.
        id: its name; a run gives one to documents that have none, made of their content.
        media: images and the like.
        metadata: everything else. The results of the rollouts are put here.
    """

    text: str
    id: str
    media: list[Media] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the output."""
        value: dict[str, Any] = {"text": self.text, "id": self.id}
        if self.media:
            value["media"] = [media.to_dict() for media in self.media]
        value["metadata"] = self.metadata
        return value

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], id: str, text_field: str = "text") -> Document:  # noqa: A002
        """Make a document of a record: fields that are not a document's own go to its metadata.

        Raises:
            ValueError: the text is missing, or a field has the wrong type; the message says which.
        """
        text = fields.get(text_field)
        if not isinstance(text, str):
            raise ValueError(f"the field {text_field!r} is {'missing' if text is None else 'no text'}")
        media = fields.get("media") or []
        if not isinstance(media, list) or not all(isinstance(each, dict) for each in media):
            raise ValueError("the field 'media' is no list of objects")
        metadata = fields.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise ValueError("the field 'metadata' is no object")
        rest = {name: each for name, each in fields.items() if name not in {*OWN_FIELDS, text_field}}
        own = fields.get("id")
        return cls(text, id if own is None else str(own), [Media.from_dict(m) for m in media], {**rest, **metadata})
