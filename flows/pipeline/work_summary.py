"""What a run had to do for its result, in a sentence: the same on the terminal and on Prefect's pages."""

from layerwise.display.byte_size import size_in
from layerwise.flows.pipeline.result import SearchResult


def work_sentence(result: SearchResult) -> str:
    """What had to be done for this result."""
    if not result.built:
        return "Everything was in the store already: no layer was computed, no weight was read."
    computed = [role for role in result.built if role not in ("allocate", "select")]
    read = f", {size_in('GB', result.bytes_read, 2)} of weights read" if result.bytes_read else ""
    return f"Built {len(result.built)} of {len(result.stages)} artifacts ({', '.join(computed)}){read}."
