"""Options of the command line, made from the fields of the settings, so that help, form and schema cannot differ."""

import json
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Settings = TypeVar("Settings", bound=BaseModel)


# Fields that take several values, separated by commas.
LISTS = ("betas", "offsets", "sparsities", "pruners", "recoveries", "allocators", "seeds", "tasks")
LONGEST = 200  # characters of a value in an error message
CAPITAL_INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def add_options(
    parser: ArgumentParser,
    settings: type[BaseModel],
    without: Collection[str] = (),
    optional: Collection[str] = (),
    group: str | None = None,
) -> None:
    """Add one option per field of ``settings``. Values are strings until ``read_options`` validates them.

    Args:
        without: fields that get no option.
        optional: fields that may be left out although ``settings`` requires them.
        group: title of the options in the help; the name of ``settings`` if left out.
    """
    words = CAPITAL_INSIDE.sub(" ", settings.__name__).lower()  # "generate calibration"
    options = parser.add_argument_group(group or words)
    for name, field in settings.model_fields.items():
        if name in without:
            continue
        options.add_argument(
            _flag(name),
            required=field.is_required() and name not in optional,
            metavar=name.rpartition("_")[2].upper(),
            help=_help(field),
            # A boolean option without a value means true.
            **({"nargs": "?", "const": "true"} if field.annotation is bool else {}),
        )


def read_options(arguments: Namespace, settings: type[Settings], **values_of_others: object) -> Settings:
    """Return the settings that ``arguments`` give.

    Args:
        values_of_others: values of fields that have no option.

    Raises:
        ValueError: an option is not valid; the message starts with its name on the command line.
    """
    given = {name: getattr(arguments, name, None) for name in settings.model_fields}
    values = {name: parsed(name, value) for name, value in given.items() if value is not None}
    for name, value in values.items():
        if value is None and settings.model_fields[name].default == ():
            values[name] = ()  # an empty list
    values |= values_of_others
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        # One problem per option: pydantic reports a wrong entry of a list also as a wrong length.
        first = {problem["loc"][:1]: problem for problem in reversed(error.errors())}
        raise ValueError("; ".join(_described(first[loc], given) for loc in reversed(first))) from error


def _described(problem: ErrorDetails, given: Mapping[str, str | None]) -> str:
    """Describe a problem of an option, with the field of a method or the entry of a list that it is about."""
    message = _message(problem)
    if not problem["loc"]:
        return f"settings: {message}"
    name, *path = map(str, problem["loc"])
    value = given.get(name)
    if problem["type"] == "credentials" or value is None:
        return f"{_flag(name)}: {message}"
    # For a method, pydantic's path also has the tag, which is not a field.
    inner = [part for part in path if part != _method_in(value)]
    if inner and value.startswith(("{", "[")):
        return f"{_flag(name)}: {'.'.join(inner)}: {message}, got {_shown(problem['input'])}"
    return f"{_flag(name)}: {message}, got {_shown(value)}"


def _message(problem: ErrorDetails) -> str:
    if problem["type"] == "union_tag_invalid":
        tag, expected = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        near = get_close_matches(tag, [each.strip("'") for each in expected.split(", ")], n=1)
        nearest = f" (did you mean {near[0]!r}?)" if near else ""
        return f"there is no method {tag!r}{nearest}; the methods are {expected}"
    if problem["type"] in ("union_tag_not_found", "model_attributes_type"):
        return (
            'give a method by its name, or as JSON with "method" and its settings, such as {"method": "NAME"}'
        )
    return problem["msg"].removeprefix("Value error, ").rstrip(".")


def _method_in(value: str) -> object:
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return document.get("method") if isinstance(document, dict) else None


def _shown(value: object) -> str:
    """Format ``value`` for a message; a long one is cut and followed by its length."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def search_command(settings: BaseModel, runtime: BaseModel | None = None) -> str:
    """Return the command that repeats a search, on one line, without the settings that have their defaults.

    Args:
        runtime: where it runs; None for a placeholder of the store.
    """
    where = ["--store=STORE"] if runtime is None else _given_options(runtime)
    return shlex.join(["layerwise", "search", *_given_options(settings), *where])


def compare_command(search: BaseModel, settings: BaseModel, runtime: BaseModel) -> str:
    """Return the command that repeats a comparison, as ``search_command`` does.

    Args:
        search: settings that all searches have in common, the field ``search`` of ``settings``.
    """
    # A preset has defaults of its own, so all options are given with it.
    has_preset = getattr(settings, "preset", None) is not None
    of_search = _given_options(search, search.model_fields_set if has_preset else ())
    own = _given_options(settings, settings.model_fields_set if has_preset else (), without=("search",))
    return shlex.join(["layerwise", "compare", *of_search, *own, *_given_options(runtime)])


def _given_options(
    settings: BaseModel, always: Collection[str] = (), without: Collection[str] = ()
) -> list[str]:
    """Return the options of the settings that differ from their defaults.

    Args:
        always: settings that are also given with their defaults.
    """
    changed = settings.model_dump(mode="json", exclude_defaults=True)
    # A method is given by its name, or as a whole if one of its settings was changed.
    given = {
        name: value["method"] if isinstance(value, dict) and not changed.get(name) else value
        for name, value in settings.model_dump(mode="json").items()
        if (name in changed or name in always) and name not in without
    }
    return [f"{_flag(name)}={_spelt(name, value)}" for name, value in given.items()]


def _spelt(name: str, value: object) -> str:
    """Format a value as ``parsed`` and the fields read it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        if name in LISTS and not any(each is None or isinstance(each, dict) for each in value):
            return ",".join(map(str, value))
        return json.dumps(list(map(_without_none, value)))
    return str(value)


def _without_none(entry: object) -> object:
    """Leave out what an entry of a list does not set, such as the settings that an allocation shares with the common search."""
    return (
        {name: value for name, value in entry.items() if value is not None}
        if isinstance(entry, dict)
        else entry
    )


def parsed(name: str, value: str) -> object:
    """Parse the text of an option: JSON, a list, or the text itself. An empty option is None, not the default.

    Raises:
        ValueError: the text is not valid JSON, is nested too deeply, repeats a key, or has NaN or an infinity.
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
        raise ValueError(f"{twice!r} occurs more than once")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed as a number")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.is_required() or field.default in (None, ()):
        return text
    default = getattr(field.default, "method", field.default)
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} Default: {default}."
