"""From the fields of a record to the request for one generation."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinfer.data.extras import load
from trinfer.data.records import InvalidRow
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Template

__all__ = ["PromptOptions", "Prompts", "read_template"]

MESSAGES = "messages"
PROMPT_FIELDS = (MESSAGES, "prompt", "text")
LARGEST_IMAGE = 32 * 2**20  # bytes
LONGEST_PROMPT = 64 * 2**20  # characters that a template may make
IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp"}


def read_template(path: str) -> str:
    """The text of a template file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"the template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"the template {path} is not UTF-8: {error.reason} at byte {error.start}") from error


@dataclass(frozen=True)
class PromptOptions:
    """How a row becomes a request.

    Attributes:
        use_chat: make ``messages`` (True) or a ``prompt`` (False).
        prompt_field: the field that holds the prompt; by default the first of messages, prompt and text.
        system_prompt: put before the messages of rows that have no system message of their own.
        template: text of a jinja2 template that makes the prompt out of the row's fields.
        image_field: the field that holds an image or a list of them: data URLs, http URLs, or paths.
        image_folder: where the paths begin; nothing outside is read.
    """

    use_chat: bool = True
    prompt_field: str | None = None
    system_prompt: str | None = None
    template: str | None = None
    image_field: str | None = None
    image_folder: str = "."


class Prompts:
    """Makes requests of rows.

    Raises:
        ConfigError: options that exclude each other, a template that is none, or jinja2 is missing.
    """

    def __init__(self, options: PromptOptions) -> None:
        self._options = options
        if not options.use_chat:
            for name in ("system_prompt", "image_field"):
                if getattr(options, name) is not None:
                    option = "--" + name.replace("_", "-")
                    raise ConfigError(f"{option} needs the chat route: allowed is one of {option} and --no-chat")
        if options.template is not None and options.prompt_field is not None:
            raise ConfigError("a template names its fields itself: allowed is one of --template and --prompt-field")
        self._template = _compile(options.template) if options.template is not None else None

    def payload(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """The request for a row.

        Raises:
            InvalidRow: the row has no prompt, or not of the right kind.
        """
        options = self._options
        prompt = self._prompt(fields, place)
        if isinstance(prompt, str):
            if not options.use_chat:
                return {"prompt": prompt}
            messages: list[Any] = [{"role": "user", "content": prompt}]
        else:
            messages = prompt
        if options.image_field is not None and fields.get(options.image_field) is not None:
            messages = self._with_images(messages, fields[options.image_field], place)
        if options.system_prompt is not None and messages[0]["role"] not in {"system", "developer"}:
            messages = [{"role": "system", "content": options.system_prompt}, *messages]
        return {"messages": messages}

    def _prompt(self, fields: Mapping[str, Any], place: str) -> str | list[Any]:
        if self._template is not None:
            return self._render(self._template, fields, place)
        options = self._options
        wanted = (options.prompt_field,) if options.prompt_field else PROMPT_FIELDS
        name = next((name for name in wanted if fields.get(name) is not None), None)
        if name is None:
            raise InvalidRow(f"{place}: the row has no field {' or '.join(map(repr, wanted))}")
        prompt = fields[name]
        if isinstance(prompt, list):
            if not options.use_chat:
                raise InvalidRow(f"{place}: the field {name!r} holds messages, which need the chat route")
            if not prompt or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in prompt):
                raise InvalidRow(f"{place}: the field {name!r} is no list of messages with roles")
            return prompt
        if isinstance(prompt, str) and name != MESSAGES:
            return prompt
        kinds = "no list of messages with roles" if name == MESSAGES else "neither a text nor a list of messages"
        raise InvalidRow(f"{place}: the field {name!r} is {kinds}")

    def _render(self, template: Template, fields: Mapping[str, Any], place: str) -> str:
        try:
            text: str = template.render(fields)
        except Exception as error:  # a template may fail in any way, and with it only its row
            raise InvalidRow(f"{place}: the template fails: {type(error).__name__}: {error}") from error
        if len(text) > LONGEST_PROMPT:
            raise InvalidRow(f"{place}: the template makes {len(text)} characters, more than {LONGEST_PROMPT}")
        return text

    def _with_images(self, messages: list[Any], images: object, place: str) -> list[Any]:
        """Put the images into the last message of the user."""
        urls = [self._image_url(each, place) for each in (images if isinstance(images, list) else [images])]
        at = next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "user"), None)
        if at is None:
            raise InvalidRow(f"{place}: there is no message of the user to put the images into")
        content = messages[at].get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        parts = [*parts, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
        return [*messages[:at], {**messages[at], "content": parts}, *messages[at + 1 :]]

    def _image_url(self, image: object, place: str) -> str:
        if not isinstance(image, str):
            raise InvalidRow(f"{place}: an image is a JSON {type(image).__name__}, not a text")
        if image.startswith(("data:", "http://", "https://")):
            return image
        root = os.path.realpath(self._options.image_folder)
        try:
            path = os.path.realpath(os.path.join(root, image))
            if os.path.commonpath([root, path]) != root:
                raise InvalidRow(f"{place}: the image {image!r} lies outside of {root}")
            # A pipe that nobody writes into would be waited for, and with it the whole run.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                data = file.read(LARGEST_IMAGE + 1)
        except OSError as error:
            raise InvalidRow(f"{place}: the image {image!r} cannot be read: {error.strerror}") from error
        except ValueError as error:  # no name can hold this: a NUL, or half a character
            raise InvalidRow(f"{place}: the image {image!r} is no name of a file: {error}") from error
        if len(data) > LARGEST_IMAGE:
            raise InvalidRow(f"{place}: the image {image!r} is larger than {LARGEST_IMAGE} bytes")
        kind = next((kind for magic, kind in IMAGES.items() if data.startswith(magic)), None)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "image/webp"
        if kind is None:
            raise InvalidRow(f"{place}: {image!r} is no image: allowed are PNG, JPEG, GIF, BMP and WebP")
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _compile(text: str) -> Template:
    load("jinja2", "--template")
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ConfigError(f"the template is not valid in line {error.lineno}: {error.message}") from error
    except (SyntaxError, RecursionError, ValueError) as error:  # of Python, which it is turned into
        raise ConfigError(f"the template cannot be used: {error}", cause="it is nested too deeply") from error
