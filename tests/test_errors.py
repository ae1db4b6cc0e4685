from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from trinfer import errors
from trinfer.errors import BadRequestError, InferenceError, RequestError, ServerError, TrinferError

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, TrinferError)]


def test_the_tree():
    parents = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    assert parents == {
        "TrinferError": "Exception",
        "ConfigError": "TrinferError",
        "FileError": "TrinferError",
        "RunStopped": "TrinferError",
        "RolloutError": "InferenceError",
        "ServerError": "TrinferError",
        "InferenceError": "TrinferError",
        "StructuredOutputError": "InferenceError",
        "RequestError": "InferenceError",
        "BadRequestError": "RequestError",
        "ContextLengthError": "BadRequestError",
        "AuthenticationError": "RequestError",
        "NotFoundError": "RequestError",
        "RateLimitError": "RequestError",
        "RequestTimeout": "RequestError",
        "ConnectionLost": "RequestError",
        "StreamInterrupted": "ConnectionLost",
        "ProtocolError": "RequestError",
    }


def test_the_text_says_what_why_what_to_do_and_the_last_words():
    error = ServerError("it broke", cause="no memory", advice="buy some", log_tail=["a", "b"], history=["x", "y"])
    assert str(error).splitlines() == [
        "it broke",
        "  likely cause: no memory",
        "  what to do: buy some",
        "  the engine's last 2 lines of output:",
        "    | a",
        "    | b",
        "  what happened, in order:",
        "    1. x",
        "    2. y",
    ]
    assert str(TrinferError("it broke")) == "it broke"
    assert len(str(TrinferError("m", log_tail=["x"] * 100)).splitlines()) == 22


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_travel_between_processes(cls):
    error = cls("it broke", cause="c", advice="a", log_tail=["l"])
    error.note = "more"
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), error.fresh()):
        assert type(other) is cls
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_a_fresh_error_is_another_one_with_the_same_content_and_cause():
    error = BadRequestError("no", status=400, payload={"a": 1}, attempts=3, elapsed=1.5, server_message="m")
    error.__cause__ = OSError("x")
    fresh = error.fresh()
    assert fresh is not error
    assert fresh.__cause__ is error.__cause__
    assert (fresh.status, fresh.payload, fresh.attempts, fresh.elapsed) == (400, {"a": 1}, 3, 1.5)
    assert ServerError("x").fresh().__cause__ is not None


def test_payloads_are_not_part_of_the_text():
    error = InferenceError("no", payload={"prompt": "private"})
    assert "private" not in str(error) + repr(error)
    assert isinstance(RequestError("x"), InferenceError)
