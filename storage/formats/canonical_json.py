"""Canonical JSON and its digest: equal values give equal bytes, in every process and every version."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass


def digest(value: object) -> str:
    """Return the first 128 bits of the SHA-256 of ``canonical_json(value)``, as 32 hex digits.

    Raises:
        TypeError: ``value`` contains something that is not plain (see ``canonical_json``).
        ValueError: ``value`` contains a number that is not finite.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def canonical_json(value: object) -> str:
    """Return the canonical JSON text of ``value``: sorted names, no spaces, ASCII only.

    Plain values are None, bool, int, float, str, lists and tuples of plain values, mappings from strings to
    plain values, and frozen dataclasses of plain values. A dataclass is written with its class name.

    Raises:
        TypeError: something in ``value`` is not plain.
        ValueError: a number in ``value`` is not finite.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object, place: str) -> object:
    # Exact types: a NumPy float or an enum member is a float or a str too, but defines its own text.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(
                f"{place} is {value}, which has no JSON form and cannot be part of a key. "
                "Leave the number out, or write it as a string."
            )
        return value + 0.0  # -0.0 equals 0.0, so both must give the same key
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
            f"{place}: the dataclass {kind.__qualname__} is not frozen, or has a field named 'type', which is "
            "reserved for the class name. Declare it with frozen=True and rename the field."
        )
    settings = {name: _plain(getattr(value, name), f"{place}.{name}") for name in names}
    return {"type": kind.__name__, **settings}


def _plain_name(name: object, place: str) -> str:
    if type(name) is not str:
        raise TypeError(
            f"{place} has the name {name!r}, a {type(name).__qualname__}; JSON cannot distinguish it from "
            f"the string {str(name)!r}. Use strings as names."
        )
    return name
