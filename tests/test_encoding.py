"""What is made once gives what the standard library gives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.encoding import decode_json, make_encoder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
        | st.tuples(inner)
    ),
    max_leaves=20,
)


@given(value=VALUES, ascii_only=st.booleans())
def test_it_writes_what_json_writes(value, ascii_only):
    options = {"ensure_ascii": ascii_only, "separators": (",", ":")}
    assert make_encoder(json.JSONEncoder(**options))(value) == json.dumps(value, **options)


@given(value=st.dictionaries(st.text(), st.integers() | st.builds(object)))
def test_it_heeds_the_other_options(value):
    options = {"sort_keys": True, "default": lambda each: "an object"}
    assert make_encoder(json.JSONEncoder(**options))(value) == json.dumps(value, **options)


@given(value=VALUES, before=st.sampled_from(["", " ", "\n\t"]), after=st.sampled_from(["", " ", "\r\n"]))
def test_it_reads_what_json_reads(value, before, after):
    text = before + json.dumps(value) + after
    assert repr(decode_json(text)) == repr(json.loads(text))


@given(text=st.text(alphabet='{}[]":,0a \\', max_size=12))
def test_it_refuses_to_read_what_json_refuses(text):
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=":"):
            decode_json(text)
    else:
        assert decode_json(text) == expected


def test_it_refuses_what_json_refuses():
    circle: list[object] = []
    circle.append(circle)
    encode = make_encoder(json.JSONEncoder(allow_nan=False))
    for value, kind in ((float("nan"), ValueError), (object(), TypeError), ({(1, 2): 3}, TypeError)):
        with pytest.raises(kind):
            encode(value)
    with pytest.raises(RecursionError):
        encode(circle)


def test_it_does_without_the_part_in_c(monkeypatch):
    monkeypatch.setattr("json.encoder.c_make_encoder", None)
    assert make_encoder(json.JSONEncoder())({"a": [1, None]}) == '{"a": [1, null]}'
