"""The searches of a comparison: run one after the other, and together where they have most in common."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby

from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger

from layerwise.flows.options import search_command
from layerwise.flows.pipeline.comparison_tables import Compared
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.shared_searches import advance_together
from layerwise.flows.runtime import Runtime
from layerwise.flows.search import run_search
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.evaluation import best_losses

Named = tuple[Search, str]  # a search, and what its way of allocating is called


class SearchFailed(RuntimeError):
    """One of several searches cannot be done; which one, and why."""


def search_all(searches: Sequence[Named], runtime: Runtime) -> list[Compared]:
    """Run the searches; on this machine those of one cell advance together.

    Raises:
        SearchFailed: one of them cannot be done; the results of those before it stay in the store.
        CancelledRun: with ``fan_out``, somebody cancelled the run or a part of it.
    """
    results: list[Compared] = []
    # Only the way of allocating tells the searches of a cell apart.
    for _, cell in groupby(searches, key=lambda named: (named[0].sparsity, named[0].pruner, named[0].seed)):
        results += _search_cell([*cell], len(results), len(searches), runtime)
    return results


def _search_cell(cell: Sequence[Named], before: int, total: int, runtime: Runtime) -> list[Compared]:
    logger, results = get_run_logger(), []
    began = time.monotonic()
    if runtime.fan_out == "local" and len(cell) > 1:
        with _named_failure(
            f"searches {before + 1} to {before + len(cell)} of {total}: {_named(*cell[0])}, ..."
        ):
            store, execution = ArtifactStore(runtime.store), runtime.execution()
            mending(store, partial(advance_together, store, [search for search, _ in cell], execution))
    together = time.monotonic() - began
    for number, (search, allocator) in enumerate(cell, before + 1):
        which = f"search {number} of {total}: {_named(search, allocator)}"
        logger.info(which)
        began = time.monotonic()
        with _named_failure(which):
            # A store of its own, as each result tells what its search has built.
            store = ArtifactStore(runtime.store)
            result = run_search(store, search, runtime)
            losses = best_losses(store, result.stages["evaluate"])
        results.append(Compared(result, allocator, losses, time.monotonic() - began))
    trials = sum(len(each.result.selection.rows) for each in results)
    return [
        replace(each, seconds=each.seconds + together * len(each.result.selection.rows) / trials)
        for each in results
    ]


def with_common_reports(store: ArtifactStore, results: Sequence[Compared]) -> list[Compared]:
    """Make the reports of the searches by the first allocator again, with the best plans of the others beside theirs.

    Returns:
        All results, those with the places of their new reports.
    """
    common = []
    for _, cell in groupby(results, key=lambda each: (*each.cell, each.result.settings.seed)):
        first, *others = cell
        if others:
            compared: dict[str, Artifact] = {}
            for number, other in enumerate(others, 2):
                name = f"{other.allocator} ({number})" if other.allocator in compared else other.allocator
                compared[name] = _artifact_of(other)
            settings = first.result.settings
            page = report(store, _artifact_of(first), search_command(settings), compared=compared)
            first = replace(first, result=replace(first.result, report=store.location(page, PAGE_FILE)))
        common += [first, *others]
    return common


def _artifact_of(compared: Compared) -> Artifact:
    assert compared.result.artifact is not None, "a finished search is committed"
    return compared.result.artifact


@contextmanager
def _named_failure(which: str) -> Iterator[None]:
    """Who reads what went wrong has to know in which search."""
    try:
        yield
    except CancelledRun:  # by somebody who knows which
        raise
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise SearchFailed(f"{which}: {problem}") from error


def _named(search: Search, allocator: str) -> str:
    return f"sparsity {search.sparsity:g}, {search.pruner.method}, seed {search.seed}, {allocator}"
