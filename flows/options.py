"""Options of the command line, made from the settings' own fields, so that help, form and schema never differ."""

import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Settings = TypeVar("Settings", bound=BaseModel)


# Fields that take several values, which are separated by commas.
LISTS = ("betas", "offsets", "sparsities", "pruners", "allocators", "seeds", "tasks")


def add_options(
    parser: ArgumentParser,
    settings: type[BaseModel],
    without: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """One option per field of ``settings``; values are strings until ``read_options`` validates them.

    Args:
        without: fields that get no option.
        optional: fields that may be left out although ``settings`` requires them.
    """
    group = parser.add_argument_group(settings.__name__.lower())
    for name, field in settings.model_fields.items():
        if name in without:
            continue
        group.add_argument(
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
        problems = []
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            got = f", got {given[name]!r}" if name in given and problem["type"] != "credentials" else ""
            problems.append(f"{_flag(name) if name else 'settings'}: {problem['msg']}{got}")
        raise ValueError("; ".join(problems)) from error


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
        ValueError: JSON that is none.
    """
    if not value:
        return None
    if value.startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{_flag(name)}: {value!r} is no JSON ({error}).") from error
    return value.split(",") if name in LISTS else value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(field: FieldInfo) -> str:
    text = str(field.description).replace("%", "%%")
    if field.is_required() or field.default is None:
        return text
    default = getattr(field.default, "method", field.default)
    return f"{text} Default: {default}."
