"""Summary of a search for people, in rows and sentences: the same on the terminal, in Prefect and in the report."""

from layerwise.scoring.perplexity import DIVERGED
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
                "perplexity": "diverged" if row.loss >= DIVERGED else round(row.perplexity, 2),
                "above best": "best" if difference is None else f"{difference.mean:+.4f}",
                "t": "" if difference is None or difference.t is None else f"{difference.t:.1f}",
                "realised sparsity": round(row.realised_sparsity, 5),
                **windows,
                "plan": "uniform" if index == 0 else allocator,
            }
        )
    return rows


def number(perplexity: float) -> str:
    """Format a perplexity; that of a lane that diverged may have 300 digits before the point."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"


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
        f"On the test text, {test.windows} windows: dense {number(test.dense)}, uniform {number(test.uniform)}, "
        f"best {number(test.best)}{gain}."
    )
