"""Documents out of records, and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.data.documents import Document, Media

TEXT = st.text(max_size=8)
METADATA = st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3)
MEDIA = st.builds(
    Media,
    id=TEXT,
    type=TEXT | st.integers(0, 9),
    url=TEXT,
    path=st.none() | TEXT,
    offset=st.none() | st.integers(0, 99),
    length=st.none() | st.integers(0, 99),
    media_bytes=st.none() | st.binary(max_size=20),
    metadata=METADATA,
)


@given(st.builds(Document, text=TEXT, id=TEXT, media=st.lists(MEDIA, max_size=2), metadata=METADATA))
def test_documents_go_through_json(document):
    assert Document.from_fields(json.loads(json.dumps(document.to_dict())), "other") == document


def test_fields_that_are_not_a_documents_own_go_to_its_metadata():
    fields = {"text": "t", "url": "u", "metadata": {"a": 1}, "id": 5}
    assert Document.from_fields(fields, "made") == Document("t", "5", [], {"url": "u", "a": 1})
    assert Document.from_fields({"text": ""}, "made") == Document("", "made")
    assert Document.from_fields({"text": "", "id": None, "media": None, "metadata": None}, "made").id == "made"


def test_another_text_field_leaves_the_field_text_to_the_metadata():
    document = Document.from_fields({"body": "b", "text": "t", "x": 1}, "made", "body")
    assert document == Document("b", "made", [], {"text": "t", "x": 1})


def test_unknown_fields_of_media_go_to_their_metadata():
    media = Media.from_dict({"id": "i", "width": 3, "metadata": {"a": 1}, "url": None, "offset": None})
    assert media == Media("i", metadata={"width": 3, "a": 1})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "'text' is missing"),
        ({"text": None}, "'text' is missing"),
        ({"text": 5}, "'text' is no text"),
        ({"text": "", "media": {"a": 1}}, "'media' is no list of objects"),
        ({"text": "", "media": ["a"]}, "'media' is no list of objects"),
        ({"text": "", "metadata": [1]}, "'metadata' is no object"),
        ({"text": "", "media": [{"media_bytes": "?"}]}, "'media_bytes' of a medium is no base64"),
        ({"text": "", "media": [{"media_bytes": "ü"}]}, "'media_bytes' of a medium is no base64"),
        ({"text": "", "media": [{"metadata": [1]}]}, "'metadata' of a medium is no object"),
    ],
)
def test_records_that_are_no_documents_say_why(fields, said):
    with pytest.raises(ValueError, match=said):
        Document.from_fields(fields, "made")


def test_media_without_metadata_are_media():
    # Parquet has a value for every name.
    assert Document.from_fields({"text": "", "media": [{"id": "i", "metadata": None}]}, "").media == [Media("i")]
