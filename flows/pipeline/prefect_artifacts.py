"""Result of a search on Prefect's pages: a table, a report with figures, and the path of the pruned model."""

import base64
import shlex

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from layerwise.flows.pipeline.result import SearchResult, loading_class, work_sentence
from layerwise.scoring.criterion import KL
from layerwise.scoring.perplexity import format_divergence, format_perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.charts.drawing import figure_file
from layerwise.tasks.pages.markdown import code, fenced, plain
from layerwise.tasks.pages.model_card import recovery_section
from layerwise.tasks.results.summary import recovery_rows, sentence_on_stop, sentence_on_test, table_rows
from layerwise.tasks.running.progress import going_on_without_prefect

# Prefect's pages do not link to s3:// or to files, and take a path for one of their own: places are text to copy.
LOAD_HERE = """```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained({place!r})
```
"""
LOAD_FROM_AFAR = """```python
import fsspec
from transformers import {auto_class}

fs, folder = fsspec.url_to_fs({place!r})
fs.get(f"{{folder}}/", "pruned-model/", recursive=True)
model = {auto_class}.from_pretrained("pruned-model")
```
"""


NOT_WRITTEN = (
    "The search ran without `export`. Run it again with `export` to write the model; the rest is reused.\n"
)


def publish_to_prefect(store: ArtifactStore, result: SearchResult, page: Artifact) -> None:
    """Show a result on the page of the current flow run, if the server accepts it.

    Args:
        page: the report's artifact.
    """
    get_run_logger().info("%s. %s", result.selection.verdict, work_sentence(result))
    name = plain(result.settings.title)  # Prefect renders descriptions as Markdown
    title = f"{name}: {result.selection.verdict}"
    report = search_report(store, result, page)
    with going_on_without_prefect():
        create_table_artifact(table_rows(result.selection), key="search-result", description=title)
        create_markdown_artifact(report, key="search-report", description=title)
        create_markdown_artifact(
            where_the_report_is(result.report),
            key="report-page",
            description=f"{name}: the report's page",
        )
        if result.pruned is not None:
            create_markdown_artifact(
                how_to_load(result.pruned, loading_class(result)),
                key="pruned-model",
                description=f"{name}: the pruned model",
            )


def search_report(store: ArtifactStore, result: SearchResult, page: Artifact) -> str:
    """Format the result as one self-contained page of Markdown with two figures of the report.

    Args:
        page: the report's artifact.
    """
    settings, selection, test = result.settings, result.selection, result.test
    uniform, best = selection.rows[0], selection.best_row
    name = selection.name(selection.best)
    curve, profile = (store.read(page, figure_file(name)) for name in ("perplexity", "sparsity"))
    by_kl = _divergences(result)
    place = store.root if is_local(store.fs) else store.fs.unstrip_protocol(store.root)
    return f"""# {plain(settings.title)}, {settings.pruner.method}

**{selection.verdict}.**

{sentence_on_test(test)} {sentence_on_stop(settings.stop_after, len(selection.rows))}

| | {selection.parameter} | perplexity, selection text | perplexity, test text |
|:--|--:|--:|--:|
| dense | | {format_perplexity(selection.dense_perplexity)} | {format_perplexity(test.dense)} |
| uniform | 0 | {format_perplexity(uniform.perplexity)} | {format_perplexity(test.uniform)} |
| **best** | {name.removeprefix(f"{selection.parameter} ")} | {format_perplexity(best.perplexity)} | {format_perplexity(test.best)} |

{by_kl}{_recovery(result)}{_image(f"{KL if by_kl else 'Perplexity'} by beta", curve)}

A bar is the 95 % interval of a beta's paired difference to the best one. Hollow points are not significantly worse.

{_image("Sparsity by layer", profile)}

## The pruned model

{NOT_WRITTEN if result.pruned is None else how_to_load(result.pruned, loading_class(result))}
## The report

{where_the_report_is(result.report)}
## In the store

{work_sentence(result)} {code(shlex.join(["layerwise", "show", place]))} shows how it was made.

| | artifact | |
|:--|:--|:--|
{_stage_rows(result)}
"""


def _divergences(result: SearchResult) -> str:
    """Format the table of the divergences from the dense model; empty if the criterion is perplexity."""
    selection, test = result.selection, result.test.kl
    uniform, best = selection.rows[0].kl, selection.best_row.kl
    if uniform is None or best is None or test is None:
        return ""
    return f"""The plan was chosen by the {KL} from the dense model, in nats per token:

| | {KL}, selection text | {KL}, test text |
|:--|--:|--:|
| uniform | {format_divergence(uniform)} | {format_divergence(test.uniform)} |
| **best** | {format_divergence(best)} | {format_divergence(test.best)} |

"""


def _recovery(result: SearchResult) -> str:
    """Format the section on recovery; empty without recovery."""
    if result.recovery is None:
        return ""
    return recovery_section(result.recovery_text, recovery_rows(result.recovery))


def where_the_report_is(place: str) -> str:
    """Format the path of the report's page as text to copy."""
    return f"A single HTML page; a browser opens it without a network.\n\n{fenced(place)}\n"


def how_to_load(place: str, auto_class: str = "AutoModelForCausalLM") -> str:
    """Format the path of an exported model and the code that loads it, in blocks that a long name cannot break.

    Args:
        auto_class: class of transformers that loads the model.
    """
    load = LOAD_FROM_AFAR if "://" in place else LOAD_HERE  # transformers opens no URL
    return f"{fenced(place)}\n\n{load.format(place=place, auto_class=auto_class)}"


def _stage_rows(result: SearchResult) -> str:
    return "\n".join(
        f"| {role} | `{artifact.key}` | {'built now' if role in result.built else 'reused'} |"
        for role, artifact in result.stages.items()
    )


def _image(name: str, svg: bytes) -> str:
    return f"![{name}](data:image/svg+xml;base64,{base64.b64encode(svg).decode()})"
