from __future__ import annotations

import pytest

from trinfer import InferenceResult, ProtocolError


def test_a_chat_answer():
    message = {"role": "assistant", "content": "hi", "reasoning_content": "hm", "tool_calls": [{"id": "t"}]}
    raw = {
        "choices": [{"message": message, "finish_reason": "stop", "logprobs": {"x": 1}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    result = InferenceResult.from_response(raw)
    assert (result.text, result.finish_reason, result.reasoning) == ("hi", "stop", "hm")
    assert (result.tool_calls, result.logprobs) == (({"id": "t"},), {"x": 1})
    assert (result.prompt_tokens, result.completion_tokens) == (3, 4)
    assert result.raw is raw


def test_a_completion_and_what_servers_leave_out():
    result = InferenceResult.from_response({"choices": [{"text": "hi"}]})
    assert (result.text, result.finish_reason, result.usage, result.prompt_tokens) == ("hi", None, {}, 0)
    result = InferenceResult.from_response({"choices": [{"message": {"content": None}}], "usage": None})
    assert result.text == ""


@pytest.mark.parametrize("raw", [{}, {"choices": []}, {"choices": None}, {"choices": [1]}, {"choices": [{}]}])
def test_what_is_no_answer_is_refused(raw):
    with pytest.raises(ProtocolError):
        InferenceResult.from_response(raw)
