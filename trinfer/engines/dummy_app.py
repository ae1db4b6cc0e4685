"""What the dummy engine answers: an OpenAI-compatible API whose "model" is a hash.

Rule: the same request always gets the same answer, with token counts that add up, so that pipelines can be tested
without a GPU and their results compared. A token is a word here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import trio

from trinfer.errors import ConfigError
from trinfer.http.serving import HttpRequest, HttpResponse, json_response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

__all__ = ["DummyApp", "DummyOptions"]

WORDS = """
the a one some each river mountain lamp window paper garden letter winter engine kettle bridge
signal harbour quiet green sudden narrow patient bright hollow early keeps finds opens carries
follows measures answers leaves under over beyond between beside slowly often never always together
again because while until
""".split()  # noqa: SIM905  # a list literal would be forty lines
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class DummyOptions:
    """Behaviour of the dummy engine, given as ``model_kwargs``.

    Attributes:
        latency: seconds before the first token, >= 0.
        token_latency: seconds for each further token, >= 0.
        max_concurrency: requests that are worked on at once, >= 1; more wait. 0 is no limit.
        queue_limit: requests that may wait, >= 0; more get status 429 with Retry-After. -1 is no limit.
        error_rate: share of requests that fail, from 0 to 1; which ones depends on their content only.
        error_status: the status they fail with, from 400 to 599.
        load_time: seconds during which it answers 503, as engines do that load, >= 0.
        min_tokens: shortest answer, >= 0, unless max_tokens is smaller.
    """

    latency: float = 0.0
    token_latency: float = 0.0
    max_concurrency: int = 0
    queue_limit: int = -1
    error_rate: float = 0.0
    error_status: int = 500
    load_time: float = 0.0
    min_tokens: int = 4

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> DummyOptions:
        """Read and check ``model_kwargs``.

        Raises:
            ConfigError: an unknown key, or a value out of its range.
        """
        known = {f.name: f.default for f in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in kwargs.items():
            name = key.replace("-", "_")
            if name not in known:
                raise ConfigError(
                    f"InferenceConfig.model_kwargs has {key!r}: allowed for the dummy engine are {', '.join(known)}"
                )
            low, high = _RANGES[name]
            kind = int if isinstance(known[name], int) else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
                what = "an integer" if kind is int else "a number"
                raise ConfigError(
                    f"InferenceConfig.model_kwargs[{key!r}] is {value!r}: allowed is {what} from {low:g} to {high:g}"
                )
            given[name] = value
        return cls(**given)


_RANGES: dict[str, tuple[float, float]] = {
    "latency": (0, 86400),
    "token_latency": (0, 3600),
    "max_concurrency": (0, 1_000_000),
    "queue_limit": (-1, 1_000_000),
    "error_rate": (0, 1),
    "error_status": (400, 599),
    "load_time": (0, 86400),
    "min_tokens": (0, 100_000),
}


class _Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


@dataclass(frozen=True)
class _Generation:
    """One choice: its words, and why it ended."""

    words: tuple[str, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        return " ".join(self.words)


class DummyApp:
    """The handler of the dummy engine's HTTP server."""

    def __init__(self, model: str, *, max_context: int, options: DummyOptions, api_key: str | None = None) -> None:
        self._model = model
        self._max_context = max_context
        self._options = options
        self._api_key = api_key
        self._slots = trio.Semaphore(options.max_concurrency) if options.max_concurrency else None
        self._began = trio.current_time()
        self.requests = 0

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._route(request)
        except _Refusal as refusal:
            error = {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.status}
            return json_response({"error": error}, refusal.status, refusal.headers)

    async def _route(self, request: HttpRequest) -> HttpResponse:
        path = request.path
        # As with vLLM, probes and counters need no key.
        if (
            self._api_key is not None
            and path.startswith("/v1/")
            and request.headers.get("authorization") != f"Bearer {self._api_key}"
        ):
            raise _Refusal(401, "Unauthorized", "AuthenticationError")
        if trio.current_time() - self._began < self._options.load_time:
            raise _Refusal(503, "Loading model", "unavailable_error")
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "trinfer"}
        match request.method, path:
            case "GET", "/health":
                return json_response({"status": "ok"})
            case "GET", "/v1/models":
                return json_response({"object": "list", "data": [entry]})
            case "GET", _ if path.startswith("/v1/models/"):
                self._check_model(unquote(path.removeprefix("/v1/models/")))
                return json_response(entry)
            case "POST", "/v1/chat/completions":
                return await self._complete(request, chat=True)
            case "POST", "/v1/completions":
                return await self._complete(request, chat=False)
        raise _Refusal(404, f"no route {request.method} {path}", "NotFoundError")

    def _check_model(self, name: Any) -> None:  # noqa: ANN401  # from a payload: anything
        if name is not None and name != self._model:
            raise _Refusal(404, f"The model `{name}` does not exist.", "NotFoundError")

    async def _complete(self, request: HttpRequest, *, chat: bool) -> HttpResponse:
        payload = _read_payload(request.body)
        self._check_model(payload.get("model"))
        prompts = _chat_prompt(payload) if chat else _prompts(payload)
        limit = _max_tokens(payload)
        for prompt in prompts:
            asked = len(prompt.split()) + limit
            if asked > self._max_context:
                raise _Refusal(
                    400,
                    f"This model's maximum context length is {self._max_context} tokens. However, you requested "
                    f"{asked} tokens ({len(prompt.split())} in the messages, {limit} in the completion). Please reduce "
                    "the length of the messages or completion.",
                )
        copies = 1 if payload.get("n") is None else payload["n"]
        if not isinstance(copies, int) or isinstance(copies, bool) or not 1 <= copies <= 128:
            raise _Refusal(400, "n must be an integer from 1 to 128")
        streaming, with_usage = _stream_options(payload)
        self._maybe_fail(prompts)
        self._check_queue()
        self.requests += 1
        generations = [self._generate(prompt, limit, copy) for prompt in prompts for copy in range(copies)]
        answer = _Answer(self._model, prompts, generations, chat=chat, number=self.requests)
        if streaming:
            return HttpResponse(200, b"", {"Content-Type": "text/event-stream"}, self._stream(answer, with_usage))
        async with self._slots or contextlib.nullcontext():
            await trio.sleep(self._work(max(len(g.words) for g in generations)))
        return json_response(answer.whole())

    def _maybe_fail(self, prompts: list[str]) -> None:
        if self._options.error_rate and _seed("fail", *prompts) % 10**6 < self._options.error_rate * 10**6:
            raise _Refusal(self._options.error_status, "injected error", "InjectedError")

    def _work(self, tokens: int) -> float:
        return self._options.latency + self._options.token_latency * max(0, tokens - 1)

    def _check_queue(self) -> None:
        limit = self._options.queue_limit
        if self._slots is None or limit < 0 or self._slots.value > 0:
            return
        if self._slots.statistics().tasks_waiting >= limit:
            raise _Refusal(429, "Too many requests are waiting", "RateLimitError", **{"Retry-After": "1"})

    def _generate(self, prompt: str, limit: int, copy: int) -> _Generation:
        chance = random.Random(_seed(self._model, prompt, str(copy)))
        wanted = self._options.min_tokens + int(chance.expovariate(1 / 12))
        words = tuple(chance.choice(WORDS) for _ in range(min(wanted, limit)))
        return _Generation(words, "length" if wanted > limit else "stop")

    async def _stream(self, answer: _Answer, usage: bool) -> AsyncGenerator[bytes, None]:
        async with self._slots or contextlib.nullcontext():
            await trio.sleep(self._options.latency)
            for index, generation in enumerate(answer.generations):
                yield _event(answer.piece(index, "", None, first=True))
                for number, word in enumerate(generation.words):
                    if number and self._options.token_latency:
                        await trio.sleep(self._options.token_latency)
                    yield _event(answer.piece(index, word if number == 0 else f" {word}", None))
                yield _event(answer.piece(index, "", generation.finish_reason))
        if usage:
            yield _event(answer.usage_piece())
        yield b"data: [DONE]\n\n"


