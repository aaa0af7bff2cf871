"""Self-contained HTML pages from templates: a frame with style and script, and the formats of numbers.

Figures are inline SVG, so they work without scripts and in print, and use the colours of light and dark pages. A short
script shows the value of a mark under the pointer or finger. Every value is also in a table.
"""

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from layerwise.scoring.perplexity import format_perplexity, has_diverged

UNITS = ("B", "kB", "MB", "GB", "TB")


def render(template: str, **values: object) -> str:
    """Render a template in this folder. All values are escaped, except ``markupsafe.Markup``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(template).render(**values)


def perplexity_text(value: float) -> str:
    """Format a perplexity; that of a diverged model is a placeholder."""
    return "diverged" if has_diverged(value) else format_perplexity(value)


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def _setting(value: object) -> str:
    """Format a setting for people: a method without other fields by its name."""
    if isinstance(value, dict) and list(value) == ["method"]:
        return str(value["method"])
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_setting(each) for each in value) or "none"
    if value is None:
        return "not set"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digits(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _fixed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _count(value: int) -> str:
    return f"{value:,}"


FILTERS: dict[str, Callable[..., str]] = {
    "perplexity": perplexity_text,
    "size": _size,
    "setting": _setting,
    "digits": _digits,
    "fixed": _fixed,
    "signed": _signed,
    "percent": _percent,
    "count": _count,
}
