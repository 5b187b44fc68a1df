"""Chat templates: what well-known models write, and templates written to do harm."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from omninfer.chat import MAX_PROMPT, MAX_TEMPLATE, ChatTemplate
from omninfer.testing.tiny_vocab import tiny_bpe, tiny_spm
from omnistore.errors import InputError, MalformedGGUF, UnsupportedModel

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b> "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


def template(source: str, **metadata: object) -> ChatTemplate:
    return ChatTemplate.from_metadata_untrusted(tiny_spm() | {"tokenizer.chat_template": source, **metadata})


def render(source: str, messages: list[dict[str, Any]] = TALK, **given: Any) -> str:
    return template(source).render(messages, **given)


def test_the_style_of_llama() -> None:
    source = """
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}
        {%- set content = bos_token + content %}
    {%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501  # as published
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    expected = "<s>" + "".join(header.format(m["role"], m["content"].strip()) for m in TALK)
    assert render(source, add_generation_prompt=False) == expected
    assert render(source) == expected + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_the_style_of_mistral() -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    assert render(source, TALK[1:]) == "<s>[INST]  Hi <b>  [/INST]Yes?</s>[INST] Bye [/INST]"
    with pytest.raises(InputError, match="Roles must alternate"):
        render(source, TALK)


def test_namespaces_macros_loop_controls_and_filters() -> None:
    source = """
{% macro line(role, text='none') %}
[{{ role | upper }}] {{ text }}
{% endmacro %}
{% set ns = namespace(seen=0, names=[]) %}
{% for m in messages if m.role != 'system' %}
    {% if m.content == 'Bye' %}{% break %}{% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% set ns.names = ns.names + [m.role] %}
{{ line(m.role, m.content | trim) }}
{%- endfor %}
{{ ns.seen }} {{ ns.names | join(', ') }} {{ messages[::-1][0].content }} {{ '%s-%d' % ('a', 3) }} {{ '{}/{:>3}'.format(1, 2) }}
{{ messages | map(attribute='role') | unique | list | length ~ '!' }} {{ 'a-b'.split('-')[1] }} {{ 'aXa' | replace('X', '..') }}
{%- generation %} said{% endgeneration %}
"""  # noqa: E501
    assert render(source) == (
        "\n[USER] Hi <b>\n[ASSISTANT] Yes?\n2 user, assistant Bye a-3 1/  2\n3! b a..a said"
    )


def test_tools_as_json() -> None:
    tools = [{"type": "function", "name": "f", "description": "<é>"}]
    assert (
        render("{{ tools | tojson }}", tools=tools)
        == '[{"type": "function", "name": "f", "description": "<é>"}]'
    )
    assert render("{% if tools %}yes{% else %}no{% endif %}") == "no"
    assert render("{{ {'a': [1]} | tojson(indent=2) }}") == '{\n  "a": [\n    1\n  ]\n}'
    both = template("plain", **{"tokenizer.chat_template.tool_use": "with tools"})
    assert both.render(TALK) == "plain"
    assert both.render(TALK, tools=tools) == "with tools"


def test_time_comes_from_the_caller() -> None:
    source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'never' }}"
    assert render(source, now=datetime(2026, 2, 3)) == "03 Feb 2026"
    assert render(source) == "never"


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    source = "{% for p in messages[0].content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    assert render(source, [{"role": "user", "content": parts}]) == "a"


def test_without_a_template() -> None:
    chatml = ChatTemplate.from_metadata_untrusted(tiny_bpe())
    assert chatml.is_fallback
    assert chatml.render(TALK[3:]) == "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    plain = ChatTemplate.from_metadata_untrusted(tiny_spm())
    assert plain.is_fallback
    assert plain.render(TALK[2:]) == "Assistant: Yes?\nUser: Bye\nAssistant:"
    assert not template("x").is_fallback


def test_the_bos_token_is_told() -> None:
    assert template("x").bos_token == "<s>"
    assert ChatTemplate.from_metadata_untrusted(tiny_bpe()).bos_token == ""
    assert template("x", **{"tokenizer.ggml.bos_token_id": 10**9}).bos_token == ""


def test_a_rendering_leaves_no_trace_in_the_next() -> None:
    counting = template(
        "{% set ns = namespace(n=0) %}{% for i in range(9999) %}{% endfor %}{{ messages | length }}"
    )
    assert [counting.render(TALK) for _ in range(300)] == ["4"] * 300  # a shared budget would run out


def test_a_long_conversation_is_affordable() -> None:
    long = [{"role": "user", "content": "word " * 20}] * 3000
    chatml = ChatTemplate.from_metadata_untrusted(tiny_bpe())
    assert len(chatml.render(long)) > 3000 * 100
    huge = [{"role": "user", "content": "x" * 1_000_000}]
    assert len(chatml.render(huge)) > 1_000_000


# Templates that are refused when the model is opened

