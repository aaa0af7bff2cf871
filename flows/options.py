"""Options of the command line, made from the settings' own fields, so that help, form and schema never differ."""

import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Settings = TypeVar("Settings", bound=BaseModel)


# Fields that take several values, which are separated by commas.
LISTS = ("betas", "offsets", "sparsities", "pruners", "allocators", "seeds", "tasks")
LONGEST = 200  # characters of a value in an error


def add_options(
    parser: ArgumentParser,
    settings: type[BaseModel],
    without: Collection[str] = (),
    optional: Collection[str] = (),
    group: str | None = None,
) -> None:
    """One option per field of ``settings``; values are strings until ``read_options`` validates them.

    Args:
        without: fields that get no option.
        optional: fields that may be left out although ``settings`` requires them.
        group: title of the options in the help; the name of ``settings`` if left out.
    """
    options = parser.add_argument_group(group or settings.__name__.lower())
    for name, field in settings.model_fields.items():
        if name in without:
            continue
        options.add_argument(
            _flag(name),
            required=field.is_required() and name not in optional,
            metavar=name.rpartition("_")[2].upper(),
            help=_help(field),
            # The option alone means true.
            **({"nargs": "?", "const": "true"} if field.annotation is bool else {}),
        )


def read_options(arguments: Namespace, settings: type[Settings], **values_of_others: object) -> Settings:
    """The settings that ``arguments`` spell.

    Args:
        values_of_others: fields that have no option.

    Raises:
        ValueError: an option that is not valid, by its name on the command line.
    """
    given = {name: getattr(arguments, name, None) for name in settings.model_fields}
    values = {name: _parsed(name, value) for name, value in given.items() if value is not None}
    values |= values_of_others
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        # One problem for each option: a wrong entry of a list is a wrong length of it, too.
        first = {problem["loc"][:1]: problem for problem in reversed(error.errors())}
        raise ValueError("; ".join(_said(first[loc], given) for loc in reversed(first))) from error


def _said(problem: ErrorDetails, given: Mapping[str, str | None]) -> str:
    """What is wrong with an option; with a field of a method or an entry of a list, which one that is."""
    message = _message(problem)
    if not problem["loc"]:
        return f"settings: {message}"
    name, *path = map(str, problem["loc"])
    value = given.get(name)
    if problem["type"] == "credentials" or value is None:
        return f"{_flag(name)}: {message}"
    # Of a method pydantic names the tag, too, which is none of its fields.
    inner = [part for part in path if part != _method_in(value)]
    if inner and value.startswith(("{", "[")):
        return f"{_flag(name)}: {'.'.join(inner)}: {message}, got {_shown(problem['input'])}"
    return f"{_flag(name)}: {message}, got {_shown(value)}"


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == "union_tag_invalid":
        tag, expected = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        near = get_close_matches(tag, [each.strip("'") for each in expected.split(", ")], n=1)
        nearest = f" (did you mean {near[0]!r}?)" if near else ""
        return f"there is no method {tag!r}{nearest}; there are {expected}"
    if problem["type"] in ("union_tag_not_found", "model_attributes_type"):
        return 'a method is its name, or JSON with "method" and its settings, such as {"method": "NAME"}'
    return problem["msg"].removeprefix("Value error, ").rstrip(".")


def _method_in(value: str) -> object:
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return document.get("method") if isinstance(document, dict) else None


def _shown(value: object) -> str:
    """``value``; of a long one the beginning and its length."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def search_command(settings: BaseModel) -> str:
    """The command that makes the same search, on one line; what is left at its default is left out."""
    changed = settings.model_dump(mode="json", exclude_defaults=True)
    # A method by its name; as a whole if one of its settings is changed, as the name is a default, too.
    given = {
        name: value["method"] if changed[name] == {} else value
        for name, value in settings.model_dump(mode="json").items()
        if name in changed
    }
    options = [f"{_flag(name)}={_spelt(name, value)}" for name, value in given.items()]
    return shlex.join(["layerwise", "search", *options, "--store=STORE"])


def _spelt(name: str, value: object) -> str:
    """A value as ``_parsed`` and the fields read it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(map(str, value)) if name in LISTS else json.dumps(value)
    return str(value)


def _parsed(name: str, value: str) -> object:
    """An empty option is no value, which is not the same as the default where that is a number.

    Raises:
        ValueError: text that is not valid JSON, is nested too deeply, names a key twice, or has a number that is none.
    """
    if not value:
        return None
    if value.startswith(("{", "[")):
        try:
            return json.loads(value, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError(f"{_flag(name)}: {_shown(value)} is nested too deeply.") from None
        except ValueError as error:
            raise ValueError(f"{_flag(name)}: {_shown(value)} is not valid JSON ({error}).") from error
    return value.split(",") if name in LISTS else value


def _without_repetition(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there more than once")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a setting can have")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.is_required() or field.default is None:
        return text
    default = getattr(field.default, "method", field.default)
    return f"{text} Default: {default}."
