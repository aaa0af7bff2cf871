"""Tracking of searches by MLflow or Weights & Biases: settings, perplexities, the report.

The store has everything, and tracking only copies it: a service that fails is a warning with the reason, and never ends a
search. What could not be sent is sent with the next stage. A search has one run per service, whose tag ``layerwise.search``
is the same in all runs of the command; a resumed search continues it.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

from layerwise.flows.pipeline.graph import LaneStep, Step
from layerwise.flows.pipeline.inputs import SearchInputs
from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.files.credentials import without_secrets
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import PAGE_FILE
from layerwise.tasks.results.lane_scores import read_score
from layerwise.tasks.results.report_tables import BEST, UNIFORM, errors_table, models_table, sparsities_table
from layerwise.tasks.results.roles import EXPORT, lane_role
from layerwise.tasks.results.search_result import RESULT_FILE, read_search
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.running.printable import one_line
from layerwise.tasks.sample_tokens import token_stage
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE

logger = logging.getLogger(__name__)

TrackingName = Literal["none", "mlflow", "wandb"]
EndState = Literal["finished", "failed", "stopped"]
SEARCH_TAG, KEY_TAG = "layerwise.search", "layerwise.key"
SECONDS_PER_REQUEST = 10  # that a search waits for a tracking server


class Metric(NamedTuple):
    """A number of a tracked run. ``step`` is a layer or a number of windows, and orders numbers of the same name."""

    name: str
    value: float
    step: int = 0


class TrackedRun(Protocol):
    """Run of a tracking service that belongs to one search. Every method raises if the service fails."""

    @property
    def key(self) -> str:
        """Key of the result that the run has already; "" if it is not complete."""

    def log(self, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        """Add settings, tags and numbers."""

    def log_file(self, name: str, content: bytes) -> None:
        """Add a file."""

    def end(self, state: EndState) -> None:
        """End the run. A later run of the same search opens it again."""


def require_tracking(name: TrackingName) -> None:
    """Check that the package of a tracking service is installed.

    Raises:
        ImportError: it is not.
    """
    if name != "none" and find_spec(name) is None:
        raise ImportError(
            f"track is {name}, and the package {name} is not installed. Run `pip install 'layerwise-pruning[{name}]'`, or "
            "set track to none."
        )


@contextmanager
def tracked_search(
    name: TrackingName, store: ArtifactStore, settings: Search, inputs: SearchInputs
) -> Iterator["SearchTracker | None"]:
    """Track a search until the block ends; None if it is not tracked."""
    if name == "none":
        yield None
        return
    tracker = SearchTracker(name, store, settings, inputs)
    try:
        yield tracker
    except Exception:
        tracker.end("failed")
        raise
    except BaseException:  # SIGTERM, Ctrl-C
        tracker.end("stopped")
        raise
    tracker.end("finished")


class SearchTracker:
    """Sends a search to a tracking service. Implements ``Observer``."""

    def __init__(
        self, name: TrackingName, store: ArtifactStore, settings: Search, inputs: SearchInputs
    ) -> None:
        self._name, self._store = name, store
        self._run: TrackedRun | None = None
        self._to_send: deque[Callable[[TrackedRun], None]] = deque()
        self._problem = ""
        requests = inputs.texts.requests
        texts = {
            role: token_stage(inputs.texts.encoding_identity, request).key
            for role, request in requests.items()
        }
        plain = settings.model_dump(mode="json")
        model = inputs.import_stage.key
        self._search = digest({"settings": plain, "model": model, "texts": texts})
        self._title = settings.title
        tags = {
            SEARCH_TAG: self._search,
            "layerwise.model": settings.model,
            "layerwise.model_hash": model.rpartition("/")[2],
            "layerwise.store": store.url,
            "layerwise.version": version("layerwise-pruning"),
        }
        self._send(lambda run: run.log(dict(_flat(plain)), tags, []))

    def began(self, step: Step) -> None:
        """Nothing is known at the beginning of a step."""

    def ended(self, step: Step, artifacts: Sequence[Artifact], seconds: float) -> None:
        if not any(artifact.key in self._store.built for artifact in artifacts):
            return  # of an earlier run, or of another process; the result has it, too
        metrics = [Metric(f"seconds/{step.name.replace(':', '')}", seconds)]
        if isinstance(step, LaneStep):
            for plan, artifact in zip(step.request.plans, artifacts, strict=True):
                losses = read_score(self._store, plan, artifact).losses
                perplexity = math.exp(min(math.fsum(losses) / len(losses), 700.0))
                end = len(losses) + (step.request.windows or (0, 0))[0]
                metrics.append(Metric(_metric_of(plan.beta, plan.offset), perplexity, end))
        if step.name == "capture":
            metrics.append(
                Metric("selection_perplexity/dense", float(str(artifacts[0].facts[DENSE_PERPLEXITY])))
            )
        self._send(lambda run: None if run.key else run.log({}, {}, metrics))

    def complete(self, result: SearchResult, page: Artifact) -> None:
        """Send the result of the search and the page of its report, unless the run has them."""
        assert result.artifact is not None, "the result is committed"
        store, artifact = self._store, result.artifact
        search = read_search(store, artifact)
        metrics = [
            Metric(f"{text}_perplexity/{row['model']}", row[f"{text}_perplexity"])
            for row in models_table(store, search)
            for text in ("selection", "test")
        ]
        for row in result.selection.rows:
            metrics.append(Metric(_metric_of(row.beta, row.offset), row.perplexity, row.windows))
        best = result.selection.best_row
        metrics += [Metric("best_beta", best.beta), Metric("best_offset", best.offset)]
        metrics.append(Metric("realised_sparsity", best.realised_sparsity))
        # The best plan is of the kind "uniform" if it is that one.
        sparsities, errors = sparsities_table(store, search, {}), errors_table(store, search)
        for name, column, table, key in (
            ("layer_sparsity", "sparsity", sparsities, "kind"),
            ("layer_error", "relative_error", errors, "model"),
        ):
            kind = BEST if any(each[key] == BEST for each in table) else UNIFORM
            metrics += [
                Metric(name, each[column], each["layer"])
                for each in table
                if each[key] == kind and each[column] is not None
            ]
        files = {RESULT_FILE: store.read(artifact, RESULT_FILE), PAGE_FILE: store.read(page, PAGE_FILE)}
        if (exported := result.stages.get(EXPORT)) is not None:
            files[SPARSITY_FILE] = store.read(exported, SPARSITY_FILE)

        def send(run: TrackedRun) -> None:
            if run.key == artifact.key:
                return
            for name, content in files.items():
                run.log_file(name, content)
            # The key last: a run with it is complete.
            run.log({}, {KEY_TAG: artifact.key, "layerwise.verdict": result.selection.verdict}, metrics)

        self._send(send)

    def end(self, state: EndState) -> None:
        """Send what is left, and end the run."""
        self._send(lambda run: run.end(state))
        if self._to_send:
            logger.warning(
                "%s lacks a part of this search. To send it, run the same search again with --track %s: everything is in "
                "the store.",
                self._name,
                self._name,
            )

    def _send(self, call: Callable[[TrackedRun], None]) -> None:
        """Make a call to the service after those that have failed so far."""
        self._to_send.append(call)
        try:
            if self._run is None:
                self._run = _open(self._name, self._search, self._title)
            while self._to_send:
                self._to_send[0](self._run)
                self._to_send.popleft()
        except Exception as error:  # clients raise errors of their own and of their libraries
            problem = one_line(without_secrets(f"{type(error).__name__}: {error}"))[:500]
            if problem != self._problem:
                logger.warning("%s did not accept a report (%s); the search continues", self._name, problem)
            self._problem = problem


def _open(name: TrackingName, search: str, title: str) -> TrackedRun:
    """Open the run of a search; create it if there is none."""
    if name == "mlflow":
        from layerwise.flows.observers.mlflow_run import MLflowRun

        return MLflowRun(search, title)
    from layerwise.flows.observers.wandb_run import WandbRun

    return WandbRun(search, title)


def _metric_of(beta: float, offset: float) -> str:
    """Return the name of a plan's metric, such as "selection_perplexity/beta 0.1"."""
    return f"selection_perplexity/{lane_role(beta, offset).removeprefix('lane ')}"


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings by name; those of a method as ``pruner.block_size``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", "" if value is None else str(value)
