"""A finished search, reopened with its lanes for zero-shot tasks, a compressed or a distilled checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from pydantic import ValidationError

from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Scored, export_lane, scoring_steps
from layerwise.flows.pipeline.inputs import SearchInputs, check_inputs
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import branch
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.pages.model_card import ModelCard, recovery_section
from layerwise.tasks.pages.model_card_data import card_of_lane
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.search_result import FinishedSearch, read_search
from layerwise.tasks.results.summary import recovery_rows
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE


@dataclass(frozen=True)
class ReopenedSearch:
    """A finished search and its lanes.

    Attributes:
        best: lane of the chosen plan; the uniform lane if that was chosen.
    """

    search: FinishedSearch
    settings: Search
    inputs: SearchInputs
    scored: Scored
    best: LaneScore

    def exported(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Artifact:
        """Return the checkpoint pruned by the plan of ``lane``; export it if the store does not have it."""
        return export_lane(store, self.scored, lane, execution)

    def card(self, store: ArtifactStore, exported: Artifact) -> ModelCard:
        """Return the model card of the export of the best lane, with the results on the selection text."""
        before = self.scored.captured
        rows = json.loads(store.read(exported, SPARSITY_FILE))["linears"]
        card = card_of_lane(before.inputs("selection"), self.best, self.scored.uniform, before.pruning, rows)
        return replace(card, allocator=self.settings.allocation_title)

    @property
    def recovery_section(self) -> str:
        """Section of a model card on the recovery; empty without recovery."""
        if self.search.recovery is None:
            return ""
        return recovery_section(self.search.recovery_text, recovery_rows(self.search.recovery))

    def checkpoint(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Checkpoint:
        """Return the checkpoint pruned by the plan of ``lane``, opened for reading."""
        return open_exported(store, self.exported(store, lane, execution))

    def checkpoint_without_recovery(self, store: ArtifactStore, execution: Execution) -> Checkpoint:
        """Return the checkpoint that is pruned by the best plan and not recovered; prune, score and export it if needed."""
        before = self.scored.captured
        inputs, pruning = before.inputs("selection"), before.pruning.one_shot
        plans = list(self.scored.plans_to_recover.values())
        lanes = branch(store, inputs, plans, before.linears, pruning, execution)
        exported = export(store, inputs, lanes[-1], lanes[0], before.linears, pruning, execution)
        return open_exported(store, exported)


def reopen_search(store: ArtifactStore, key: str | None, execution: Execution) -> ReopenedSearch:
    """Open a finished search, and build those of its lanes that are missing.

    Args:
        key: key of the search or its beginning; None for the newest search.

    Raises:
        KeyError: no artifact has this key, or several keys begin with it; or artifacts of the search were deleted.
        ValueError: the artifact is not the result of a search, its settings are unknown, or other linears are pruned
            today.
    """
    search = read_search(store, artifact_by_key(store, key))
    settings = settings_of(search)
    inputs = check_inputs(store, settings)
    _require_same_linears(search, inputs)
    scored, _ = build(scoring_steps(store, settings, inputs), execution)
    return ReopenedSearch(search, settings, inputs, scored, scored.scores[search.selection.best])


def settings_of(search: FinishedSearch) -> Search:
    """Return the settings of a finished search.

    Raises:
        ValueError: this version does not know a setting, such as a pruner that was defined in a script.
    """
    try:
        return Search.model_validate(search.settings)
    except ValidationError as error:
        unknown = sorted({str(problem["loc"][0]) for problem in error.errors() if problem["loc"]})
        raise ValueError(
            f"{search.artifact.key} has settings that this version of layerwise does not know ({', '.join(unknown)}). Use "
            "the version that made it. A pruner of your own must be added to the package: see docs/development.md."
        ) from error


def _require_same_linears(search: FinishedSearch, inputs: SearchInputs) -> None:
    """Refuse a search whose lanes pruned linears that stay dense today, or the other way round.

    Its model would be pruned anew, and be presented with the test results of the old one.
    """
    captured = search.stages["capture"]
    recorded = cast(Mapping[str, str], captured.recipe.get("inputs", {})).get("checkpoint")
    if recorded is not None and inputs.checkpoint is not None and recorded != inputs.checkpoint.identity:
        raise ValueError(
            f"{search.artifact.key} was made by a version of layerwise or transformers that prunes other linears of this "
            "model. Run the search again."
        )
