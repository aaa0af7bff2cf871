"""What a search found, and what it took."""

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.selection import Selection


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and what it took.

    Attributes:
        pruned: where the exported checkpoint lies; None if none was asked for.
        stages: every artifact of the run by role.
        built: roles of the artifacts that this run, or others for it, had to build; the rest was in the store.
        bytes_read: bytes of weights that this process read.
        artifact: the search's own; None before it is committed.
        report: where the report's page lies; "" before there is one.
    """

    settings: Search
    source: str
    selection: Selection
    test: TestResult
    pruned: str | None
    stages: Mapping[str, Artifact]
    built: tuple[str, ...]
    bytes_read: int
    artifact: Artifact | None = None
    report: str = ""
