"""Types of the settings' fields: accepted values, and error messages for all others."""

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from layerwise.allocators.allocator import Given
from layerwise.allocators.alpha_pruning import AlphaPruning
from layerwise.allocators.atp import ATP
from layerwise.allocators.depth_schedules import Erf, Power
from layerwise.allocators.dlp import DLP
from layerwise.allocators.dsa import DSA
from layerwise.allocators.erdos_renyi import ErdosRenyi, ErdosRenyiPlus
from layerwise.allocators.global_threshold import Global
from layerwise.allocators.lamp import LAMP
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL
from layerwise.pruners.alps import ALPS
from layerwise.pruners.dsnot import DSnoT
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.patterns import Pattern
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train
from layerwise.storage.files.credentials import holds_credentials
from layerwise.tasks.texts.text_mix import parse_mix


def _method(value: Any) -> Any:
    """Accept a method by its name, or by a JSON object with its settings; refuse texts and booleans as numbers there.

    pydantic accepts "0.1" and true as numbers. That is right for an option and for a form, but a mistake in JSON.
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
    """Refuse a URL with credentials before it gets into a flow run, the store or a log."""
    if isinstance(value, str) and any(map(holds_credentials, _urls(value))):
        raise PydanticCustomError(
            "credentials",
            "the URL holds credentials (not shown), which would end up in logs and reports; put them into the "
            "environment or the fsspec configuration and give the bare URL",
        )
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise PydanticCustomError(
            "encoding",
            "the name is not valid UTF-8, the encoding of parameters and reports; rename the folder, or give a symbolic "
            "link to it",
        )
    return value


def _urls(value: str) -> list[str]:
    """Return the URL of a text or a model, or those of a mix of texts."""
    try:
        return [source.name for source in parse_mix(value)] or [value]
    except ValueError:  # reported by the search's own check
        return [value]


# With the pattern, Prefect's server refuses parameters that hold a password.
BareUrl = Annotated[
    str, BeforeValidator(_bare_url), Field(min_length=1, json_schema_extra={"pattern": r"^(?!.*://[^/]*@)"})
]
StrategyName = Literal[
    "auto", "grid", "race", "adaptive", "two-parameter", "projections", "bayesian", "evolutionary"
]
PrunerChoice = Annotated[
    Wanda | Magnitude | SparseGPT | ALPS | WandaSwaps | DSnoT,
    Field(discriminator="method"),
    BeforeValidator(_method),
]
AllocatorChoice = Annotated[
    ATP
    | OWL
    | AlphaPruning
    | DSA
    | DLP
    | LSA
    | Global
    | ErdosRenyi
    | ErdosRenyiPlus
    | LAMP
    | Erf
    | Power
    | Given,
    Field(discriminator="method"),
    BeforeValidator(_method),
]

RecoverChoice = Annotated[Refit | Train, Field(discriminator="method"), BeforeValidator(_method)]


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise PydanticCustomError(
            "regex", "is not a regular expression ({problem})", {"problem": str(error)}
        ) from error
    return value


def _pattern(value: str) -> str:
    Pattern.parse(value)
    return value


PatternText = Annotated[str, AfterValidator(_pattern)]
RegularExpression = Annotated[str, AfterValidator(_regular_expression)]


class Settings(BaseModel):
    """Base class of the settings."""

    # An error must not show the value: it might be a URL with a password. NaN and infinity are refused, also in the
    # settings of methods, which are dataclasses.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    # Fields that come first in Prefect's form; the others follow in their order.
    essential: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema that Prefect makes a form of: with the order of the fields, and alternatives side by side."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        fields = schema["properties"]
        names = [*cls.essential, *(name for name in fields if name not in cls.essential)]
        # Prefect's form sorts by "position". A database may change the order of an object's names.
        schema["properties"] = {
            name: {**_flat_alternatives(fields[name]), "position": position}
            for position, name in enumerate(names)
        }
        return reference


def _flat_alternatives(field: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of a field with one list of alternatives, each of which Prefect's form offers by its title.

    The form has no title for alternatives within an alternative, and cannot convert ``oneOf`` from and to JSON.
    """
    if "oneOf" not in field and "anyOf" not in field:
        return field
    rest = {name: value for name, value in field.items() if name not in ("oneOf", "anyOf", "discriminator")}
    alternatives = field.get("oneOf") or field["anyOf"]
    return {**rest, "anyOf": [each for one in alternatives for each in one.get("oneOf", [one])]}
