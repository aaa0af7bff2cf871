"""The content of a report as plain values, from which the page, the figures and the Parquet files are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.scoring.criterion import Criterion
from layerwise.sparse.speed import SpeedTable
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.lanes.recovered_layers import OUTCOMES_FILE
from layerwise.tasks.pages.theory_section import TheorySection, read_section
from layerwise.tasks.results.calibration_mix import (
    SOURCE_FACTS,
    counted_document,
    counted_sentence,
    mix_rows,
)
from layerwise.tasks.results.distillation import Distillation, read_distillation
from layerwise.tasks.results.measured_on import MeasuredOn, measured_on
from layerwise.tasks.results.report_tables import (
    Rows,
    betas_table,
    errors_table,
    linears_table,
    models_table,
    sparsities_table,
)
from layerwise.tasks.results.roles import EXPORT, LOADED_BY, RECOVERED_BEST
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.results.search_result import VERSIONS, FinishedSearch
from layerwise.tasks.results.stage_times import stages_table
from layerwise.tasks.results.summary import recovery_rows

TEXTS = ("calibration", "selection", "test")
AUTO_CLASS = "AutoModelForCausalLM"  # of an export that names no other class


@dataclass(frozen=True)
class ZeroShotAccuracies:
    """Accuracies on one zero-shot task, as fractions.

    Attributes:
        stderr: standard error of the best plan's accuracy.
        difference: accuracy of the best plan minus that of the uniform one, on the same questions.
        p: p-value of McNemar's test of that difference; None if all answers are equal.
        distilled: accuracy of the distilled model; None if it was not tested.
        distilled_difference: accuracy of the distilled model minus that of the best plan.
        distilled_p: p-value of McNemar's test of that difference.
    """

    task: str
    dense: float
    uniform: float
    best: float
    stderr: float
    difference: float
    p: float | None
    distilled: float | None = None
    distilled_difference: float | None = None
    distilled_p: float | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """Fields by name, without those of the distilled model if it was not tested: reports without one keep their keys."""
        untested = self.distilled is None
        return {
            name: value
            for name, value in vars(self).items()
            if not (untested and name.startswith("distilled"))
        }


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes of all files of a checkpoint.

    Attributes:
        exported: the pruned checkpoint with its zeros; None if it was not exported.
        compressed: the pruned checkpoint without its zeros; None if it was not compressed.
    """

    dense: int
    exported: int | None = None
    compressed: int | None = None


