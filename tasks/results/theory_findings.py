"""Findings on the theorems of ATP (arXiv:2502.14770, section 3), from the tables of a ``theory`` artifact."""

from typing import Any

from layerwise.scoring.local_errors import LocalErrors
from layerwise.scoring.theorem_checks import Findings, Orders, outcome_of, propagation_of, rise_of
from layerwise.scoring.theorem_plans import UNIFORM
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table

LAYERS_FILE = "layers.parquet"  # one row per plan and layer
PLANS_FILE = "plans.parquet"
THEORY_STAGE = "theory"

Row = dict[str, Any]
Rows = list[Row]


def read_tables(store: ArtifactStore, artifact: Artifact) -> tuple[Rows, Rows]:
    """Read an artifact of ``theory``: the rows by plan and layer, and the rows by plan."""
    layers, plans = (read_table(store, artifact, name).to_pylist() for name in (LAYERS_FILE, PLANS_FILE))
    return layers, plans


def findings_of(layers: Rows, plans: Rows) -> Findings:
    """Compare the theorems with the measured errors and losses.

    Args:
        layers: one row per plan and layer.
        plans: one row per plan.
    """
    rows_of: dict[tuple[str, float], Rows] = {}
    for row in layers:
        rows_of.setdefault((row["order"], row["target"]), []).append(row)
    parts = {plan: [_parts_of(row) for row in rows] for plan, rows in rows_of.items()}
    outcomes = {
        (plan["order"], plan["target"]): outcome_of(
            plan["order"],
            [row["error"] for row in rows_of[plan["order"], plan["target"]]],
            [row["dense_energy"] for row in rows_of[plan["order"], plan["target"]]],
            plan["losses"],
        )
        for plan in plans
    }
    levels = tuple(target for order, target in parts if order == UNIFORM)
    target = next(target for order, target in parts if order != UNIFORM)
    return Findings(
        levels,
        target,
        rise_of([[each.local for each in parts[UNIFORM, level]] for level in levels]),
        {level: propagation_of(parts[UNIFORM, level]) for level in levels},
        Orders(tuple(outcome for (order, _), outcome in outcomes.items() if order != UNIFORM)),
        outcomes[UNIFORM, target],
    )


def verdicts(found: Findings) -> dict[str, bool]:
    """Return, for each theorem that can be measured, whether it held in every case."""
    return {"3.1": found.rise.holds, "3.2": found.propagation.holds, "3.5": found.orders.holds}


def _parts_of(row: Row) -> LocalErrors:
    return LocalErrors(
        row["windows"], row["local"], row["arriving"], row["propagated"], row["accumulated"], row["energy"]
    )
