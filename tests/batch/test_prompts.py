"""From rows to requests, and from answers to rows."""

from __future__ import annotations

import base64
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer import BadRequestError, ConfigError, FileError, InferenceResult, RolloutError
from trinfer.batch.jobs import GenerationJob
from trinfer.batch.prompts import PromptOptions, Prompts, read_template
from trinfer.data.records import InvalidRow, Raw, content_key

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RESULT = InferenceResult("answer", "stop", {"completion_tokens": 1})
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def item_of(line: bytes, options: PromptOptions | None = None, rollouts: int = 1):
    job = GenerationJob(Prompts(options or PromptOptions()), rollouts)
    return job, job.prepare(Raw("f:1", len(line), line), content_key(line), 0)


def payload(fields: dict, **options):
    return Prompts(PromptOptions(**options)).payload(fields, "f:1")


@given(st.dictionaries(st.text(), VALUES))
def test_other_fields_come_out_as_they_went_in(fields):
    job, item = item_of(json.dumps({**fields, "prompt": "p"}).encode())
    for line in (job.finish(item, [RESULT]).line, job.failed(item, BadRequestError("no", status=400))):
        kept = json.loads(line)
        for name, value in fields.items():
            if name not in {"prompt", "generation", "generations", "error", "id", "messages"}:
                assert kept[name] == value
        assert kept["id"] == (fields["id"] if fields.get("id") is not None else item.key.hex())
        assert ("generation" in kept) != ("error" in kept)


def test_what_is_no_number_is_null_in_the_output():
    # JSON has no word for it; Python reads its own all the same.
    job, item = item_of(b'{"prompt": "p", "a": [NaN, {"b": -Infinity}], "c": 1e999, "d": 0.5}')
    for line in (job.finish(item, [RESULT]).line, job.failed(item, BadRequestError("no", status=400))):
        kept = json.loads(line, parse_constant=pytest.fail)
        assert (kept["a"], kept["c"], kept["d"]) == ([None, {"b": None}], None, 0.5)


@given(st.binary())
def test_any_line_is_a_row_or_says_what_is_wrong_with_it(line):
    job, item = item_of(line)
    assert (item.value[1] is None) != (item.error is None)
    assert item.error is None or "f:1" in item.error.message
    assert json.loads(job.failed(item, item.error or BadRequestError("no")))["error"]


def test_several_rollouts_stand_in_a_list():
    job, item = item_of(b'{"prompt": "p", "generation": "old"}', rollouts=2)
    kept = json.loads(job.finish(item, [RESULT, RESULT]).line)
    assert [each["text"] for each in kept["generations"]] == ["answer", "answer"]
    assert "generation" not in kept


def test_deep_nesting_is_an_error_of_the_row():
    assert item_of(b'{"prompt": ' + b"[" * 100_000)[1].error is not None
    # What can just be read may be too deep to be written with something around it.
    for depth in range(900, 1000, 7):
        job, item = item_of(b'{"prompt": "p", "x": ' + b"[" * depth + b"]" * depth + b"}")
        if item.error is None:
            error = None
            try:
                job.finish(item, [RESULT])
            except RolloutError as too_deep:
                error = too_deep
            if error is not None:
                assert "cannot be written" in error.message
                assert json.loads(job.failed(item, error))["error"]["type"] == "RolloutError"


def test_prompts_become_messages_and_keep_their_own_system_message():
    messages = [{"role": "system", "content": "mine"}, {"role": "user", "content": "x"}]
    assert payload({"messages": messages}, system_prompt="be brief") == {"messages": messages}
    assert payload({"text": "x"}, system_prompt="be brief") == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    }
    assert payload({"text": "x"}, use_chat=False) == {"prompt": "x"}
    assert payload({"text": "x", "q": "y"}, use_chat=False, prompt_field="q") == {"prompt": "y"}


@pytest.mark.parametrize(
    "messages",
    ["a text", [], {}, 5, [{"role": 5}], [{"role": ["user"]}], [{"content": "no role"}], ["user"], [{"role": "u"}, 1]],
)
def test_messages_that_are_none(messages):
    for options in ({}, {"system_prompt": "be brief"}):
        with pytest.raises(InvalidRow, match="f:1: the field 'messages' is no list of messages with roles"):
            payload({"messages": messages}, **options)


# -- templates ------------------------------------------------------------------------------------------------------


def test_a_template_makes_the_prompt_of_any_fields():
    template = "{% for q in questions %}{{ loop.index }}. {{ q }}\n{% endfor %}{{ extra | tojson }}"
    made = payload({"questions": ["why?", "wie?"], "extra": {"ü": 1}}, template=template)
    assert made == {"messages": [{"role": "user", "content": '1. why?\n2. wie?\n{"ü": 1}'}]}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ text.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.join(['x']) and text.format_map({}) and missing.y }}", "undefined"),
        ("{{ range(1000000000) | list }}", "range"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_is_the_rows_failure(template, said):
    with pytest.raises(InvalidRow, match=rf"f:1: the template fails.*{said}"):
        payload({"text": "x"}, template=template)


def test_templates_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="not valid in line 2"):
        payload({}, template="a\n{% for %}")
    with pytest.raises(ConfigError, match="one of --template and --prompt-field"):
        payload({}, template="a", prompt_field="b")
    with pytest.raises(FileError, match="No such file"):
        read_template(str(tmp_path / "none.j2"))
    (tmp_path / "bad.j2").write_bytes(b"\xff")
    with pytest.raises(FileError, match="not UTF-8"):
        read_template(str(tmp_path / "bad.j2"))


# -- images ---------------------------------------------------------------------------------------------------------


def test_images_are_put_into_the_last_message_of_the_user(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    images = ["a.png", "https://example.com/b.jpg", "data:image/png;base64,AAAA"]
    options = {"image_field": "images", "image_folder": str(tmp_path)}
    made = payload({"text": "what is it?", "images": images}, **options)["messages"]
    text, *parts = made[0]["content"]
    assert text == {"type": "text", "text": "what is it?"}
    urls = [part["image_url"]["url"] for part in parts]
    assert urls == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}", *images[1:]]
    assert payload({"text": "none"}, **options) == {"messages": [{"role": "user", "content": "none"}]}
    one = payload({"text": "one", "images": "a.png"}, **options)["messages"]
    assert len(one[0]["content"]) == 2


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("../secret.png", "outside"),
        ("/etc/passwd", "outside"),
        ("link.png", "outside"),
        ("none.png", "cannot be read"),
        ("text.png", "no image"),
        (5, "not a text"),
    ],
)
def test_images_that_are_none(tmp_path, image, said):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("hello")
    with pytest.raises(InvalidRow, match=f"f:1.*{said}"):
        payload({"text": "x", "images": image}, image_field="images", image_folder=str(folder))


def test_options_that_need_the_chat_route():
    for name in ("system_prompt", "image_field"):
        with pytest.raises(ConfigError, match="--no-chat"):
            Prompts(PromptOptions(use_chat=False, **{name: "x"}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\0b.png", "is no name of a file"),
        ("\ud800.png", "is no name of a file"),
        ("pipe", "is no image"),
        ("", "Is a directory"),
    ],
)
def test_images_that_are_no_files(tmp_path, name, words):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: reading it must not be waited for
    with pytest.raises(InvalidRow, match=rf"f:1.*{words}"):
        payload({"text": "p", "images": [name]}, image_field="images", image_folder=str(tmp_path))


def test_a_template_that_is_nested_too_deeply():
    with pytest.raises(ConfigError, match="the template cannot be used"):
        Prompts(PromptOptions(template="{% if x %}" * 200 + "{% endif %}" * 200))
