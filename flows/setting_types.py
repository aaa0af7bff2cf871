"""Kinds of fields that settings have: what they accept, and what they say to everything else."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from layerwise.allocators.allocation import ATP
from layerwise.allocators.allocators import Given
from layerwise.allocators.alpha_pruning import AlphaPruning
from layerwise.allocators.depth_schedules import Erf, Power
from layerwise.allocators.dlp import DLP
from layerwise.allocators.dsa import DSA
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL
from layerwise.pruners.alps import ALPS
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.patterns import Pattern
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps
from layerwise.tasks.sources.url_credentials import holds_credentials


def _method(value: Any) -> Any:
    """A method by its name, or by its settings, whose numbers have to be numbers.

    pydantic takes "0.1" and true for numbers, which is right for an option and a form, and a mistake in JSON.
    """
    if isinstance(value, str):
        return {"method": value}
    if isinstance(value, dict):
        for name, setting in value.items():
            for each in setting if isinstance(setting, list) else [setting]:
                if isinstance(each, bool) or (isinstance(each, str) and _is_number(each)):
                    raise PydanticCustomError(
                        "number",
                        "{name} has the value {value}; give a number",
                        {"name": name, "value": json.dumps(each)},
                    )
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bare_url(value: Any) -> Any:
    """Refuse credentials in a URL before it becomes a parameter of a flow run, a file of the store or a log line."""
    if isinstance(value, str) and holds_credentials(value):
        raise PydanticCustomError(
            "credentials",
            "the URL holds credentials (not shown), which would end up in logs and reports; put them into the "
            "environment or the fsspec configuration and give the bare URL",
        )
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticCustomError(
            "encoding",
            "the name is not valid UTF-8, which parameters and reports are written in; rename the folder, or give a "
            "symbolic link to it",
        )
    return value


# The pattern is for Prefect's server, which then stores no parameters with a password in them.
BareUrl = Annotated[
    str, BeforeValidator(_bare_url), Field(min_length=1, json_schema_extra={"pattern": r"^(?!.*://[^/]*@)"})
]
Strategy = Literal["grid", "race", "adaptive", "two-parameter", "projections", "bayesian", "evolutionary"]
PrunerChoice = Annotated[
    Wanda | Magnitude | SparseGPT | ALPS | WandaSwaps,
    Field(discriminator="method"),
    BeforeValidator(_method),
]
AllocatorChoice = Annotated[
    ATP | OWL | AlphaPruning | DSA | DLP | LSA | Erf | Power | Given,
    Field(discriminator="method"),
    BeforeValidator(_method),
]


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise PydanticCustomError(
            "regex", "is no regular expression ({problem})", {"problem": str(error)}
        ) from error
    return value


def _pattern(value: str) -> str:
    Pattern.parse(value)
    return value


PatternText = Annotated[str, AfterValidator(_pattern)]
RegularExpression = Annotated[str, AfterValidator(_regular_expression)]


class Settings(BaseModel):
    """What a user can set, as one value."""

    # An error must not show what was given: it might be a URL with a password.
    # NaN and infinities are no settings; that holds for the numbers of methods, too, which are dataclasses.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)