@dataclass
class _Answer:
    """Writes one answer in OpenAI's forms."""

    model: str
    prompts: list[str]
    generations: list[_Generation]
    chat: bool
    number: int

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.number}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": choices,
        }

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, generation in enumerate(self.generations):
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": generation.text}}
                if self.chat
                else {"text": generation.text}
            )
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": generation.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._frame(kind, choices), "usage": self.usage()}

    def piece(self, index: int, text: str, finish_reason: str | None, *, first: bool = False) -> dict[str, Any]:
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {"content": text}
            choice: dict[str, Any] = {"index": index, "delta": {} if finish_reason else delta}
        else:
            choice = {"index": index, "text": text}
        choice |= {"logprobs": None, "finish_reason": finish_reason}
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage_piece(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._frame(kind, []), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.split()) for prompt in self.prompts)
        completion = sum(len(generation.words) for generation in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _seed(*parts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # A lone surrogate may come in as a JSON escape; it is no text, but no reason to fail either.
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "big")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _read_payload(body: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refusal(400, "the body is not JSON") from None
    if not isinstance(payload, dict):
        raise _Refusal(400, "the body is no JSON object")
    return payload


def _max_tokens(payload: dict[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = payload.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _Refusal(400, f"{name} must be at least 1, got {value!r}")
            return value
    return DEFAULT_MAX_TOKENS


def _stream_options(payload: dict[str, Any]) -> tuple[bool, bool]:
    """Whether to stream, and whether to end with the usage."""
    streaming = payload.get("stream")
    if not isinstance(streaming, bool | None):
        raise _Refusal(400, f"stream must be true or false, got {streaming!r}")
    options = payload.get("stream_options")
    if not isinstance(options, dict | None):
        raise _Refusal(400, "stream_options must be an object")
    if options is not None and not streaming:
        raise _Refusal(400, "stream_options can only be defined when stream is true")
    return bool(streaming), bool(options and options.get("include_usage"))


def _chat_prompt(payload: dict[str, Any]) -> list[str]:
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refusal(400, "messages must be a list with at least one message")
    texts = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refusal(400, "each message must be an object with a role")
        content = message.get("content")
        if isinstance(content, list):  # parts: texts, images
            if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
                raise _Refusal(400, "each part of a message's content must be an object with a type")
            content = " ".join(str(part.get("text", part["type"])) for part in content)
        if content is not None and not isinstance(content, str):
            raise _Refusal(400, "a message's content must be a text or a list of parts")
        texts.append(f"{message['role']}: {content or ''}")
    return ["\n".join(texts)]


def _prompts(payload: dict[str, Any]) -> list[str]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    prompt = payload.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return list(prompt)
        if _are_tokens(prompt):
            return [" ".join(map(str, prompt))]
        if all(isinstance(part, list) and part and _are_tokens(part) for part in prompt):
            return [" ".join(map(str, part)) for part in prompt]
    raise _Refusal(400, "prompt must be a text, a list of texts, or token ids")


def _are_tokens(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values)
