"""What a generation brought, read out of the answer of an OpenAI-compatible server.

Rule: nothing of the answer is lost (``raw`` keeps it whole), and what a server leaves out is None, not a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trinfer.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["InferenceResult"]


@dataclass(frozen=True)
class InferenceResult:
    """One finished generation.

    Attributes:
        text: the generated text; empty where the model only called tools.
        finish_reason: "stop", "length", "tool_calls", …, as the server gave it, or None.
        usage: token counts as the server gave them (prompt_tokens, completion_tokens, total_tokens).
        reasoning: the model's thinking, where the server separates it.
        tool_calls: the calls that the model asks for, as the server gave them.
        logprobs: kept as the server gave them.
        raw: the whole answer.
        parsed: the text, read into the model that `InferenceServer.generate` was asked for; else None.
    """

    text: str
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: Any = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    parsed: Any = None

    @property
    def prompt_tokens(self) -> int:
        return _count(self.usage, "prompt_tokens")

    @property
    def completion_tokens(self) -> int:
        return _count(self.usage, "completion_tokens")

    @classmethod
    def from_response(cls, response: Mapping[str, Any]) -> InferenceResult:
        """Read the first choice of a chat completion or a completion.

        Raises:
            ProtocolError: the answer has no choice with a text or a message.
        """
        choices = response.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise ProtocolError(
                "the server's answer holds no choices",
                cause="it is not an answer to a completion or chat completion",
                advice="check the route and the server: " + repr(sorted(response))[:200],
            )
        message = choice.get("message")
        if isinstance(message, dict):
            text = message.get("content")
            # vLLM and SGLang say reasoning_content, newer vLLM and OpenRouter say reasoning.
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            calls = message.get("tool_calls")
        else:
            text, reasoning, calls = choice.get("text"), None, None
            if text is None:
                raise ProtocolError("the server's answer holds a choice with neither text nor message")
        usage = response.get("usage")
        return cls(
            text=text if isinstance(text, str) else "",
            finish_reason=choice.get("finish_reason"),
            usage=usage if isinstance(usage, dict) else {},
            reasoning=reasoning if isinstance(reasoning, str) else None,
            tool_calls=tuple(calls) if isinstance(calls, list) else (),
            logprobs=choice.get("logprobs"),
            raw=response,
        )


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0
