"""Parse command lines with tyro, which derives options and their help from type annotations.

A mistake raises `UsageError`. Help follows convention: an optional value is shown by its type
(`--prompt STR`, not `{None}|STR`), and a default only where it is a value.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args

import tyro

# tyro has no public way to change errors and help texts; pyproject.toml pins versions that fit.
from tyro import _arguments, _errors, _fmtlib
from tyro.conf import PositionalMetavarFromFieldName
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lwm.core.errors import LwmError
from lwm.core.files import readable
from lwm.core.progress import say

T = TypeVar("T")
_rules = ConstructorRegistry()


class UsageError(LwmError):
    """Signal a command line that cannot be parsed; the message begins with the command, and may
    have several lines."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


class Text(str):
    """Hold text of a user, in contrast to names of files, which may be any bytes."""


def read_text(text: str) -> Text:
    """Return text whose bytes that are no UTF-8 are replaced, with a remark."""
    result = Text(readable(text))
    if result != text:
        say(f"the text {str(result)!r} is not valid UTF-8; what cannot be read is replaced")
    return result


def parse(target: Callable[..., T], command: str, arguments: Sequence[str], **settings: Any) -> T:
    """Call a function, or build a dataclass, with options from the command line.

    Args:
        command: The command as the user wrote it, such as `lwm generate text`.
        arguments: The words that follow the command.
        settings: Further arguments of `tyro.cli`.

    Raises:
        UsageError: An option is unknown, or its value is missing or of the wrong type.
    """
    settings |= {"prog": command, "registry": _rules, "config": (PositionalMetavarFromFieldName,)}

    def refuse(event: _errors.ParseErrorEvent) -> None:
        unknown = None
        if isinstance(event, _errors.UnrecognizedArgs | _errors.MissingArgs | _errors.BadValue):
            unknown = _unknown_option(arguments, _options(target, settings))
        if (problem := unknown or _problem(event)) is not None:
            raise UsageError(f"{command}: {problem}")

    with _errors.on_parse_error(refuse):
        return tyro.cli(target, args=arguments, **settings)


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a misspelled one is likely to mean, or None."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


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
            if argument is None:
                return message
            type_name = str(argument.lowered.metavar)
            kind = {"INT": "a whole number", "FLOAT": "a number"}.get(type_name, type_name)
            return f"{_name(argument)} needs {kind}, not {message.partition(': ')[2]}"
    return None


def _name(argument: _arguments.ArgumentDefinition) -> str:
    lowered = argument.lowered
    return str(lowered.metavar) if argument.is_positional() else lowered.name_or_flags[-1]


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


def _options(target: Callable[..., Any], settings: dict[str, Any]) -> list[str]:
    # As help lists them, since tyro offers no list.
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        tyro.cli(target, args=["--help"], **settings)
    return re.findall(r"(?:^|│|,)\s*(--[\w.-]+)", text.getvalue(), re.MULTILINE)


@_rules.primitive_rule
def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is not Text:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda words: read_text(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


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
    read, show, matches = spec.instance_from_str, spec.str_from_instance, spec.is_instance
    return replace(
        spec,
        instance_from_str=lambda words: None if words == ["None"] else read(words),
        str_from_instance=lambda value: ["None"] if value is None else show(value),
        is_instance=lambda value: value is None or matches(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


_tyro_help = _arguments.generate_argument_helptext


def _help(argument: Any, lowered: Any, compact: bool = False) -> Any:
    """Describe an option without line breaks, and without a default that is empty or None."""
    text = " ".join(_tyro_help(argument, lowered, compact).as_str_no_ansi().split())
    return _fmtlib.text(re.sub(r" ?\(default: (None|'')? ?\)", "", text))


_arguments.generate_argument_helptext = _help
