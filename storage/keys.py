"""Canonical JSON and digests: equal values give equal bytes, in every process, for years."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass


def digest(value: object) -> str:
    """First 128 bits of the SHA-256 of ``canonical_json(value)``, as 32 hex digits.

    Raises:
        TypeError: if ``value`` holds something that is not plain (see ``canonical_json``).
        ValueError: if ``value`` holds a number that is not finite.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def canonical_json(value: object) -> str:
    """The one JSON text of ``value``: sorted names, no spaces, ASCII only.

    Plain means None, bool, int, float, str, lists and tuples of plain values, mappings from strings to
    plain values, and frozen dataclasses of plain values; a dataclass also writes its class name.

    Raises:
        TypeError: if something in ``value`` is not plain.
        ValueError: if a number in ``value`` is not finite.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object, place: str) -> object:
    # Exact types: a NumPy float or an enum is a float or a str too, but what it writes is its own affair.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(
                f"{place} is {value}, which has no JSON form and equals nothing, so no key can hold it. "
                "Leave the number out, or write it as a string."
            )
        return value + 0.0  # -0.0 equals 0.0 and must give the same key
    if is_dataclass(value) and not isinstance(value, type):
        return _plain_dataclass(value, place)
    if isinstance(value, Mapping):
        return {_plain_name(name, place): _plain(item, f"{place}[{name!r}]") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{place}: a {type(value).__qualname__} cannot be part of an artifact key or manifest: its bytes may "
        "differ between processes. Use numbers, strings, lists, mappings or frozen dataclasses of these."
    )


def _plain_dataclass(value: object, place: str) -> dict[str, object]:
    kind = type(value)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not kind.__dataclass_params__.frozen or "type" in names:  # type: ignore[attr-defined]
        raise TypeError(
            f"{place}: the dataclass {kind.__qualname__} is not frozen, or has a field named 'type', where "
            "its class name is written. Declare it with frozen=True and rename the field."
        )
    settings = {name: _plain(getattr(value, name), f"{place}.{name}") for name in names}
    return {"type": kind.__name__, **settings}


def _plain_name(name: object, place: str) -> str:
    if type(name) is not str:
        raise TypeError(
            f"{place} has the name {name!r}, a {type(name).__qualname__}; in JSON it could not be told from "
            f"the string {str(name)!r}. Use strings as names."
        )
    return name
