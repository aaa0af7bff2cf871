"""Show one artifact of a store, or the result of a search."""

import json

from rich.json import JSONHighlighter

from layerwise.display.byte_size import size
from layerwise.flows.cli.console import open_console
from layerwise.flows.cli.tables import show_recovery, show_selection, show_stop, show_test
from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
from layerwise.storage.existing_store import existing_store
from layerwise.tasks.results.distillation import DISTILL_STAGE, newest_distilled
from layerwise.tasks.results.evaluation import read_recovery, read_test
from layerwise.tasks.results.measured_on import MeasuredOn, summary_of
from layerwise.tasks.results.search_result import RESULT_FILE, RESULT_STAGE
from layerwise.tasks.results.selection import read_selection


def show_key(store_url: str, key: str | None) -> None:
    """Print the recipe, the facts and the files of an artifact; for a search, also its result.

    Args:
        key: key of the artifact or its beginning, as ``ls`` prints it; None for the newest search.

    Raises:
        FileNotFoundError: there is no store at ``store_url``.
        KeyError: no artifact has this key, or several keys begin with it.
    """
    store = existing_store(store_url)
    artifact = artifact_by_key(store, key)
    console = open_console()
    console.print(artifact.key, style="bold")
    known = {"recipe": artifact.recipe, "made": artifact.made, "facts": artifact.facts}
    console.print(JSONHighlighter()(_printable_json(known)), soft_wrap=True)
    for name, file in sorted(artifact.files.items()):
        console.print(f"  {size(file.size):>8}  {store.location(artifact, name)}", soft_wrap=True)
    if artifact.recipe.get("name") == RESULT_STAGE:
        document = json.loads(store.read(artifact, RESULT_FILE))
        stages = document["stages"]
        console.print()
        title = f"{document['source']} at sparsity {document['settings']['sparsity']:g}"
        selection = read_selection(store, store.get(stages["select"]))
        show_selection(console, title, selection)
        tested = store.get(stages["evaluate"])
        show_test(console, read_test(store, tested))
        if (recovery := read_recovery(store, tested)) is not None:
            show_recovery(console, recovery, document["recovery"]["text"])
        if "experts" in document:
            console.print(document["experts"]["text"], soft_wrap=True)
        show_stop(console, document["settings"].get("stop_after"), selection)
        for text, what in document.get("measured on", {}).items():  # missing in old results
            console.print(f"  {text}: {summary_of(MeasuredOn(**what))}", style="dim", soft_wrap=True)
        if "export" in stages:
            exported = store.location(store.get(stages["export"]))
            console.print()
            console.print(f"Pruned model: {exported}", soft_wrap=True)
        if (distilled := newest_distilled(store.artifacts(f"{DISTILL_STAGE}/"), tested)) is not None:
            console.print(f"Distilled model: {store.location(distilled)}", soft_wrap=True)


def _printable_json(document: object) -> str:
    """Format ``document`` as JSON with characters escaped that are not printable."""
    lines = json.dumps(document, ensure_ascii=False, indent=2).split("\n")
    return "\n".join(
        "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in line) for line in lines
    )
