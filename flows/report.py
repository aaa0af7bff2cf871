"""Make the report of a finished search again, from the store alone: no model is read, no Prefect server asked."""

from pathlib import Path

from layerwise.flows.options import search_command
from layerwise.flows.pipeline.artifact_lookup import asked_artifact, finished_searches
from layerwise.flows.pipeline.report_extras import extras_of, is_theory_of
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.existing_store import existing_store
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.search_result import FinishedSearch, read_search


def make_report(
    store_url: str, key: str | None, output: Path | None = None, table: Artifact | None = None
) -> str:
    """Find the report of a search, or make it.

    Args:
        key: of the search, or its beginning; None for the newest one.
        output: a file of this machine to which the page is copied.
        table: the zero-shot table that it shows; the newest of the search if left out.

    Returns:
        Where the page lies.

    Raises:
        KeyError: no artifact has that key, or several begin with it; or the search's own artifacts are gone.
        ValueError: the artifact is not that of a search.
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the store cannot be reached, or ``output`` not be written.
    """
    store = existing_store(store_url)
    artifact = asked_artifact(store, key)
    search = read_search(store, artifact)
    command = search_command(Search.model_validate(search.settings))
    page = report.fn(store, artifact, command, extras_of(store, search, table))
    if output is None:
        return store.location(page, PAGE_FILE)
    output.write_bytes(store.read(page, PAGE_FILE))
    return str(output)


def make_report_with_theory(store: ArtifactStore, measured: Artifact) -> None:
    """Make the report of the newest search that the theorems were measured for again; without one, do nothing."""
    for artifact in finished_searches(store):
        search = _whole(store, artifact)
        if search is not None and is_theory_of(measured, search):
            make_report(store.url, artifact.key)
            return


def _whole(store: ArtifactStore, artifact: Artifact) -> FinishedSearch | None:
    """A search; None if some of its artifacts are gone, so that there is no report of it any more."""
    try:
        return read_search(store, artifact)
    except KeyError:
        return None
