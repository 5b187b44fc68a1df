"""Jinja2 for templates that a stranger wrote: its sandbox, plus a budget of work and of text.

Jinja's sandbox keeps a template from reaching Python's insides, not from looping for a year or
making a string of a terabyte. Here every loop, call, filter, operator and literal reports to a
`Budget` before it costs much. That rests on one invariant: no value that a template can build is
larger than the budget, so whatever the template then does with it (compare, print, slice) is
bounded too. What can break it in one step is not offered: padding methods, most numeric formatting,
recursive loops. Templates are parsed with the options of Hugging Face's transformers, for which they
are written; nothing here knows what a chat is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import wraps
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
"""Turns of loops, weighed by what they hold: a long conversation takes some thousands."""
MAX_CHARACTERS = 1 << 25
"""Of all strings made on the way, which is also the largest one possible."""
MAX_BITS = 4096
"""Of an integer."""

_STRING_METHODS = """
    capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal
    isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
    removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper
"""
_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby int items last length list
    lower map max min reject rejectattr reverse safe select selectattr sort string title truncate
    unique upper wordcount
"""
# A width or precision of four digits, one taken from an argument, or a field within a field.
_COSTLY_FORMAT = re.compile(r"\d{4}|\*|:[^{}]*\{")
_COSTLY_PERCENT = re.compile(r"\d{4}|\*")


