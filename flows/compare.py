"""Compare: several searches of one model, at several sparsities, with several pruners or calibration samples."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated, cast

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.logging import get_run_logger
from pydantic import BaseModel, Field, model_validator

from flows.cancelling import cancelled
from flows.result import SearchResult
from flows.search import run_search
from flows.settings import PrunerChoice, Runtime, Search
from layerwise.perplexity import DIVERGED
from storage.running import announced
from storage.store import ArtifactStore
from tasks.progress import going_on_without_prefect
from tasks.stopping import stopping_on_sigterm

COLUMNS = (
    "Perplexities. Gain: how far the best beta's is below uniform's on the test text; t: of the paired difference of "
    "their losses, over the test windows, negative if the best beta's is lower."
)


class SearchFailed(RuntimeError):
    """One of several searches cannot be done; which one, and why."""


class Compare(BaseModel):
    """Search one model several times: every sparsity with every pruner and every seed."""

    model_config = Search.model_config

    search: Search = Field(description="What all searches have in common.")
    sparsities: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(), description="Overall sparsities, each between 0 and 1; empty: the common one."
    )
    pruners: tuple[PrunerChoice, ...] = Field(
        default=(), description="How the weights to remove are chosen; empty: the common way."
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="Seeds of the random calibration windows; each asks for a pass of the dense model of its own. "
        "Empty: the common one.",
    )

    @model_validator(mode="after")
    def _each_search_once(self) -> "Compare":
        for name in ("sparsities", "pruners", "seeds"):
            values = getattr(self, name)
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                shown = getattr(twice[0], "method", twice[0])
                raise ValueError(f"{name} has {shown} more than once; give each of them once.")
        _ = self.searches
        return self

    @property
    def searches(self) -> tuple[Search, ...]:
        """Every combination, by sparsity first, in the order in which they were given."""
        common = dict(self.search)
        return tuple(
            Search(**common | {"sparsity": sparsity, "pruner": pruner, "seed": seed})
            for sparsity, pruner, seed in product(
                self.sparsities or (self.search.sparsity,),
                self.pruners or (self.search.pruner,),
                self.seeds or (self.search.seed,),
            )
        )

    @property
    def title(self) -> str:
        """The searches in some words, for lists of runs."""
        more = "".join(f", {sparsity:g}" for sparsity in self.sparsities[1:])
        pruners = ", ".join(pruner.method for pruner in self.pruners or (self.search.pruner,))
        seeds = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        return f"{self.searches[0].title}{more}: {pruners}{seeds}"


@flow(name="compare", flow_run_name="{settings.title}", persist_result=False)
def compare(settings: Compare, runtime: Runtime) -> list[SearchResult]:
    """Search a model at several sparsities, with several pruners or seeds, one after the other; compare the results.

    What the searches have in common is computed once. Safe to stop and start again.

    Args:
        settings: The searches; decides the results.
        runtime: Where and how; changes nothing in the results.

    Raises:
        SearchFailed: one of them cannot be done; the results of those before it stay in the store.
        CancelledRun: with ``fan_out``, somebody cancelled the run or a part of it.
    """
    store = ArtifactStore(runtime.store)
    with stopping_on_sigterm(), announced(store.fs, store.root, f"compare: {settings.title}"):
        try:
            results = _search_all(settings.searches, runtime)
        except (CancelledRun, TerminationSignal) as ending:
            return cast(list[SearchResult], cancelled(ending))
    with going_on_without_prefect():
        create_table_artifact(
            key="compare-result",
            table=comparison_rows(results),
            description=f"{results[0].source}. {COLUMNS}",
        )
    return results


def _search_all(searches: Sequence[Search], runtime: Runtime) -> list[SearchResult]:
    logger, results = get_run_logger(), []
    for number, search in enumerate(searches, 1):
        which = f"search {number} of {len(searches)}: {_named(search)}"
        logger.info(which)
        try:
            # A store of its own, as each result tells what its search has built.
            results.append(run_search(ArtifactStore(runtime.store), search, runtime))
        except CancelledRun:  # by somebody who knows which
            raise
        except Exception as error:  # of whatever kind: who reads it has to know which search it was
            problem = str(error) or type(error).__name__
            raise SearchFailed(f"{which}: {problem}") from error
    return results


def comparison_rows(results: Sequence[SearchResult]) -> list[dict[str, str | float]]:
    """The table of a comparison: one row per search."""
    rows: list[dict[str, str | float]] = []
    for result in results:
        selection, test = result.selection, result.test
        t = None if test.gain is None else test.gain.t
        rows.append(
            {
                "sparsity": result.settings.sparsity,
                "pruner": result.settings.pruner.method,
                "seed": result.settings.seed,
                "best beta": selection.best_row.beta,
                "selection: dense": _perplexity(selection.dense_perplexity),
                "selection: uniform": _perplexity(selection.rows[0].perplexity),
                "selection: best": _perplexity(selection.best_row.perplexity),
                "test: uniform": _perplexity(test.uniform),
                "test: best": _perplexity(test.best),
                "gain %": round(100 * (1 - test.best / test.uniform), 1),
                "t": "" if t is None else f"{t:.1f}",
            }
        )
    return rows


def _named(search: Search) -> str:
    return f"sparsity {search.sparsity:g}, {search.pruner.method}, seed {search.seed}"


def _perplexity(value: float) -> str | float:
    return "diverged" if value >= math.exp(DIVERGED) else round(value, 2)