UNUSABLE = {
    "syntax": ("{% for %}", "Expected an expression"),
    "unknown tag": ("{% frobnicate %}", "frobnicate"),
    "unknown filter": ("{{ 'x' | center(10 ** 10) }}", "center"),
    "filter that reaches attributes": ("{{ messages | attr('append') }}", "attr"),
    "recursive loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive"),
    "deep parentheses": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "Recursion"),
    "long chain": ("{{ 1" + "+1" * 20_000 + " }}", "Recursion"),
    "deep loops": ("{% for i in [1] %}" * 100 + "{% endfor %}" * 100, "levels of indentation|nested blocks"),
    "too long": ("x" * (MAX_TEMPLATE + 1), "characters"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_templates(fault: str) -> None:
    source, message = UNUSABLE[fault]
    with pytest.raises(UnsupportedModel, match=message):
        template(source)


# Templates that end in an InputError when they run, soon and without much memory

GROWING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(64) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{{{{ ns.x }}}}"
)
MANY = "{% for i in range(100000) %}"
END = "{% endfor %}"
COSTLY = {
    "large range": "{% for i in range(10**12) %}x{% endfor %}",
    "nested loops": MANY + MANY + END + END,
    "nested loops that skip": MANY + "{% for j in range(100000) if false %}" + END + END,
    "nested loops that write": MANY + MANY + "x" * 100 + END + END,
    "nested lazy loops": "{% for i in range(100000) | map('string') %}{% for j in range(100000) | select %}"
    + END + END,
    "long product": "{{ 'x' * 10**10 }}",
    "large power": "{{ 2 ** (10 ** 10) }}",
    "doubling text": GROWING.format(start="'aa'", step="ns.x ~ ns.x"),
    "doubling sum": GROWING.format(start="'aa'", step="ns.x + ns.x"),
    "doubling list": GROWING.format(start="[1]", step="[ns.x, ns.x]"),
    "doubling tuple": GROWING.format(start="[1]", step="(ns.x, ns.x)"),
    "doubling dict": GROWING.format(start="[1]", step="{'a': ns.x, 'b': ns.x}"),
    "doubling call": GROWING.format(start="[1]", step="dict(a=ns.x, b=ns.x)"),
    "squaring": GROWING.format(start="3", step="ns.x * ns.x"),
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
    "doubling macro": "{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "captured text": "{% set ns = namespace(x='a') %}" + MANY
    + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}" + END,
    "padding": "{{ 'x'.ljust(10**10) }}",
    "wide format": "{{ '{:>1000000000}'.format('x') }}",
    "computed format": "{{ '{:>{}}'.format('x', 10**9) }}",
    "wide format of a map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "computed percent": "{{ '%*d' % (10**9, 1) }}",
    "wide format filter": "{{ '%1000000000d' | format(1) }}",
    "many bytes": "{{ (1).to_bytes(10**9) }}",
    "join filter": "{{ range(100000) | map('string') | join('x' * 1000000) }}",
    "join method": "{{ ('x' * 1000000).join(range(1000) | map('string') | list) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "indent": "{{ ('\\n' * 1000000) | indent('x' * 1000) }}",
    "strip": "{{ ('a' * 10000000).strip('b' * 10000000 + 'a') }}",
    "trim": "{{ ('a' * 10000000) | trim('b' * 10000000 + 'a') }}",
    "slices": "{% set s = 'x' * 10000000 %}" + MANY + "{% if s[::-1] == 'y' %}{% endif %}" + END,
    "comparisons": "{% set a = range(100000) | list %}" + MANY + "{% if a == a[:] %}{% endif %}" + END,
    "sorting": MANY + "{% set x = range(100000) | sort %}" + END,
    "date": "{{ strftime_now('%999999999Y') }}",
    "python's insides": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ namespace.__init__.__globals__.x }}",
    "changing messages": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "no such name": "{{ foo.bar }}",
    "no number": "{{ 1 + 'a' }}",
    "division by zero": "{{ 1 // 0 }}",
    "no key": "{{ {}['a'].b }}",
    "the template's own refusal": "{{ raise_exception('no') }}",
    "long prompt": MANY + "x" * 1000 + END,
}  # fmt: skip


@pytest.mark.parametrize("fault", COSTLY)
def test_costly_templates(fault: str) -> None:
    opened = template(COSTLY[fault])
    started = time.process_time()
    with pytest.raises(InputError, match="chat template"):
        opened.render(TALK, now=datetime(2026, 1, 1))
    assert time.process_time() - started < 10  # seconds at most, where the template wants years


@pytest.mark.parametrize(
    "messages",
    [["hi"], [{"content": "x"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": 5}], [None]],
)
def test_messages_of_the_wrong_shape(messages: list[Any]) -> None:
    with pytest.raises(InputError, match=r"messages\[0\]"):
        render("x", messages)


def test_a_prompt_has_a_limit() -> None:
    with pytest.raises(InputError, match="characters"):
        render("{{ messages[0].content }}", [{"role": "user", "content": "x" * (MAX_PROMPT + 1)}])


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.chat_template": 5},
        {"tokenizer.chat_template": ["a"]},
        {"tokenizer.chat_template.tool_use": 5},
        {"tokenizer.ggml.tokens": "abc"},
    ],
)
def test_metadata_of_the_wrong_type(metadata: dict[str, object]) -> None:
    with pytest.raises(MalformedGGUF, match=next(iter(metadata))):
        ChatTemplate.from_metadata_untrusted(metadata)