class TemplateTooCostly(TemplateRuntimeError):
    """A template ran out of its budget."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Budget:
    """What one rendering may still cost."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_CHARACTERS
        self._longest = 0

    def turns(self, count: int, weight: int) -> None:
        """Pay for a body to run `count` times; dearer the larger the values about, as it may walk one."""
        self.step(1 + count * weight * (1 + self._longest // 4096))

    def step(self, weight: int = 1) -> None:
        """Pay for one operation."""
        self._steps -= weight
        if self._steps < 0:
            raise TemplateTooCostly(f"the template took more than {MAX_STEPS} steps")

    def characters(self, count: int) -> None:
        """Pay for text before it is made."""
        self._characters -= count
        if self._characters < 0:
            raise TemplateTooCostly(f"the template made more than {MAX_CHARACTERS} characters")
        self._longest = max(self._longest, count)

    def check(self, *values: object, elements_a_step: int = 16) -> None:
        """Pay for going through values, and refuse those that are too large once written out."""
        elements = length = 0
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            elements += 1
            if isinstance(value, str):
                length += len(value)
                self._longest = max(self._longest, len(value))
            elif isinstance(value, Mapping):
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
            elif isinstance(value, range):
                elements += len(value)
            elif isinstance(value, Namespace):
                raise TemplateTooCostly("the template uses a namespace as a value")
            elif isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise TemplateTooCostly(f"the template made an integer of over {MAX_BITS} bits")
            if elements + len(waiting) > MAX_STEPS or length > MAX_CHARACTERS:
                raise TemplateTooCostly("the template made a value that is too large")
        self._longest = max(self._longest, 16 * elements)
        self.step(1 + elements // elements_a_step)


class _Metering(NodeTransformer):
    """Rewrites a parsed template so that loops, macros, `~` and literals report to the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("the template uses a recursive loop")
        weight = _weight([*node.body, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = _call("walk", node.iter, nodes.Const(weight))
        return node

    def _metered_body(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        weight = _weight(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("pay", nodes.Const(weight))))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _metered_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_text", *node.nodes)

    def _checked(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        parts = node.iter_child_nodes()
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        if is_target or all(isinstance(part, nodes.Const) for part in parts):
            return node
        return _call("checked", node)

    visit_List = visit_Tuple = visit_Dict = _checked


def _call(name: str, *args: nodes.Node) -> nodes.Call:
    expressions = [arg for arg in args if isinstance(arg, nodes.Expr)]
    return nodes.Call(nodes.EnvironmentAttribute(name), expressions, [], None, None)


def _weight(body: Iterable[nodes.Node]) -> int:
    """What one turn through a body costs: its size, with the text in it."""
    count = length = 0
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        count += 1
        if isinstance(node, nodes.TemplateData):
            length += len(node.data)
        waiting += node.iter_child_nodes()
    return 1 + count // 16 + length // 256


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """One rendering's environment: make a new one, with a new budget, for each."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would do the work before anyone pays for it
            finalize=self._finalize,
            extensions=[loopcontrols, _Generation],
        )
        self._string_methods = frozenset(_STRING_METHODS.split())
        self.globals = {"range": safe_range, "dict": dict, "namespace": Namespace}
        own: dict[str, Callable[..., Any]] = {
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": _to_json,
            "trim": self._trim,
        }
        offered = {name: self.filters[name] for name in _FILTERS.split()} | own
        self.filters = {name: self._metered(function) for name, function in offered.items()}

    def compile_untrusted(self, source: str) -> CodeType:
        """The code of a template; raises whatever jinja2, and Python's compiler under it, may raise."""
        return self.compile(source)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Metering().visit(tree)
        return tree

    # What metered templates call

    def pay(self, weight: int) -> None:
        self.budget.turns(1, weight)

    def checked(self, value: Any) -> Any:
        """The value, paid for: a literal just built or an expression about to be printed."""
        self.budget.check(value)
        if isinstance(value, str):
            self.budget.characters(len(value))
        return value

    @pass_context  # so that jinja2 finalizes, and so evaluates, nothing while it compiles
    def _finalize(self, context: Context, value: Any) -> Any:
        return self.checked(value)

    def walk(self, iterable: Iterable[Any], weight: int) -> Iterable[Any]:
        """What a loop goes over, with all its turns paid for."""
        items = iterable if isinstance(iterable, Sized) else list(iterable)
        self.budget.turns(len(items), weight)
        return items

    def join_text(self, *parts: Any) -> str:
        self.budget.check(*parts)
        texts = [str(part) for part in parts]
        self.budget.characters(sum(map(len, texts)))
        return "".join(texts)

    # What jinja2's sandbox lets one intercept

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.check(left, right)
        match operator:
            case "*":
                self._pay_for_product(left, right)
            case "**" if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() * abs(right) > MAX_BITS:
                    raise TemplateTooCostly(f"the template asks for {operator} of large integers")
            case "%" if isinstance(left, str) and _COSTLY_PERCENT.search(left):
                raise TemplateTooCostly("the template formats to a great or computed width")
            case "+" if isinstance(left, Sized) and isinstance(right, Sized):
                self.budget.characters(len(left) + len(right))
        return self._checked_result(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are jinja2's: they keep clear of the template's own keyword arguments.
        self, function = __self, __obj
        owner = getattr(function, "__self__", None)
        if owner is self:
            return function(*args)  # jinja2 adds the variables in scope as keywords
        self.budget.step()
        if not isinstance(function, Macro):
            self.budget.check(*args, *kwargs.values())
        if isinstance(owner, str):
            self._pay_for_method(owner, getattr(function, "__name__", ""), args)
        result = super().call(__context, function, *args, **kwargs)
        return result if isinstance(result, Namespace) else self._checked_result(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in self._string_methods:
            return False
        if isinstance(obj, int | float | complex | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _COSTLY_FORMAT.search(value.__self__):
            raise TemplateTooCostly("the template formats to a great or computed width")
        return wrapped

    def _checked_result(self, value: Any) -> Any:
        return self.checked(value) if isinstance(value, str | int | list | tuple | Mapping) else value

    def _pay_for_product(self, left: Any, right: Any) -> None:
        for many, times in ((left, right), (right, left)):
            if isinstance(many, Sized) and isinstance(times, int):
                self.budget.characters(len(many) * max(times, 0))
                return

    def _pay_for_method(self, owner: str, name: str, args: tuple[Any, ...]) -> None:
        if name == "join" and args and isinstance(args[0], Sized):
            self.budget.characters(len(owner) * len(args[0]))
        if name in ("strip", "lstrip", "rstrip") and args and isinstance(args[0], str) and len(args[0]) > 64:
            raise TemplateTooCostly("the template strips more than 64 kinds of characters")
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self.budget.characters(len(owner) + owner.count(args[0]) * len(args[1]))

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # jinja2 marks filters that want the context, or this environment, as their first argument.
        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = [arg for arg in args if not isinstance(arg, Context)]
            self.budget.check(*values, *kwargs.values(), elements_a_step=2)  # a filter may well sort
            return self._checked_result(function(*args, **kwargs))

        return metered

    # Filters whose result can be much larger than their arguments

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = [item if attribute is None else self.getitem(item, attribute) for item in value]
        self.budget.check(items)
        self.budget.characters(len(d) * len(items))
        return d.join(str(item) for item in items)

    def _replace(self, s: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(s)
        self._pay_for_method(text, "replace", (old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _trim(self, value: Any, chars: str | None = None) -> str:
        self._pay_for_method("", "strip", () if chars is None else (chars,))
        return str(value).strip(chars)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text = str(value)
        if _COSTLY_PERCENT.search(text):
            raise TemplateTooCostly("the template formats to a great or computed width")
        result: str = text % (kwargs or args)
        return result

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        filling = width if isinstance(width, str) else " " * min(width, 256)
        lines = str(s).splitlines() or [""]
        self.budget.characters(len(filling) * len(lines))
        indented = [filling + line if (blank or line) else line for line in lines]
        if not first:
            indented[0] = lines[0]
        return "\n".join(indented)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: jinja2's own would escape < and > for HTML."""
    if isinstance(indent, int):
        indent = min(indent, 16)
    elif isinstance(indent, str):
        indent = indent[:16]
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)
