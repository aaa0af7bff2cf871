"""Pages of HTML that need nothing else: a frame with style and script, in which every template fills its blocks."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, filters: Mapping[str, Callable[..., str]], **values: object) -> str:
    """The page of a template beside this file; all values are escaped, but for ``markupsafe.Markup``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)
