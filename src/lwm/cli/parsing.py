"""Parse command lines with tyro, and report a user's mistake in one sentence.

tyro derives options and their help from type annotations. The rules here change three things for
every command: an optional value is shown by its type (`--prompt STR`, not `{None}|STR`), a default
that is no value is not shown (`(default: None)`), and a mistake raises `UsageError`.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import is_dataclass, replace
from functools import wraps
from io import StringIO
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

# tyro has no public way to intercept errors; pyproject.toml pins the versions that have this one.
from tyro import _errors
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from lwm.core.errors import LwmError

T = TypeVar("T")
_rules = ConstructorRegistry()


class UsageError(LwmError):
    """Signal a command line that cannot be parsed.

    Args:
        command: The command as the user wrote it, such as `lwm generate text`.
        problem: What is wrong with its arguments.
    """

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(problem)
        self.command = command


def parse(target: Callable[..., T], command: str, arguments: Sequence[str], **settings: Any) -> T:
    """Call a function, or build a dataclass, with values from the command line.

    Args:
        target: Its parameters or fields are the options.
        command: The command as the user wrote it, such as `lwm generate text`.
        arguments: The words that follow the command.
        settings: Further arguments of `tyro.cli`.

    Raises:
        UsageError: An option is unknown, misses its value, or has one of the wrong type.
    """
    call: Any = target if is_dataclass(target) else _readable(target)
    settings |= {"prog": command, "registry": _rules}

    def refuse(event: _errors.ParseErrorEvent) -> None:
        unknown = None
        if isinstance(event, _errors.UnrecognizedArgs | _errors.MissingArgs | _errors.BadValue):
            unknown = _unknown_option(arguments, _options(call, settings))
        if (problem := unknown or _problem(event)) is not None:
            raise UsageError(command, problem)

    with _errors.on_parse_error(refuse):
        return tyro.cli(call, args=arguments, **settings)


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a misspelled one is likely to mean, or None."""
    close = difflib.get_close_matches(name, names, n=1)
    return close[0] if close else None


def _problem(event: _errors.ParseErrorEvent) -> str | None:
    """Describe a mistake; None leaves the description to tyro."""
    see = f"see '{event.prog} --help'"
    match event:
        case _errors.UnrecognizedArgs(tokens=words):
            return f"unexpected argument {words[0]!r}; {see}"
        case _errors.MissingArgs(missing_arguments=missing):
            names = [_name(argument.arg) for argument in missing]
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing; {see}"
        case _errors.BadValue(argument=argument, reason="too_few_values"):
            return f"{_name(argument)} needs a value; {see}"
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            listed = ", ".join(choice for choice in choices if choice != "None")
            return f"{_name(argument)} needs one of {listed}, not {value!r}"
        case _errors.InstantiationFailure(argument=argument, message=message):
            if argument is None or message.startswith("needs "):
                return message if argument is None else f"{_name(argument)} {message}"
            return f"{_name(argument)} needs {argument.lowered.metavar} ({message})"
    return None


def _name(argument: Any) -> str:
    """Return the name of an argument as a user writes it."""
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return argument.lowered.name_or_flags[-1]


def _unknown_option(arguments: Sequence[str], options: list[str]) -> str | None:
    """Describe the first argument that looks like an option and is none."""
    words = [word.partition("=")[0] for word in arguments if re.match("--?[A-Za-z]", word)]
    unknown = [word for word in words if word.replace("_", "-") not in {*options, "-h", "--help"}]
    if not unknown:
        return None
    # The group of a nested option is easily forgotten or wrong, so its last part counts as well.
    last = {option.lstrip("-").rpartition(".")[2]: option for option in reversed(options)}
    part = closest_name(unknown[0].lstrip("-").replace("_", "-").rpartition(".")[2], last)
    meant = closest_name(unknown[0], options) or (last[part] if part else None)
    return f"unknown option {unknown[0]}" + (f"; did you mean {meant}?" if meant else "")


def _options(call: Any, settings: dict[str, Any]) -> list[str]:
    """Return the options of a command, as its help lists them."""
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        tyro.cli(call, args=["--help"], **settings)
    return re.findall(r"(?:^|│|,)\s*(--[\w.-]+)", text.getvalue(), re.MULTILINE)


def _readable(function: Callable[..., T]) -> Callable[..., T]:
    """Copy a function's signature for tyro, with help texts that wrap and defaults that matter."""

    @wraps(function)
    def call(*positional: Any, **named: Any) -> T:
        return function(*positional, **named)

    del call.__wrapped__  # tyro would read the annotations of what it wraps
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    call.__annotations__ = {name: _with_plain_default(hint) for name, hint in hints.items()}
    call.__doc__ = re.sub(r"\n {8,}", " ", inspect.getdoc(function) or "")
    return call


def _with_plain_default(hint: Any) -> Any:
    """Annotate a type so that help shows no default where it is None or empty."""

    def shown(default: str) -> str:
        return "" if default in ("None", "''", "") else f"(default: {default})"

    bare, *markers = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    repeatable = tyro.conf.UseAppendAction in markers  # tyro says so where it would say a default
    if bare is str or NoneType in get_args(bare) or (get_origin(bare) is tuple and not repeatable):
        return Annotated[hint, tyro.conf.arg(help_behavior_hint=shown)]
    return hint


class _DataclassRule:
    """Read a dataclass as tyro does, with help texts that wrap and defaults that matter."""

    def __init__(self) -> None:
        self._active = True

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if not self._active or not is_dataclass(info.type):
            return None
        self._active = False  # the next rule, which is tyro's, reads the fields
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._active = True
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = [
            replace(
                field, type=_with_plain_default(field.type), helptext=_one_line(field.helptext)
            )
            for field in spec.fields
        ]
        return replace(spec, fields=tuple(fields))


def _one_line(text: str | Callable[[], str | None] | None) -> Callable[[], str]:
    return lambda: " ".join(((text() if callable(text) else text) or "").split())


_rules.struct_rule(_DataclassRule())


@_rules.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read `X | None` as X, or as None where the word is None."""
    types = get_args(info.type)
    if info.type_origin not in (Union, UnionType) or len(types) != 2 or NoneType not in types:
        return None
    (value,) = (option for option in types if option is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(value, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    return replace(
        spec,
        instance_from_str=lambda words: (
            None if words == ["None"] else spec.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else spec.str_from_instance(value)
        ),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


@_rules.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read a number, with a sentence where the word is none."""
    if info.type is not int and info.type is not float:
        return None
    number: type = info.type

    def read(words: list[str]) -> int | float:
        try:
            return number(words[0])
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            raise ValueError(f"needs {kind}, not {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=number.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int if number is int else (int, float)),
        str_from_instance=lambda value: [str(value)],
    )
