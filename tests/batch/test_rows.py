from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer import BadRequestError, InferenceResult
from trinfer.batch.rows import PromptOptions, encode, failed, finished, parse_row

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RESULT = InferenceResult("answer", "stop", {"completion_tokens": 1})


@given(st.dictionaries(st.text(), VALUES))
def test_other_fields_come_out_as_they_went_in(fields):
    row = parse_row(json.dumps({**fields, "prompt": "p"}).encode(), "f:1", PromptOptions())
    for output in (finished(row, RESULT), failed(row, BadRequestError("no", status=400))):
        kept = json.loads(encode(output))
        for name, value in fields.items():
            if name not in {"prompt", "generation", "error", "id", "messages"}:
                assert kept[name] == value
        assert kept["id"] == (fields["id"] if fields.get("id") is not None else "f:1")
        assert ("generation" in kept) != ("error" in kept)


@given(st.binary())
def test_any_line_is_a_row_or_says_what_is_wrong_with_it(line):
    row = parse_row(line, "f:1", PromptOptions())
    assert (row.payload is None) != (row.error is None)
    assert row.error is None or "f:1" in row.error.message
    encode(failed(row, row.error or BadRequestError("no")))


def test_deep_nesting_is_an_error_of_the_row():
    assert parse_row(b'{"prompt": ' + b"[" * 100_000, "f:1", PromptOptions()).error is not None


def test_prompts_become_messages_and_keep_their_own_system_message():
    options = PromptOptions(system_prompt="be brief")
    messages = [{"role": "system", "content": "mine"}, {"role": "user", "content": "x"}]
    assert parse_row(json.dumps({"messages": messages}).encode(), "f", options).payload == {"messages": messages}
    assert parse_row(b'{"text": "x"}', "f", options).payload == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    }
    assert parse_row(b'{"text": "x"}', "f", PromptOptions(use_chat=False)).payload == {"prompt": "x"}


@pytest.mark.parametrize(
    "messages",
    [
        "a text",
        [],
        {},
        5,
        [{"role": 5}],
        [{"role": ["user"]}],
        [{"content": "no role"}],
        ["user"],
        [{"role": "user"}, 1],
    ],
)
def test_messages_that_are_none(messages):
    for options in (PromptOptions(), PromptOptions(system_prompt="be brief")):
        row = parse_row(json.dumps({"messages": messages}).encode(), "f:1", options)
        assert row.error is not None
        assert "'messages' is no list of messages with roles" in row.error.message
