"""All that a report says, as plain values: what the page, the figures and the Parquet files are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.pages.report_extras import Extras
from layerwise.tasks.pages.report_tables import (
    Rows,
    betas_table,
    errors_table,
    linears_table,
    models_table,
    sparsities_table,
)
from layerwise.tasks.pages.stage_times import stages_table
from layerwise.tasks.pages.theory_section import TheorySection, read_section
from layerwise.tasks.results.measured_on import MeasuredOn, measured_on
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.results.search_result import VERSIONS, FinishedSearch

TEXTS = ("calibration", "selection", "test")
OF_A_TEXT = ("corpus", "text_sha256", "text_tokens", "part_tokens", "windows", "seqlen")


@dataclass(frozen=True)
class ReportData:
    """What a report says.

    Attributes:
        search: key of the search's artifact.
        settings: of the search, by name.
        parameter: what beta is called with this allocator.
        measured: what the perplexities of a text were measured on, by text.
        tables: rows by the name of their table; every number of the page and of a figure is in one of them.
        checkpoint: what the import noted of the model.
        versions: of the packages of the process that finished the search, by name; empty if they were not noted.
        command: that makes the same search; empty if it is not known.
        theory: what was found of the paper's theorems; None if nobody has looked.
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


def report_data(
    store: ArtifactStore,
    search: FinishedSearch,
    compared: Mapping[str, FinishedSearch],
    command: str,
    extras: Extras,
) -> ReportData:
    """Read what a report says from the artifacts of a search.

    Args:
        compared: other searches of a comparison, by what they are called.
        command: that makes the same search, for people.
    """
    versions = search.artifact.facts.get(VERSIONS, {})
    assert isinstance(versions, dict), "versions are noted by package"
    gain = search.test.gain
    theory = read_section(store, store.get(extras.theory)) if extras.theory else None
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
            **_tables_of_extras(extras),
            **({} if theory is None else {"theory_layers": theory.layers, "theory_plans": theory.plans}),
        },
        search.stages["checkpoint"].facts,
        versions,
        command,
        extras,
        theory,
    )


def _artifacts(search: FinishedSearch) -> Rows:
    everything = {**search.stages, "search": search.artifact}
    return [
        {"role": role, "artifact": artifact.key, "content": artifact.content, "bytes": artifact.size}
        for role, artifact in everything.items()
    ]


def _texts(search: FinishedSearch) -> Rows:
    facts = {role: search.stages[role].facts for role in TEXTS}
    return [{"text": role, **{name: facts[role].get(name) for name in OF_A_TEXT}} for role in TEXTS]


def _tables_of_extras(extras: Extras) -> dict[str, Rows]:
    sequences: dict[str, Sequence[object]] = {"zero_shot": extras.zero_shot}
    if extras.sizes is not None:
        sequences["sizes"] = [extras.sizes]
    if extras.speed is not None:
        sequences["speed"] = extras.speed.speeds
    return {name: [dict(vars(row)) for row in rows] for name, rows in sequences.items() if rows}
