"""Draw docs/curve.svg: perplexity against beta, without recovery and with the refit, from a store with both searches.

    .venv/bin/python docs/make_picture.py STORE

The store is that of ``layerwise compare ... --recoveries none,refit`` at one sparsity (docs/figures.md has the command).
"""

import sys
from pathlib import Path
from typing import Any

import altair

from layerwise.flows.pipeline.artifact_by_key import finished_searches
from layerwise.scoring.perplexity import format_perplexity
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.charts.drawing import (
    BLUE,
    GREEN,
    GREY,
    WIDE_WITH_NAMES,
    Figure,
    Look,
    beside,
    chart_of,
    line_encodings,
    line_names,
    measure_axis,
    svg_file,
)
from layerwise.tasks.results.report_tables import BEST, Row, betas_table
from layerwise.tasks.results.search_result import FinishedSearch, read_search

FILE = Path(__file__).with_name("curve.svg")
BESIDE = 12  # units between a minimum and its label


def picture(one_shot: FinishedSearch, refitted: FinishedSearch) -> Figure:
    """Return the figure of two searches, which differ in the recovery only.

    Raises:
        ValueError: a setting other than the recovery differs.
    """
    differing = {
        name
        for name in {*one_shot.settings, *refitted.settings} - {"recover", "recover_windows"}
        if one_shot.settings.get(name) != refitted.settings.get(name)
    }
    if differing:
        raise ValueError(
            f"the searches also differ in {', '.join(sorted(differing))}. Give a store with one pair."
        )
    lines = {
        "without recovery": Look(BLUE, dash=(7, 4), shape="circle"),
        "with refit": Look(GREEN, shape="square"),
    }
    rows = [
        {**row, "line": line}
        for line, search in zip(lines, (one_shot, refitted), strict=True)
        for row in betas_table(search)
        if not row["failed"] and not row["offset"]
    ]
    dense = one_shot.selection.dense_perplexity
    axis = measure_axis([dense, *(row["perplexity"] for row in rows)], "perplexity")
    y = altair.Y("perplexity:Q", **axis)
    x = altair.X(
        "beta:Q",
        title="beta (increase in sparsity from one layer to the next; 0 is uniform)",
        scale=altair.Scale(padding=20, nice=False, zero=False),
        axis=altair.Axis(tickCount=6),
    )
    encodings = line_encodings(lines)
    of_line = {name: encodings[name] for name in ("color", "strokeDash")}
    of_point = {name: encodings[name] for name in ("color", "shape")}
    best = [row for row in rows if row["kind"] == BEST]
    level = [{"perplexity": dense, "label": f"dense: {format_perplexity(dense)}"}]
    named = [{**row, "label": f"{row['perplexity']:.1f} at {row['beta']:.3g}"} for row in best]
    text: dict[str, Any] = {"fontSize": 13, "color": "black"}
    layers = (
        chart_of(level).mark_rule(strokeDash=[2, 3], strokeWidth=1.5, color=GREY).encode(y=y),
        chart_of(level)
        .mark_text(**text, align="left", dx=4, dy=-BESIDE)
        .encode(x=altair.value(0), y=y, text="label:N"),
        chart_of(rows).mark_line(strokeWidth=2).encode(x=x, y=y, **of_line),
        chart_of(rows).mark_point(size=45, filled=True, opacity=1).encode(x=x, y=y, **of_point),
        chart_of(best)
        .mark_point(shape="diamond", size=170, strokeWidth=2.5)
        .encode(x=x, y=y, color=encodings["color"]),
        chart_of(named[:1]).mark_text(**text, dy=-BESIDE - 6).encode(x=x, y=y, text="label:N"),
        chart_of(named[1:]).mark_text(**text, dy=BESIDE + 6).encode(x=x, y=y, text="label:N"),
    )
    points = [{"line": row["line"], "x": row["beta"], "y": row["perplexity"]} for row in rows]
    names = line_names(lines, WIDE_WITH_NAMES + 10, beside(points, axis))
    return Figure(layers, names, width=WIDE_WITH_NAMES)


def newest_pair(store: ArtifactStore) -> tuple[FinishedSearch, FinishedSearch]:
    """Return the newest search without recovery and the newest with a refit.

    Raises:
        ValueError: the store lacks one of them.
    """
    found: dict[str, FinishedSearch] = {}
    for artifact in finished_searches(store):
        search = read_search(store, artifact)
        recover: Row | None = search.settings.get("recover")
        found.setdefault("none" if recover is None else recover["method"], search)
    if not {"none", "refit"} <= found.keys():
        raise ValueError(
            f"{store.url} has finished searches with the recoveries {sorted(found)}, and the picture needs none and "
            "refit. Run `layerwise compare --recoveries none,refit ...` first."
        )
    return found["none"], found["refit"]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    one_shot, refitted = newest_pair(ArtifactStore(sys.argv[1]))
    settings = one_shot.settings
    removed = f"{100 * settings['sparsity']:g} % of the weights removed by {settings['pruner']['method']}"
    model = "SmolLM2-135M" if one_shot.source == "demo" else one_shot.source.split("/")[-1]
    title = [
        f"Perplexity of {model}, {removed}",
        "On the selection text; lower is better",
    ]
    FILE.write_text(svg_file(picture(one_shot, refitted), "curve", title))


if __name__ == "__main__":
    main()
