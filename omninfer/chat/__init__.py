"""Chat templates: a conversation to the prompt that a model was trained on.

The template is a Jinja2 program in the GGUF (`tokenizer.chat_template`) and so an untrusted input: it
runs in the sandbox and under the budget of `omninfer.chat.sandbox`. No clock is read here (a template
that writes the date gets it from `render`'s `now`) and nothing is tokenized. Encode what comes out
with `parse_special=True`, and with `add_special` only if it does not begin with `bos_token`: most
templates write BOS themselves, and a model must not see two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError

from omninfer.chat.sandbox import MeteredEnvironment
from omnistore.errors import InputError, MalformedGGUF, UnsupportedModel

__all__ = ["ChatTemplate"]

MAX_TEMPLATE = 1 << 16
"""Characters; the longest published templates have about 20 thousand."""
MAX_PROMPT = 1 << 22
"""Characters of a rendered conversation."""

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TRANSCRIPT = """\
{%- for message in messages %}
{{- message['role']|capitalize + ': ' + message['content'] + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# What a template's own expressions can raise once jinja2 runs them as Python.
_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError too
    SyntaxError,  # from Python's compiler, on what jinja2 generated
    TypeError,
    ValueError,
)

_PLAIN_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")


class ChatTemplate:
    """The compiled chat template of one model. Safe to use from several threads."""

    def __init__(
        self, source: str, tools_source: str | None, special: Mapping[str, str], fallback: bool
    ) -> None:
        """Compile the templates; raises UnsupportedModel. `special` maps bos_token and the like to texts."""
        self._plain = _compile_untrusted(source)
        self._with_tools = None if tools_source is None else _compile_untrusted(tools_source)
        self._special = dict(special)
        self._is_fallback = fallback

    @classmethod
    def from_metadata_untrusted(cls, metadata: Mapping[str, object]) -> ChatTemplate:
        """The template of a model, or a stand-in where it has none.

        The stand-in is ChatML if the vocabulary has its marks, since then the model was tuned on
        them; else a transcript of `User:` and `Assistant:` lines, the best guess for a base model.

        Raises MalformedGGUF where the metadata has the wrong types, and UnsupportedModel where the
        template is no Jinja2, too long, or uses what the sandbox does not offer.
        """
        source = _text_untrusted(metadata, "tokenizer.chat_template")
        tools_source = _text_untrusted(metadata, "tokenizer.chat_template.tool_use")
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
            raise MalformedGGUF("tokenizer.ggml.tokens is not an array")
        special = {}
        for name in ("bos", "eos", "unknown", "padding"):
            id_ = metadata.get(f"tokenizer.ggml.{name}_token_id")
            token = tokens[id_] if isinstance(id_, int) and 0 <= id_ < len(tokens) else ""
            special[f"{name.removesuffix('nown').removesuffix('ding')}_token"] = str(token)
        if source is not None:
            return cls(source, tools_source, special, fallback=False)
        is_chatml = {"<|im_start|>", "<|im_end|>"} <= {token for token in tokens if isinstance(token, str)}
        return cls(CHATML if is_chatml else TRANSCRIPT, tools_source, special, fallback=True)

    @property
    def is_fallback(self) -> bool:
        """The model has no template, and the stand-in may not be what it was trained on."""
        return self._is_fallback

    @property
    def bos_token(self) -> str:
        """The text of the BOS token, empty if the model has none."""
        return self._special["bos_token"]

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt for a conversation, ending where the assistant is to speak.

        A message has a `role` and mostly a `content`. `strftime_now` exists for the template only
        where `now` is given. Raises InputError: for messages of the wrong shape, and for a template
        that refuses them, fails on them or costs too much.
        """
        _check_messages(messages)
        environment = MeteredEnvironment()
        given: dict[str, Any] = {
            **self._special,
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "raise_exception": _raise_exception,
        }
        if now is not None:
            given["strftime_now"] = lambda pattern: _date(now, pattern)
        code = self._with_tools if tools and self._with_tools is not None else self._plain
        template = Template.from_code(environment, code, environment.globals)
        pieces: list[str] = []
        length = 0
        try:
            environment.budget.check(given["messages"], given["tools"])
            for piece in template.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT:
                    raise InputError(f"the chat template wrote a prompt of over {MAX_PROMPT} characters")
        except _FAULTS as error:
            raise InputError(
                f"the model's chat template failed on these messages: {_describe(error)}",
                remedy="Check roles and their order; or send a plain prompt, which needs no template.",
            ) from None
        return "".join(pieces)


def _compile_untrusted(source: str) -> CodeType:
    if len(source) > MAX_TEMPLATE:
        raise UnsupportedModel(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE}")
    try:
        return MeteredEnvironment().compile_untrusted(source)
    except _FAULTS as error:
        raise UnsupportedModel(
            f"the model's chat template can not be used: {_describe(error)}",
            remedy="Send plain prompts, which need no template.",
        ) from None


def _describe(error: BaseException) -> str:
    text = str(error)[:300]
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}"


def _text_untrusted(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise MalformedGGUF(f"{key} is {type(value).__name__}, not a string")
    return value


def _check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{number}] is not a mapping with a role")
        if not isinstance(message.get("content"), str | list | None):
            raise InputError(f"the content of messages[{number}] is neither text nor a list of parts")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _date(now: datetime, pattern: object) -> str:
    # C libraries know widths (%999999999Y): only plain conversions.
    if not isinstance(pattern, str) or len(pattern) > 100 or not _PLAIN_DATE.fullmatch(pattern):
        raise TemplateError("the template formats the date in an unsupported way")
    return now.strftime(pattern)
