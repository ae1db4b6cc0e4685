"""An engine with every route of a batch file: ``python batch_engine.py --port 8000 --log FILE [--latency SECONDS]``.

Its answers have the forms of OpenAI's API, and of vLLM's for rerank and score. What it is asked goes to the log.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import trio

from trinfer.http.serving import HttpRequest, HttpResponse, json_response, serve_http

MODEL = "m"


def usage(prompt: int, completion: int = 0) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat(body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"echo: {body['messages'][-1]['content']}", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    frame = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**frame, "choices": [choice], "usage": usage(3, 2)}


def completion(body: dict[str, Any]) -> dict[str, Any]:
    choice = {"index": 0, "text": f"echo: {body['prompt']}", "logprobs": None, "finish_reason": "length"}
    frame = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL}
    return {**frame, "choices": [choice], "usage": usage(3, 2)}


def embeddings(body: dict[str, Any]) -> dict[str, Any]:
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    data = [{"object": "embedding", "index": i, "embedding": [0.5, float(len(text))]} for i, text in enumerate(texts)]
    return {"object": "list", "model": MODEL, "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


def rerank(body: dict[str, Any]) -> dict[str, Any]:
    found = [
        {"index": i, "document": {"text": text}, "relevance_score": 1 / (1 + i)}
        for i, text in enumerate(body["documents"])
    ]
    return {"id": "rerank-1", "model": MODEL, "usage": {"total_tokens": 3}, "results": found}


def score(body: dict[str, Any]) -> dict[str, Any]:
    data = [{"index": 0, "object": "score", "score": float(len(body["text_1"]))}]
    return {"id": "score-1", "object": "list", "created": 1, "model": MODEL, "data": data, "usage": {}}


def responses(body: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "output_text", "text": f"echo: {body['input']}", "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    tokens = {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }
    frame = {"id": "resp_1", "object": "response", "created_at": 1.0, "model": MODEL, "status": "completed"}
    return {
        **frame,
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": tokens,
    }


ROUTES = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
    "/v1/embeddings": embeddings,
    "/v1/rerank": rerank,
    "/v2/rerank": rerank,
    "/rerank": rerank,
    "/v1/score": score,
    "/score": score,
    "/v1/responses": responses,
}


async def app(options: argparse.Namespace, request: HttpRequest) -> HttpResponse:
    if request.method == "GET" and request.path == "/v1/models":
        return json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    if request.method != "POST" or request.path not in ROUTES:
        return json_response({"error": {"message": "no such route"}}, 404)
    body = json.loads(request.body)
    with open(options.log, "a", encoding="utf-8") as log:
        log.write(json.dumps([request.path, body]) + "\n")
    await trio.sleep(options.latency)
    match body.get("user"):
        case "refuse":
            error = {"message": "no such user", "type": "BadRequestError", "param": None, "code": 422}
            return json_response({"error": error}, 422, {"X-Request-Id": "req-of-the-engine"})
        case "garble":
            return HttpResponse(200, b"<html>", {"Content-Type": "text/html"})
    return json_response(ROUTES[request.path](body))


async def main(options: argparse.Namespace) -> None:
    listeners = await trio.open_tcp_listeners(options.port, host="127.0.0.1")
    await serve_http(partial(app, options), listeners)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--latency", type=float, default=0.0)
    trio.run(main, parser.parse_args())
