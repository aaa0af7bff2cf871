"""The tables of a report: rows of numbers, read from the artifacts of a finished search."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.models.expert_names import kind_of
from layerwise.scoring.perplexity import DIVERGED
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.lane_scores import ERRORS_FILE, LAYERS_FILE, LINEARS_FILE
from layerwise.tasks.results.search_result import FinishedSearch
from layerwise.tasks.results.selection import ScoreRow

Row = dict[str, Any]
Rows = list[Row]

UNIFORM, BEST, TRIED, COMPARED = "uniform", "best", "tried", "compared"  # kinds of plans
# A plan with more than this multiple of the best perplexity counts as failed. Its exact perplexity says nothing, and
# would flatten the curve of the others.
WORST_SHOWN = 1000.0


def models_table(store: ArtifactStore, search: FinishedSearch) -> Rows:
    """Return the perplexities and numbers of zeros of the dense, the uniform and the best model.

    With the criterion ``kl``, also the divergences from the dense model; for a test text of conversations, also the
    perplexities of the responses.
    """
    selection, test = search.selection, search.test
    uniform, best = selection.rows[0], selection.best_row
    linears = {row: read_table(store, search.lane(row), LINEARS_FILE) for row in {uniform, best}}
    weights = sum(linears[uniform]["weights"].to_pylist())
    rows: Rows = [
        {
            "model": "dense",
            "plan": "nothing removed",
            "selection_perplexity": selection.dense_perplexity,
            "test_perplexity": test.dense,
            "weights": weights,
            "zeros": 0,
            **({} if test.kl is None else {"selection_kl": 0.0, "test_kl": 0.0}),
        }
    ]
    of_responses = {}
    if test.responses is not None:
        of_responses = {UNIFORM: test.responses.uniform, BEST: test.responses.best}
        rows[0]["test_responses"] = test.responses.dense
    divergences = (None, None) if test.kl is None else (test.kl.uniform, test.kl.best)
    tests = zip((test.uniform, test.best), divergences, strict=True)
    for name, row, (tested, kl) in zip((UNIFORM, BEST), (uniform, best), tests, strict=True):
        rows.append(
            {
                "model": name,
                "plan": plan_name(search, row),
                "selection_perplexity": row.perplexity,
                "test_perplexity": tested,
                "weights": weights,
                "zeros": sum(linears[row]["zeros"].to_pylist()),
                **({} if kl is None else {"selection_kl": row.kl, "test_kl": kl}),
                **({"test_responses": of_responses[name]} if of_responses else {}),
            }
        )
    return rows


def betas_table(search: FinishedSearch) -> Rows:
    """Return a row for every plan that was tried, with ``criterion_interval`` as ``low`` and ``high``.

    ``compared`` is what the plans were compared by in nats, the loss or the divergence from the dense model. With the
    criterion ``kl``, ``kl`` is that divergence.
    """
    selection = search.selection
    worst = min(WORST_SHOWN * selection.best_row.perplexity, math.exp(DIVERGED / 2))
    rows = []
    for row in selection.rows:
        difference = row.above_best
        low, high = criterion_interval(row)
        rows.append(
            {
                "plan": plan_name(search, row),
                "kind": _kind(search, row),
                "beta": row.beta,
                "offset": row.offset,
                "loss": row.loss,
                "compared": row.compared,
                **({} if row.kl is None else {"kl": row.kl}),
                "perplexity": row.perplexity,
                "low": low,
                "high": high,
                "above_best": None if difference is None else difference.mean,
                "t": None if difference is None else difference.t,
                "worse": difference is not None and difference.significant,
                "failed": row.perplexity > worst or row.compared > DIVERGED / 2,
                "realised_sparsity": row.realised_sparsity,
                "windows": row.windows,
            }
        )
    return rows


def criterion_interval(row: ScoreRow) -> tuple[float, float]:
    """Return the 95 % interval of the paired difference to the best plan, around the row's perplexity or divergence.

    Its width is 0 where it is undefined (the best plan, a single window, no spread), and limited by ``WORST_SHOWN``.
    """
    half = None if row.above_best is None else row.above_best.half_interval
    if row.kl is not None:
        half = min(half or 0.0, WORST_SHOWN)
        return row.kl - half, row.kl + half
    if half is None:
        return row.perplexity, row.perplexity
    half = min(half, math.log(WORST_SHOWN))
    return row.perplexity * math.exp(-half), row.perplexity * math.exp(half)


def sparsities_table(
    store: ArtifactStore, search: FinishedSearch, compared: Mapping[str, FinishedSearch]
) -> Rows:
    """Return the share of zeros in the pruned linears of every layer, for all plans of a search.

    Args:
        compared: other searches of a comparison, by their names in the report. Their best plans are included.
    """
    rows = []
    for row in search.selection.rows:
        rows += _sparsities(store, search.lane(row), plan_name(search, row), _kind(search, row))
    for name, other in compared.items():
        best = other.selection.best_row
        rows += _sparsities(store, other.lane(best), f"{name}, {plan_name(other, best)}", COMPARED)
    return rows


def _sparsities(store: ArtifactStore, lane: Artifact, plan: str, kind: str) -> Rows:
    table = read_table(store, lane, LINEARS_FILE)
    sums = table.group_by("layer").aggregate([("zeros", "sum"), ("weights", "sum")]).to_pylist()
    return [
        {
            "plan": plan,
            "kind": kind,
            "layer": layer["layer"],
            "weights": layer["weights_sum"],
            "zeros": layer["zeros_sum"],
            "sparsity": layer["zeros_sum"] / layer["weights_sum"],
        }
        for layer in sorted(sums, key=lambda layer: layer["layer"])
    ]


def errors_table(store: ArtifactStore, search: FinishedSearch) -> Rows:
    """Return the reconstruction error of every layer's output on the test windows, relative to the dense energy.

    On the first of the windows, also the error that pruning the layer itself adds, and the factor by which the layer
    changes the arriving error. Artifacts of earlier versions lack these two.
    """
    tested = search.stages["evaluate"]
    rows = []
    for model in (UNIFORM, BEST):
        if f"{model}/{LAYERS_FILE}" not in tested.files:
            continue  # the uniform plan is the best one
        parts = _parts_of_errors(store, tested, f"{model}/{ERRORS_FILE}")
        for row in read_table(store, tested, f"{model}/{LAYERS_FILE}").to_pylist():
            relative = {"relative_error": _ratio(row["error"], row["dense_energy"])}
            rows.append({"model": model, **row, **relative, **parts.get(row["layer"], {})})
    return rows


def _parts_of_errors(store: ArtifactStore, tested: Artifact, file: str) -> dict[int, dict[str, Any]]:
    """Return the parts of the errors by layer; empty if the test did not measure them."""
    if file not in tested.files:
        return {}
    return {
        row["layer"]: {
            "relative_local_error": _ratio(row["local"], row["energy"]),
            "propagation_factor": row["factor"],
        }
        for row in read_table(store, tested, file).to_pylist()
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def linears_table(store: ArtifactStore, search: FinishedSearch) -> Rows:
    """Return the realised sparsity of every linear of the best plan."""
    table = read_table(store, search.lane(search.selection.best_row), LINEARS_FILE)
    return [{**row, "sparsity": row["zeros"] / row["weights"]} for row in table.to_pylist()]


def by_kind(linears: Rows) -> Rows:
    """Add up the rows of ``linears_table`` for the same linear of all experts of a layer, for figures."""
    rows: dict[tuple[int, str], Row] = {}
    for row in linears:
        kind = kind_of(row["linear"])
        total = rows.setdefault((row["layer"], kind), {**row, "linear": kind, "weights": 0, "zeros": 0})
        total["weights"] += row["weights"]
        total["zeros"] += row["zeros"]
    return [{**row, "sparsity": row["zeros"] / row["weights"]} for row in rows.values()]


def plan_name(search: FinishedSearch, row: ScoreRow) -> str:
    """Return the name of a plan in figures: "uniform", or beta and offset."""
    rows: Sequence[ScoreRow] = search.selection.rows
    return UNIFORM if row == rows[0] else search.selection.name(rows.index(row))


def _kind(search: FinishedSearch, row: ScoreRow) -> str:
    if row == search.selection.best_row:
        return BEST
    return UNIFORM if row == search.selection.rows[0] else TRIED
