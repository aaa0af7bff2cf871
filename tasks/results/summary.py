"""Summary of a search for people, in rows and sentences: the same on the terminal, in Prefect and in the report."""

from layerwise.scoring.perplexity import format_perplexity, rounded_perplexity
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.selection import Selection


def table_rows(selection: Selection) -> list[dict[str, str | float]]:
    """Return the result table: one row per plan, with the paired difference to the best plan."""
    rows: list[dict[str, str | float]] = []
    stopped_early = len({row.windows for row in selection.rows}) > 1
    with_offsets = any(row.offset for row in selection.rows)
    allocator = "ATP" if selection.parameter == "beta" else selection.parameter.partition(" ")[0]
    for index, row in enumerate(selection.rows):
        difference = row.above_best
        windows = {"windows": row.windows} if stopped_early else {}
        offset = {"offset": row.offset} if with_offsets else {}
        rows.append(
            {
                selection.parameter.rpartition(" ")[2]: row.beta,
                **offset,
                "loss": round(row.loss, 4),
                "perplexity": rounded_perplexity(row.perplexity),
                "above best": "best" if difference is None else f"{difference.mean:+.4f}",
                "t": "" if difference is None or difference.t is None else f"{difference.t:.1f}",
                "realised sparsity": round(row.realised_sparsity, 5),
                **windows,
                "plan": "uniform" if index == 0 else allocator,
            }
        )
    return rows


def sentence_on_stop(stop_after: int | None, tried: int) -> str:
    """State that the search was stopped after ``stop_after`` plans; "" if it was not stopped."""
    if stop_after is None or tried < stop_after:
        return ""
    return f"The search was stopped after {tried} plan{'' if tried == 1 else 's'}; others may be better."


def sentence_on_test(test: TestResult) -> str:
    """State the test perplexities and how certain the gain is."""
    gain = ""
    if test.gain is not None:
        t = "" if test.gain.t is None else f", t = {test.gain.t:.1f}"
        change = 100 * (test.best / test.uniform - 1)
        gain = f" ({abs(change):.1f} % {'below' if change < 0 else 'above'} uniform{t})"
    return (
        f"On the test text, {test.windows} windows: dense {format_perplexity(test.dense)}, uniform {format_perplexity(test.uniform)}, "
        f"best {format_perplexity(test.best)}{gain}."
    )
