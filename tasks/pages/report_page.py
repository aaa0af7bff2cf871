"""The report's page: one HTML file that needs nothing else, made from plain values.

The figures are SVG inside of the page: they are there without a script and in print, and take the colours of light and
dark pages. A short script shows the value of a mark under the pointer or finger; every value is in a table, too.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from layerwise.scoring.perplexity import DIVERGED
from layerwise.tasks.pages import report_text
from layerwise.tasks.pages.page_template import render
from layerwise.tasks.pages.report_data import ReportData
from layerwise.tasks.pages.report_tables import BEST, Rows
from layerwise.tasks.results.speed_table import speed_rows, speed_sentence
from layerwise.tasks.results.summary import number

UNITS = ("B", "kB", "MB", "GB", "TB")


def report_page(data: ReportData, figures: Mapping[str, str]) -> str:
    """The page. Everything but the figures is escaped: names of models and texts are the user's.

    Args:
        figures: SVG by name, as of ``layerwise.tasks.report.figures_of``.
    """
    tables = data.tables
    text = {
        "done": report_text.what_was_done(data),
        "on_test": report_text.on_test(data),
        "shape": report_text.shape_of_curve(tables["betas"], data.parameter),
        "kinds": report_text.on_kinds(tables["linears"]),
        "failed": report_text.failed(tables["betas"]),
        "errors": report_text.on_errors(tables["errors"]),
        "speed": "" if data.extras.speed is None else speed_sentence(data.extras.speed),
        "measured": {name: report_text.on_what(each) for name, each in data.measured.items()},
    }
    return render(
        "report_page.html",
        FILTERS,
        data=data,
        text=text,
        models=tables["models"],
        betas=tables["betas"],
        stages=tables["stages"],
        artifacts=tables["artifacts"],
        texts=tables["texts"],
        exported=next((row["bytes"] for row in tables["artifacts"] if row["role"] == "export"), None),
        sparsities=_by_layer(tables["sparsities"], "plan", "sparsity"),
        errors=_by_layer(tables["errors"], "model", "relative_error"),
        linears=_by_layer(tables["linears"], "linear", "sparsity"),
        theory=data.theory,
        figures={name: Markup(svg) for name, svg in figures.items()},
        speeds=[] if data.extras.speed is None else speed_rows(data.extras.speed),
        best=BEST,
        early=len({row["windows"] for row in tables["betas"]}) > 1,
    )


def _by_layer(rows: Rows, column: str, value: str) -> Mapping[str, Any]:
    """One line per layer, one column per plan, model or linear; None where there is no value."""
    names = list(dict.fromkeys(row[column] for row in rows))
    values = {(row["layer"], row[column]): row[value] for row in rows}
    layers = sorted({row["layer"] for row in rows})
    return {
        "columns": names,
        "lines": [(layer, [values.get((layer, name)) for name in names]) for layer in layers],
    }


def _perplexity(value: float) -> str:
    """Of a model that failed its loss says nothing but that."""
    return "diverged" if math.log(value) >= 0.999 * DIVERGED else number(value)


def _size(count: int | None) -> str:
    if count is None:
        return "not noted"
    value, unit = float(count), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def _setting(value: object) -> str:
    """A setting for people: a method by its name if that is all of it."""
    if isinstance(value, dict) and list(value) == ["method"]:
        return str(value["method"])
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_setting(each) for each in value) or "none"
    if value is None:
        return "not given"
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
    "perplexity": _perplexity,
    "size": _size,
    "setting": _setting,
    "digits": _digits,
    "fixed": _fixed,
    "signed": _signed,
    "percent": _percent,
    "count": _count,
}
