"""Chat templates rendered within limits: one that comes with a model is a program, and may loop or grow for ever.

transformers has a sandbox, from which a template cannot escape, but in which it may run and take memory as it likes.
Here each step of a loop, and each value that is made, is counted. Not limited are templates that are rendered
otherwise than by a `VoraProcessor`, or where `vora` is not installed and a folder's own code is trusted.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

MOST_STEPS = 2_000_000  # some seconds; a conversation takes thousands
MOST_SECONDS = 5.0  # of processor time
MOST_EXTENT = 50_000_000  # of what one operation may make
MOST_TEMPLATE = 1_000_000  # characters
BYTES_PER_STEP = 64  # of values made
WORK_PER_STEP, READ_PER_STEP = 1024, 256  # characters or members that an operation goes through, or that are read
FREE = {"length", "count", "first", "last", "default", "d"}  # filters that look at no members
LIGHT = {
    "string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "boolean", "true", "false",
}  # fmt: skip
WHOLE = {  # filters that take a text as a whole; others make something of each of its characters
    "trim", "upper", "lower", "capitalize", "replace", "string", "safe", "tojson", "escape", "e", "forceescape",
    "center", "format", "join", "attr", "int", "float", "abs", "round", "items", *FREE,
}  # fmt: skip
SLOW = {"lipsum", "urlize", "wordwrap", "pprint"}  # and of no use in a chat
UNBOUNDED = {"translate", "maketrans"}  # methods whose result may be as long as it likes
PARTING = {"split", "rsplit", "splitlines"}
FORMATS = {"format", "format_map", "%", "strftime_now"}
PLAIN = (int, bool, float, type(None))
NUMBER = re.compile(r"\d{1,18}")
OPERATORS = frozenset({"+", "*", "%", "//", "**"})

STEPS_PER_LOOK = 2000  # at the clock
SHORTEN = ", or shorten the conversation where that is long"
Result = TypeVar("Result")


class _Meter:
    """What a rendering may still take."""

    def __init__(self) -> None:
        self.steps, self.next_look, self.end = MOST_STEPS, MOST_STEPS, time.thread_time() + MOST_SECONDS

    def look(self) -> None:
        if self.steps < 0:
            raise _too_much(f"it takes more than {MOST_STEPS:,} steps", SHORTEN)
        if time.thread_time() > self.end:
            raise _too_much(f"it takes longer than {MOST_SECONDS:g} seconds", SHORTEN)
        self.next_look = max(0, self.steps - STEPS_PER_LOOK)


_meter: ContextVar[_Meter | None] = ContextVar("of the rendering at hand", default=None)


@contextmanager
def template_limits() -> Iterator[None]:
    """Chat templates that transformers renders within, in this thread, take so many steps; else a ValueError, which
    also says what a template refuses or cannot read."""
    token = _meter.set(_Meter())
    try:
        yield
    except RecursionError:
        raise _too_much("it is nested too deeply") from None
    except jinja2.TemplateError as error:
        raise _not_taken(error) from error
    finally:
        _meter.reset(token)


def limited(render: Callable[..., Result]) -> Callable[..., Result]:
    """A function within `template_limits`."""

    @wraps(render)
    def within(*args: Any, **kwargs: Any) -> Result:
        with template_limits():
            return render(*args, **kwargs)

    return within


def install() -> None:
    """Have transformers compile what is rendered within limits by this environment, and all else as ever."""
    theirs = chat_template_utils._compile_jinja_template
    if getattr(theirs, "limits", False):
        return

    @wraps(theirs)
    def compiled(chat_template: str) -> jinja2.Template:
        return theirs(chat_template) if _meter.get() is None else _compiled(chat_template)

    setattr(compiled, "limits", True)
    setattr(chat_template_utils, "_compile_jinja_template", compiled)


@lru_cache(maxsize=64)
def _compiled(chat_template: str) -> jinja2.Template:
    if len(chat_template) > MOST_TEMPLATE:
        raise _too_much(f"it has {len(chat_template):,} characters")
    token = _meter.set(None)
    try:
        theirs = chat_template_utils._compile_jinja_template("").environment
    finally:
        _meter.reset(token)
    try:
        return LimitedEnvironment(theirs).from_string(chat_template)
    except (SyntaxError, OverflowError) as error:  # of Python's compiler, as of loops nested deeply
        raise _not_taken(error) from error


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The filters, functions and tags of another environment, whose use is counted."""

    intercepted_binops = OPERATORS

    def __init__(self, theirs: jinja2.Environment) -> None:
        extensions = [type(one) for one in theirs.extensions.values()]
        # nothing is computed while it is compiled: neither constants, nor output, as its `finalize` asks for a context
        how: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False, "finalize": _written}
        super().__init__(extensions=extensions, **how)
        kept = {name: function for name, function in theirs.filters.items() if name not in SLOW}
        self.filters = {name: _counted_filter(name, function) for name, function in kept.items()}
        self.globals = {name: value for name, value in theirs.globals.items() if name not in SLOW}
        self.template_steps, self.template_made, self.template_read = _steps, _made, _read

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> Any:
        for output in list(source.find_all(nodes.Output)):
            output.nodes = [
                nodes.Const(one.data, lineno=one.lineno) if isinstance(one, nodes.TemplateData) else one
                for one in output.nodes
            ]
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _call("template_steps", loop.iter)
        for join in list(source.find_all(nodes.Concat)):
            join.nodes = [one if isinstance(one, nodes.Const) else _call("template_read", one) for one in join.nodes]
        for comparison in list(source.find_all(nodes.Compare)):
            operands = [comparison.expr, *(operand.expr for operand in comparison.ops)]
            if not any(isinstance(one, nodes.Const) for one in operands) or comparison.ops[0].op in ("in", "notin"):
                comparison.expr = _call("template_read", comparison.expr)
                for operand in comparison.ops:
                    operand.expr = _call("template_read", operand.expr)
        for test in list(source.find_all(nodes.Test)):
            if test.name not in LIGHT:
                test.node = _call("template_read", test.node)
        _replace(source, (nodes.List, nodes.Tuple, nodes.Dict), lambda node: getattr(node, "ctx", "load") == "load")
        _replace(source, (nodes.Getitem,), lambda node: isinstance(node.arg, nodes.Slice))
        _replace(source, (nodes.Concat,), lambda node: True)
        return super()._generate(source, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "%", "//", "**"):
            _check(left.bit_length() * right.bit_length())
        if operator == "**":
            _check(max(1, *map(_extent, (left, right))) ** 2)
        elif operator == "+":
            _check(_extent(left) + _extent(right) if not isinstance(left, (int, float)) else 1)
            if isinstance(left, list) and isinstance(right, list):  # members were read when they were put in a list
                return _kept(super().call_binop(context, operator, left, right))
        elif not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
            operands = (left, *right) if isinstance(right, tuple) else (left, right)
            _check(_product(operands, operator))
            for operand in operands if operator == "%" else ():
                _read(operand)
        return _made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        _read(argument)  # hashed, or written where there is no such member
        return super().getitem(obj, argument)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Raise what a rendering met, what Python itself raised there as a ValueError in one line."""
        error = sys.exc_info()[1]
        if error is None or isinstance(error, (_Refused, jinja2.TemplateError, RecursionError)):
            super().handle_exception(source)
        raise _not_taken(error) from error

    def call(*args: Any, **kwargs: Any) -> Any:  # self, context and function by place, as any name may be a keyword
        environment, context, function, *rest = args
        name = getattr(function, "__name__", "")
        itself = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        operands = [itself, *rest, *kwargs.values()]
        if isinstance(itself, str) and name in UNBOUNDED:
            raise _too_much(f"it uses {name}")
        if isinstance(itself, str) and name in PARTING:
            mark = operands[1] if len(operands) > 1 and isinstance(operands[1], str) and operands[1] else None
            _spend(itself.count(mark) if mark else len(itself) // 2)
        _use(operands, name)
        return _made(ImmutableSandboxedEnvironment.call(environment, context, function, *rest, **kwargs))


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # also which of context and environment it is given
    def counted(*args: Any, **kwargs: Any) -> Any:
        operands = [*args[bool(getattr(function, "jinja_pass_arg", None)) :], *kwargs.values()]
        for operand in operands if name not in WHOLE else ():
            _spend(len(operand) if isinstance(operand, str) else 0)
        if name not in FREE:
            _use(operands, name)
        return _made(function(*args, **kwargs))

    return counted


def _use(operands: Sequence[Any], name: str) -> None:
    """Before a function or filter is called: what it may make, and what it reads."""
    _check(_replaced(operands) if name == "replace" else _product(operands, name))
    for operand in operands:
        _read(operand, BYTES_PER_STEP if name == "join" else READ_PER_STEP)  # a join's result is as large as its parts


def _call(name: str, node: nodes.Node) -> nodes.Expr:
    found = nodes.Call(nodes.EnvironmentAttribute(name), [node], [], None, None)
    found.set_lineno(node.lineno)
    found.environment = node.environment
    return found


def _replace(node: nodes.Node, kinds: tuple[type[nodes.Node], ...], wanted: Callable[[Any], bool]) -> None:
    """Have what these kinds of nodes make counted."""
    for name, value in node.iter_fields():
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, nodes.Node):
                continue
            _replace(child, kinds, wanted)
            if isinstance(child, kinds) and wanted(child) and not isinstance(node, nodes.Call | nodes.Getitem):
                counted = _call("template_made", child)  # type: ignore[arg-type]
                if place is None:
                    setattr(node, name, counted)
                else:
                    value[place] = counted


def _spend(steps: int) -> None:
    meter = _meter.get()
    if meter is None:
        raise _too_much("it goes on after it was rendered")
    meter.steps -= steps
    if meter.steps < meter.next_look or meter.steps < 0:
        meter.look()


def _check(extent: int) -> None:
    """Before something is made."""
    if extent > MOST_EXTENT:
        raise _too_much(f"an operation in it would make more than {MOST_EXTENT:,} characters or members")
    _spend(1 + extent // WORK_PER_STEP)


def _made(value: Any) -> Any:
    """A value that was made, its memory and its members counted."""
    if value is None or value is True or value is False:
        return value
    if not isinstance(value, str):
        _read(value)
    return _kept(value)


def _kept(value: Any) -> Any:
    """A value whose own memory is counted, without its members'."""
    _spend(1 + sys.getsizeof(value) // BYTES_PER_STEP)
    return value


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    return _made(value)


def _read(value: Any, per_step: int = READ_PER_STEP) -> Any:
    """A value whose members are gone through, those of its members too, as often as they are there."""
    kind = type(value)
    if kind is str or isinstance(value, str):
        _spend(1 + len(value) // per_step)
        return value
    members: Iterable[Any] = ()
    if kind in PLAIN:
        pass
    elif kind is list or isinstance(value, (list, tuple)):
        members = value
    elif kind is dict or isinstance(value, Mapping):
        members = value.values()
    elif isinstance(value, jinja2.utils.Namespace):
        members = (getattr(value, "_Namespace__attrs"),)
    for one in members:
        _read(one, per_step)
    _spend(1)
    return value


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(1)
        yield value


def _extent(value: Any) -> int:
    kind = type(value)
    if kind is str or isinstance(value, (str, list, dict, tuple, bytes, range, Mapping)):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _product(operands: Iterable[Any], name: str) -> int:
    """The most that could be made of operands: a number may be a width, or how often something is repeated."""
    found = 1
    for operand in operands:
        found *= _extent(operand) or 1
        if name in FORMATS and isinstance(operand, str):
            found *= max((int(number) for number in NUMBER.findall(operand)), default=1) or 1
    return found


def _replaced(operands: Sequence[Any]) -> int:
    text, old, new = [str(one) for one in operands if isinstance(one, str)][:3] + [""] * (3 - len(operands))
    return len(text) + len(text) // max(1, len(old)) * len(new)


class _Refused(ValueError):
    """What goes beyond the limits."""


def _too_much(cause: str, cure: str = "") -> _Refused:
    return _Refused(f"The model's chat template is refused, {cause}: set another one (model.chat_template){cure}.")


def _not_taken(error: BaseException) -> ValueError:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(f"The model's chat template does not take the conversation: {cause}")