@dataclass(frozen=True)
class Extras:
    """Results that were measured after the search. The report omits those that are missing.

    Attributes:
        tasks: rows of the table of tasks, by title of the column, if it has few-shot tasks, groups or generated answers; it is
            shown in place of ``zero_shot``.
        theory: key of the artifact of ``layerwise.tasks.theory.measure_theory``; empty if there is none.
        distilled: key of the artifact of ``layerwise.tasks.recovery.distill.distill``; empty if there is none.
    """

    zero_shot: tuple[ZeroShotAccuracies, ...] = ()
    sizes: CheckpointSizes | None = None
    speed: SpeedTable | None = None
    theory: str = ""
    distilled: str = ""
    tasks: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Attributes:
        search: key of the search's artifact.
        settings: settings of the search, by name.
        parameter: name of beta for the allocator of the search.
        measured: conditions of the perplexities, by text.
        tables: rows by table name. Every number on the page and in a figure is in one of them.
        checkpoint: facts that the import recorded about the model.
        versions: versions of the packages that finished the search, by name; empty if they were not recorded.
        command: command that runs the same search; empty if it is not known.
        theory: findings on the theorems of the paper; None if they were not measured.
        recovery: sentences on the recovery; empty without recovery.
        distillation: result of the distillation; None if the model was not distilled.
        criterion: what the plans were compared by.
        counted: sentence on the calibration tokens that count; empty if all do.
        kl_gain: like ``gain``, for the divergence from the dense model; None if it was not measured.
        experts: sentences on the calibration tokens of the experts; empty for most models.
        folders: folders of the written checkpoints by their names on the page, relative to the store's root.
        auto_class: class of transformers that loads these checkpoints.
    """

    search: str
    title: str
    source: str
    settings: Mapping[str, Any]
    verdict: str
    parameter: str
    measured: Mapping[str, MeasuredOn]
    gain: Mapping[str, Any] | None
    tables: Mapping[str, Rows]
    checkpoint: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    extras: Extras
    theory: TheorySection | None
    recovery: str
    distillation: Distillation | None
    criterion: Criterion
    kl_gain: Mapping[str, Any] | None
    counted: str
    experts: str
    folders: Mapping[str, str]
    auto_class: str


def report_data(
    store: ArtifactStore,
    search: FinishedSearch,
    compared: Mapping[str, FinishedSearch],
    command: str,
    extras: Extras,
) -> ReportData:
    """Read the content of a report from the artifacts of a search.

    Args:
        compared: other searches of a comparison, by their names in the report.
        command: command that runs the same search.
    """
    versions = search.artifact.facts.get(VERSIONS, {})
    assert isinstance(versions, dict), "versions are recorded by package"
    gain, kl = search.test.gain, search.test.kl
    theory = read_section(store, store.get(extras.theory)) if extras.theory else None
    distilled = store.get(extras.distilled) if extras.distilled else None
    distillation = None if distilled is None else read_distillation(store, distilled)
    exported = search.stages.get(EXPORT)
    written = {"pruned model": exported, "distilled model": distilled}
    return ReportData(
        search.artifact.key,
        f"{title_of(search.source)} at sparsity {search.settings['sparsity']:g}",
        search.source,
        search.settings,
        search.selection.verdict,
        search.selection.parameter,
        measured_on(search.stages),
        None if gain is None else vars(gain),
        {
            "models": models_table(store, search),
            "betas": betas_table(search),
            "sparsities": sparsities_table(store, search, compared),
            "errors": errors_table(store, search),
            "linears": linears_table(store, search),
            "stages": stages_table(store, search),
            "artifacts": _artifacts(search),
            "texts": _texts(search),
            **_tables_of_recovery(store, search),
            **_tables_of_experts(search),
            **_tables_of_extras(extras),
            **({} if theory is None else {"theory_layers": theory.layers, "theory_plans": theory.plans}),
            **(
                {}
                if distillation is None
                else {"distillation": [dict(vars(row)) for row in distillation.rows]}
            ),
        },
        search.stages["checkpoint"].facts,
        versions,
        command,
        extras,
        theory,
        search.recovery_text,
        distillation,
        search.selection.criterion,
        None if kl is None or kl.gain is None else vars(kl.gain),
        counted_sentence(_counted(search)),
        search.experts_text,
        {name: artifact.folder for name, artifact in written.items() if artifact is not None},
        str(exported.facts.get(LOADED_BY, AUTO_CLASS)) if exported is not None else AUTO_CLASS,
    )


def _counted(search: FinishedSearch) -> Mapping[str, int]:
    if search.settings.get("calibrate_on", "all") == "all":
        return {}
    return counted_document(search.stages["calibration"], search.stages["capture"])


def _tables_of_recovery(store: ArtifactStore, search: FinishedSearch) -> dict[str, Rows]:
    """Return the perplexities with and without recovery, and the errors of the best plan's layers."""
    if search.recovery is None:
        return {}
    outcomes = read_table(store, search.stages[RECOVERED_BEST], OUTCOMES_FILE).to_pylist()
    layers = [
        {"layer": row["layer"], "error": f"{name} recovery", "value": row[name]}
        for row in outcomes
        for name in ("before", "after")
    ]
    return {"recovery": recovery_rows(search.recovery), "recovered_layers": layers}


def _tables_of_experts(search: FinishedSearch) -> dict[str, Rows]:
    """Return the calibration tokens of every expert, and whether it is pruned by the inputs of all of its layer."""
    rows = [
        {"layer": row["layer"], "expert": f"{row['experts']}.{expert}", "tokens": tokens}
        | {"pruned_by_all": expert in row["pruned_by_all"]}
        for row in search.experts
        for expert, tokens in enumerate(row["tokens"])
    ]
    return {"experts": rows} if rows else {}


def _artifacts(search: FinishedSearch) -> Rows:
    everything = {**search.stages, "search": search.artifact}
    return [
        {"role": role, "artifact": artifact.key, "content": artifact.content, "bytes": artifact.size}
        for role, artifact in everything.items()
    ]


def _texts(search: FinishedSearch) -> Rows:
    facts = {role: search.stages[role].facts for role in TEXTS}
    rows: Rows = [{"text": role, **{name: facts[role].get(name) for name in SOURCE_FACTS}} for role in TEXTS]
    if not (mix := mix_rows(facts["calibration"])):
        return rows
    return [{"text": "calibration", **row} for row in mix] + [{**row, "share": 1.0} for row in rows[1:]]


def _tables_of_extras(extras: Extras) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    sequences: dict[str, Sequence[object]] = {}
    if extras.zero_shot:
        found["zero_shot"] = [row.columns for row in extras.zero_shot]
    if extras.tasks:
        found["tasks"] = [dict(row) for row in extras.tasks]
    if extras.sizes is not None:
        sequences["sizes"] = [extras.sizes]
    if extras.speed is not None:
        sequences["speed"] = extras.speed.speeds
    return found | {name: [dict(vars(row)) for row in rows] for name, rows in sequences.items() if rows}
