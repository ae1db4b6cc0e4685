"""``trinfer batch``: files of OpenAI's batch API, read and written as its own package has them."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any, Literal

import openai.types.responses
import pytest
from openai.types import Completion, CreateEmbeddingResponse, EmbeddingCreateParams
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParams
from pydantic import BaseModel, TypeAdapter

from tests.cli import batch_engine
from tests.cli.commands import ROOT, end, figures, here, rows, start, trinfer, wait_for_rows, write

if TYPE_CHECKING:
    from pathlib import Path


class Answer(BaseModel, extra="forbid", strict=True):
    status_code: int
    request_id: str
    body: dict[str, Any]


class Error(BaseModel, extra="forbid", strict=True):
    code: str
    message: str


class Line(BaseModel, extra="forbid", strict=True):
    """A line of output or of an error file: https://platform.openai.com/docs/api-reference/batch/request-output."""

    id: str
    custom_id: str
    response: Answer | None
    error: Error | None


class Request(BaseModel, extra="forbid", strict=True):
    """A line of input: https://platform.openai.com/docs/api-reference/batch/request-input."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def ask(name: Any, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    if url == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def lines(path: Path) -> list[Line]:
    """The output, checked against the form: an answer, or an error, and ids of their own."""
    found = [Line.model_validate_json(line) for line in path.read_bytes().splitlines()]
    assert all((line.response is None) != (line.error is None) for line in found)
    assert all(line.id.startswith("batch_req_") for line in found)
    assert len({line.id for line in found}) == len(found)
    request_ids = [line.response.request_id for line in found if line.response is not None]
    assert all(request_ids)
    return found


def engine(log: Path, *options: str) -> tuple[str, ...]:
    command = [sys.executable, batch_engine.__file__, "--port", "{port}", "--log", str(log), *options]
    kwarg = f"server_command={json.dumps(command)}"
    return ("--engine", "custom", "--model", batch_engine.MODEL, "--model-kwarg", kwarg)


PARAMS = {
    "/v1/chat/completions": ChatParams,
    "/v1/completions": CompletionParams,
    "/v1/embeddings": EmbeddingCreateParams,
    "/v1/responses": ResponseParams,
}
TYPES: dict[str, type[openai.BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/embeddings": CreateEmbeddingResponse,
    "/v1/responses": openai.types.responses.Response,
}


def test_every_route_is_asked_as_written_and_answers_in_openais_types(tmp_path: Path):
    rank = {"query": "q", "documents": ["a", "b"]}
    requests = [
        ask("chat", model="m", temperature=0.5, stream=False, n=1),
        ask("completion", "/v1/completions", model="m", prompt="p", max_tokens=3),
        ask("text", "/v1/embeddings", model="m", input="one", encoding_format="float"),
        ask("texts", "/v1/embeddings", model="m", input=["one", "three"]),
        ask("responses", "/v1/responses", model="m", input="i"),
        *(ask(url, url, model="m", **rank) for url in ("/v1/rerank", "/v2/rerank", "/rerank")),
        *(ask(url, url, model="m", text_1="a", text_2=["b"]) for url in ("/v1/score", "/score")),
        ask("no model", messages=[{"role": "user", "content": "who?"}]),
        ask("null model", model=None, **{"\0route": "/elsewhere"}),
        ask("refused", "/v1/embeddings", model="m", input="x", user="refuse"),
        ask("garbled", "/v1/embeddings", model="m", input="x", user="garble"),
    ]
    for request in requests[:5]:
        TypeAdapter(PARAMS[Request.model_validate(request).url]).validate_python(request["body"])
    source, out, log = write(tmp_path / "in.jsonl", *requests), tmp_path / "out.jsonl", tmp_path / "log"
    code, stdout, stderr = trinfer(
        *("batch", "-i", source, "-o", out, "--ordered", "--price-in", "1000000", *engine(log))
    )
    assert (code, stdout) == (1, ""), stderr
    found = lines(out)
    assert [line.custom_id for line in found] == [request["custom_id"] for request in requests]
    asked = rows(log)
    for request, line in zip(requests, found, strict=True):
        # What the engine gets is the body, with its model; a batch has no stream.
        body = {name: value for name, value in request["body"].items() if name not in {"stream", "\0route"}}
        body["model"] = "m"
        assert [request["url"], body] in asked
        if request["custom_id"] in {"refused", "garbled"}:
            continue
        assert line.response is not None
        assert line.response.status_code == 200
        assert line.response.body == batch_engine.ROUTES[request["url"]](body)
        if request["url"] in TYPES:
            parsed = TYPES[request["url"]].model_validate(line.response.body, strict=True)
            assert parsed.to_dict(mode="json") == line.response.body
    assert len(asked) == len(requests)
    refused, garbled = found[-2:]
    assert refused.response == Answer(
        status_code=422,
        request_id="req-of-the-engine",
        body={"error": {"message": "no such user", "type": "BadRequestError", "param": None, "code": 422}},
    )
    assert garbled.error is not None
    assert garbled.error.code == "ProtocolError"
    assert "not JSON" in garbled.error.message
    # Chats, completions and embeddings count 3 tokens, and so does the responses route, by other names.
    assert figures(tmp_path / "out.jsonl.run")["prompt_tokens"] == 3 * 7
    assert figures(tmp_path / "out.jsonl.run")["completion_tokens"] == 2 * 5
    assert figures(tmp_path / "out.jsonl.run")["cost"] == 21.0


MISTAKES: list[tuple[Any, str]] = [
    ("not json", "the line is not JSON"),
    ("[1]", "the line is a JSON list, not an object"),
    ({**ask("a"), "custom_id": 7}, "the field 'custom_id' is no text"),
    ({"method": "POST", "url": "/v1/completions", "body": {}}, "the field 'custom_id' is missing"),
    ({"custom_id": "no url", "method": "POST", "body": {}}, "the field 'url' is missing"),
    ({"custom_id": "no method", "url": "/v1/completions", "body": {}}, "the field 'method' is missing"),
    ({"custom_id": "no body", "method": "POST", "url": "/v1/completions"}, "the field 'body' is missing"),
    ({**ask("list"), "body": []}, "the field 'body' is no object"),
    ({**ask("get"), "method": "GET"}, "the method 'GET' is not POST"),
    (ask("url", "/v1/files"), "the url '/v1/files' is not known: allowed are /v1/chat/completions"),
    (ask("whole url", "http://host/v1/completions"), "is not known"),
    (ask("stream", stream=True), "asks for a stream"),
    (ask("other", model="other"), "the model 'other' is not the one that runs: 'm'"),
    (ask("model list", model=["m"]), "the model ['m'] is not the one that runs: 'm'"),
]


def test_mistakes_in_a_file_are_errors_of_their_lines(tmp_path: Path):
    good = [ask("good", model="m"), ask("same", model="m"), ask("same", model="m", seed=1), ask("same", model="m")]
    source = write(tmp_path / "in.jsonl", good[0], "", *(line for line, _ in MISTAKES), "   ", *good[1:])
    out, run_dir = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    command = ("batch", "-i", source, "-o", out, "--ordered", "--engine", "dummy", "--model", "m")
    code, _, stderr = here(*command)
    assert code == 1
    assert f"4 ok, {len(MISTAKES)} failed" in stderr
    assert f"InvalidRow {len(MISTAKES)}" in stderr
    found = lines(out)
    assert len(found) == len(good) + len(MISTAKES)  # blank lines are none
    for number, (line, (given, words)) in enumerate(zip(found[1:-3], MISTAKES, strict=True), 3):
        assert line.error is not None
        assert line.error.code == "InvalidRow"
        assert line.error.message.startswith(f"in.jsonl:{number}: ")
        assert words in line.error.message
        if isinstance(given, dict) and isinstance(given.get("custom_id"), str):
            assert line.custom_id == given["custom_id"]
    # Lines with one custom_id are answered each for itself, equal ones too.
    assert [line.custom_id for line in found[-3:]] == ["same"] * 3
    for line in (found[0], *found[-3:]):
        assert line.response is not None
        ChatCompletion.model_validate(line.response.body, strict=True)
    errors = rows(run_dir / "errors.jsonl")
    assert sorted(error.pop("place") for error in errors) == sorted(
        f"in.jsonl:{n}" for n in range(3, 3 + len(MISTAKES))
    )
    assert {Line.model_validate(error).id for error in errors} == {line.id for line in found[1:-3]}
    code, _, stderr = here(*command)
    assert code == 1
    assert f"this run is finished: {len(found)} rows in {out}, {len(MISTAKES)} rows failed: `trinfer retry" in stderr


def test_answers_with_an_error_are_answers_and_are_retried(tmp_path: Path):
    long = [{"role": "user", "content": "long " * 100}]
    source = write(tmp_path / "in.jsonl", ask("a"), ask("b", messages=long), ask("c", "/v1/embeddings", input="x"))
    out, run_dir = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    code, _, _ = here("batch", "-i", source, "-o", out, "--ordered", "--model-max-context", "50")
    assert code == 1
    first, second, third = lines(out)
    assert first.response is not None
    assert second.response is not None
    assert third.response is not None
    assert [second.response.status_code, third.response.status_code] == [400, 404]
    assert "maximum context length is 50" in second.response.body["error"]["message"]
    assert set(second.response.body["error"]) == {"message", "type", "param", "code"}
    assert [error["custom_id"] for error in rows(run_dir / "errors.jsonl")] == ["b", "c"]
    code, _, stderr = here("retry", run_dir, "--model-max-context", "500")
    assert (code, "1 ok, 1 failed; 1 were done before" in stderr) == (1, True)
    again = lines(out)
    assert again[0] == first
    assert again[1].response is not None
    ChatCompletion.model_validate(again[1].response.body, strict=True)
    assert again[1].id == second.id  # of the request, whenever it is answered
    assert [error["custom_id"] for error in rows(run_dir / "errors.jsonl")] == ["c"]


def test_lines_come_as_they_are_done_and_a_batch_is_continued(tmp_path: Path):
    source = write(tmp_path / "in.jsonl", *(ask(str(n), "/v1/embeddings", input="x") for n in range(40)))
    out, run_dir, log = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run", tmp_path / "log"
    command = ("batch", "-i", source, "-o", out, "--max-concurrent", "4", *engine(log, "--latency", "0.05"))
    process = start(*command)
    wait_for_rows(run_dir, 5, process)
    code, stderr = end(process, signal.SIGTERM)
    assert (code, "run the same command again" in stderr) == (75, True)
    assert not out.exists()
    code, _, stderr = trinfer(*command)
    assert code == 0, stderr
    assert sorted(line.custom_id for line in lines(out)) == sorted(map(str, range(40)))
    assert len(log.read_text().splitlines()) == 40
    assert "this run is finished: 40 rows" in here(*command)[2]
    for ordered, expected in (([], False), (["--ordered"], True)):
        slow = write(tmp_path / "slow.jsonl", ask("slow", max_tokens=16), ask("quick", max_tokens=1))
        code, _, _ = here("batch", "-i", slow, "-o", tmp_path / "o", "-q", "--restart", *ordered, *SLOW_TOKENS)
        assert code == 0
        assert ([line.custom_id for line in lines(tmp_path / "o")] == ["slow", "quick"]) == expected


SLOW_TOKENS = ("--model-kwarg", "token_latency=0.03", "--model-kwarg", "min_tokens=16")


def test_urls_of_files_with_a_run_directory_of_their_own(tmp_path: Path):
    source, out, run_dir = write(tmp_path / "in.jsonl", ask("a"), ask("b")), tmp_path / "out.jsonl", tmp_path / "rd"
    command = ("batch", "-i", source.as_uri(), "-o", out.as_uri())
    code, _, stderr = here(*command)
    assert (code, "allowed is --run-dir FOLDER" in stderr) == (2, True)
    assert here(*command, "--run-dir", run_dir, "-q")[0] == 0
    assert sorted(line.custom_id for line in lines(out)) == ["a", "b"]
    write(source, ask("a"), ask("b"), ask("c"))  # a URL does not tell whether it has changed: it is read again
    code, _, stderr = here(*command, "--run-dir", run_dir)
    assert (code, "1 rows in" in stderr, "2 were done before" in stderr) == (0, True, True)
    assert sorted(line.custom_id for line in lines(out)) == ["a", "b", "c"]
    out.unlink()
    assert here(*command, "--no-durable", "-q")[0] == 0  # nothing is kept
    assert sorted(line.custom_id for line in lines(out)) == ["a", "b", "c"]
    code, _, stderr = here("batch", "-i", f"{source.as_uri()}x", "-o", out.as_uri(), "--run-dir", tmp_path / "new")
    assert (code, "No such file" in stderr, "to continue it" in stderr) == (4, True, False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-i", "IN"], 2, "-o/--output-file"),
        (["-o", "OUT"], 2, "-i/--input-file"),
        (["-i", "IN", "-o", "OUT", "--param", "max_tokens=3"], 2, "unrecognized arguments"),
        (["-i", "NONE", "-o", "OUT"], 4, "cannot be read: No such file"),
        (["-i", "IN", "-o", "IN"], 4, "would overwrite the input"),
        (["-i", "IN", "-o", "OUT", "--engine", "vllm"], 2, "model_name_or_path"),
        (
            ["-i", "IN", "-o", "OUT", "--engine", "vllm", "--model", "m", "--executable", "/no"],
            3,
            "could not be started",
        ),
    ],
)
def test_mistakes_get_one_clear_message_and_a_code(tmp_path: Path, arguments, code, words):
    source = write(tmp_path / "in.jsonl", ask("a"))
    names = {"IN": source, "OUT": tmp_path / "out.jsonl", "NONE": tmp_path / "none"}
    got, stdout, stderr = here("batch", *(names.get(argument, argument) for argument in arguments))
    assert (got, stdout) == (code, "")
    assert words in stderr
    assert "unexpected" not in stderr
    assert list(tmp_path.iterdir()) == [source]


def test_an_empty_file_gives_an_empty_one_and_pipes_work(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    assert here("batch", "-i", write(tmp_path / "in.jsonl"), "-o", out, "-q")[0] == 0
    assert out.read_bytes() == b""
    request = json.dumps(ask("a")).encode()
    code, stdout, stderr = trinfer("batch", "-i", "-", "-o", "-", "-q", stdin=request, cwd=ROOT)
    assert (code, stderr) == (0, "")
    assert Line.model_validate_json(stdout).custom_id == "a"
