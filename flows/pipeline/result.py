"""Result of a search: the chosen plan, its test, the artifacts, and the work of the run."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from layerwise.flows.options import search_command
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.calibration_mix import counted_document, mix_rows
from layerwise.tasks.results.evaluation import RecoveryTest, TestResult
from layerwise.tasks.results.measured_on import measured_on
from layerwise.tasks.results.roles import COUNTED, EXPORT, LOADED_BY, MIX
from layerwise.tasks.results.search_result import RESULT_FILE, RESULT_STAGE, VERSIONS
from layerwise.tasks.results.selection import Selection
from layerwise.tasks.results.summary import sentence_on_experts

# Packages that may change a number with their version.
PACKAGES = (
    "layerwise-pruning",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "prefect",
)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search, and the work of the run.

    Attributes:
        pruned: location of the exported checkpoint; None if the search does not export.
        stages: all artifacts of the search by role.
        built: roles of the artifacts that were built in this run, by this process or by others.
        bytes_read: bytes of weights that this process read.
        recovery: perplexities with and without recovery; None if the search does not recover.
        recovery_text: sentences on the recovery; "" if the search does not recover.
        artifact: artifact of the search itself; None before it is committed.
        report: location of the report's page; "" before it exists.
        experts: calibration tokens of the experts, see ``statistics_table.expert_rows``; empty for most models.
    """

    settings: Search
    source: str
    selection: Selection
    test: TestResult
    pruned: str | None
    stages: Mapping[str, Artifact]
    built: tuple[str, ...]
    bytes_read: int
    recovery: RecoveryTest | None = None
    recovery_text: str = ""
    artifact: Artifact | None = None
    report: str = ""
    experts: tuple[Mapping[str, Any], ...] = ()


def loading_class(result: SearchResult) -> str:
    """Return the name of the class of transformers that loads the exported model."""
    return str(result.stages[EXPORT].facts.get(LOADED_BY, "AutoModelForCausalLM"))


def commit_result(store: ArtifactStore, result: SearchResult) -> tuple[SearchResult, Artifact]:
    """Commit the result of a search and its report to the store.

    Returns:
        The result with its artifact and the location of its report, and the report's artifact.
    """
    keys = {role: artifact.key for role, artifact in result.stages.items()}
    document: dict[str, Any] = {
        "settings": result.settings.model_dump(mode="json"),
        "source": result.source,
        "verdict": result.selection.verdict,
        "selection": result.selection.document,
        "test": result.test.document,
        "measured on": {text: asdict(what) for text, what in measured_on(result.stages).items()},
        "stages": keys,
    }
    if result.recovery is not None:
        document["recovery"] = {**asdict(result.recovery), "text": result.recovery_text}
    if result.experts:
        document["experts"] = {"text": sentence_on_experts(result.experts), "layers": result.experts}
    if mix := mix_rows(result.stages["calibration"].facts):
        document[MIX] = mix
    if result.settings.calibrate_on == "responses":
        document[COUNTED] = counted_document(result.stages["calibration"], result.stages["capture"])
    settings = {"settings": document["settings"], "source": result.source}
    stage = Stage(RESULT_STAGE, 1, settings, {role.replace(" ", "-"): key for role, key in keys.items()})

    def build(draft: Draft) -> None:
        draft.write(RESULT_FILE, json.dumps(document, indent=1).encode())
        draft.facts |= {"verdict": result.selection.verdict, "source": result.source, VERSIONS: versions()}

    artifact = store.get_or_build(stage, build)
    page = report(store, artifact, search_command(result.settings))
    return replace(result, artifact=artifact, report=store.location(page, PAGE_FILE)), page


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages in this process, by name."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **packages}


def work_sentence(result: SearchResult) -> str:
    """Describe the work of the run in one sentence."""
    if not result.built:
        return "Everything was in the store already: no layer was computed, no weight was read."
    computed = [role for role in result.built if role not in ("allocate", "select")]
    read = f", {result.bytes_read / 1e9:.2f} GB of weights read" if result.bytes_read else ""
    return f"Built {len(result.built)} of {len(result.stages)} artifacts ({', '.join(computed)}){read}."
