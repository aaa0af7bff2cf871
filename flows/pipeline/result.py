"""What a search found, and what it took."""

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.tasks.evaluate import TestResult
from layerwise.tasks.select import Selection


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


def work_sentence(result: SearchResult) -> str:
    """Describe in one sentence the work that this run did for its result."""
    if not result.built:
        return "Everything was in the store already: no layer was computed, no weight was read."
    computed = [role for role in result.built if role not in ("allocate", "select")]
    read = f", {result.bytes_read / 1e9:.2f} GB of weights read" if result.bytes_read else ""
    return f"Built {len(result.built)} of {len(result.stages)} artifacts ({', '.join(computed)}){read}."
