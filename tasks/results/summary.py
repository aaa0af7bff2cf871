"""Summary of a search for people, in rows and sentences: the same on the terminal, in Prefect and in the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.scoring.criterion import KL
from layerwise.scoring.perplexity import format_divergence, format_perplexity, rounded_perplexity
from layerwise.storage.artifact import Artifact
from layerwise.tasks.results.calibration_mix import mix_rows, text_name
from layerwise.tasks.results.evaluation import RecoveryTest, TestResult
from layerwise.tasks.results.roles import LAYERS_ROLLED_BACK, RECOVERED_BEST
from layerwise.tasks.results.selection import Selection
from layerwise.tasks.texts.calibrate_on import CalibrateOn

NAMED_EXPERTS = 8  # in a sentence; result.json names all


def table_rows(selection: Selection) -> list[dict[str, str | float]]:
    """Return the result table: one row per plan, with the paired difference to the best plan in the criterion."""
    rows: list[dict[str, str | float]] = []
    stopped_early = len({row.windows for row in selection.rows}) > 1
    with_offsets = any(row.offset for row in selection.rows)
    allocator = "ATP" if selection.parameter == "beta" else selection.parameter.partition(" ")[0]
    for index, row in enumerate(selection.rows):
        difference = row.above_best
        windows = {"windows": row.windows} if stopped_early else {}
        offset = {"offset": row.offset} if with_offsets else {}
        kl = {} if row.kl is None else {KL: format_divergence(row.kl)}
        rows.append(
            {
                selection.parameter.rpartition(" ")[2]: row.beta,
                **offset,
                "loss": round(row.loss, 4),
                "perplexity": rounded_perplexity(row.perplexity),
                **kl,
                f"{KL} above best" if kl else "above best": "best"
                if difference is None
                else f"{difference.mean:+.4f}",
                "t": "" if difference is None or difference.t is None else f"{difference.t:.1f}",
                "realised sparsity": round(row.realised_sparsity, 5),
                **windows,
                "plan": "uniform" if index == 0 else allocator,
            }
        )
    return rows


def sentences_on_dense_linears(rows: Sequence[Mapping[str, Any]], num_layers: int) -> str:
    """Name the linears that stay dense by default, with the reason; empty if there are none.

    Args:
        rows: see ``prunable_linears.dense_rows``.
    """
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        count = len(row["layers"])
        where = "every layer" if count == num_layers else f"{count} of {num_layers} layers"
        by_reason.setdefault(str(row["reason"]), []).append(f"{row['linear']} ({where})")
    kinds = [f"{', '.join(linears)}: {reason}." for reason, linears in by_reason.items()]
    return " ".join(["These linears stay dense, and do not count in the sparsity:", *kinds]) if kinds else ""


def recovery_rows(recovery: RecoveryTest) -> list[dict[str, str | float]]:
    """Return the perplexities with and without recovery on two texts, one row per model; once if uniform is the best."""
    models = {
        "dense": recovery.dense,
        "uniform, pruned": recovery.uniform_before,
        "uniform, recovered": recovery.uniform,
    }
    if (recovery.best_before, recovery.best) != (recovery.uniform_before, recovery.uniform):
        models |= {"best, pruned": recovery.best_before, "best, recovered": recovery.best}
    return [
        {
            "model": model,
            "test text": rounded_perplexity(texts.test),
            "held-out calibration text": rounded_perplexity(texts.calibration),
        }
        for model, texts in models.items()
    ]


def sentences_on_recovery(
    method: str,
    recovery: RecoveryTest,
    stages: Mapping[str, Artifact],
    search_windows: int | None,
    calibrate_on: CalibrateOn = "all",
) -> str:
    """Describe the recovery of a search: what it was fitted on, and the layers that it left as they were.

    Args:
        stages: artifacts of the search, by role.
        search_windows: number of calibration windows that the plans were compared on; None for all.
        calibrate_on: tokens of the calibration windows that the recovery used.
    """
    calibration, test = stages["calibration"].facts, stages["test"].facts
    windows = int(str(calibration["windows"]))
    fitted = windows - recovery.held_out_windows
    tokens = fitted * int(str(calibration["seqlen"]))
    used = f"{fitted} windows ({tokens:,} tokens) of {text_name(calibration)}"
    if calibrate_on == "responses":
        used = f"the responses in {used}"
    layers = stages[RECOVERED_BEST].facts[LAYERS_ROLLED_BACK]
    assert isinstance(layers, list), "the layers are listed"
    rolled_back = ", ".join(map(str, layers)) if layers else "none"
    parts = [
        f"Recovery by {method}, fitted on {used}; "
        f"{recovery.held_out_windows} more are held out. Layers rolled back: {rolled_back}."
    ]
    on_some = search_windows is not None and search_windows < windows
    if on_some or method != "refit":
        where = f" on {search_windows} of the {windows} windows" if on_some else ""
        parts.append(f"The plans were compared after a refit{where}.")
    if calibrate_on == "responses":
        parts.append("The perplexities on held-out calibration text are those of the responses.")
    sources = [source["corpus"] for source in mix_rows(calibration)] or [calibration["corpus"]]
    if test["corpus"] in sources:
        parts.append(
            "The test text is from the same source as the calibration text; on other text the recovery may gain less."
        )
    return " ".join(parts)


def sentence_on_experts(rows: Sequence[Mapping[str, Any]]) -> str:
    """State the calibration tokens of the experts, and which of them got few; "" for other models.

    Args:
        rows: see ``statistics_table.expert_rows``.
    """
    if not rows:
        return ""
    counts = sorted(count for row in rows for count in row["tokens"])
    few = [f"{row['layer']}.{row['experts']}.{expert}" for row in rows for expert in row["pruned_by_all"]]
    text = (
        f"Calibration tokens of the {len(counts):,} experts in {len({row['layer'] for row in rows})} layers: from {counts[0]:,} "
        f"to {counts[-1]:,}, median {counts[len(counts) // 2]:,}."
    )
    if not few:
        return text
    more = "" if len(few) <= NAMED_EXPERTS else f" and {len(few) - NAMED_EXPERTS:,} more"
    return (
        f"{text} Too few for statistics of their own: {', '.join(few[:NAMED_EXPERTS])}{more}. These were pruned by the inputs "
        "of all experts of their layer."
    )


def sentence_on_stop(stop_after: int | None, tried: int) -> str:
    """State that the search was stopped after ``stop_after`` plans; "" if it was not stopped."""
    if stop_after is None or tried < stop_after:
        return ""
    return f"The search was stopped after {tried} plan{'' if tried == 1 else 's'}; others may be better."


def sentence_on_test(test: TestResult) -> str:
    """State the test perplexities, and the divergences if they were measured, and how certain the gain is."""
    gain = ""
    if test.gain is not None:
        t = "" if test.gain.t is None else f", t = {test.gain.t:.1f}"
        change = 100 * (test.best / test.uniform - 1)
        gain = f" ({abs(change):.1f} % {'below' if change < 0 else 'above'} uniform{t})"
    return (
        f"On the test text, {test.windows} windows: dense {format_perplexity(test.dense)}, uniform {format_perplexity(test.uniform)}, "
        f"best {format_perplexity(test.best)}{gain}.{_sentence_on_divergence(test)}{_sentence_on_responses(test)}"
    )


def _sentence_on_responses(test: TestResult) -> str:
    """State the perplexities of the responses alone; "" for plain text."""
    if test.responses is None:
        return ""
    dense, uniform, best = map(
        format_perplexity, (test.responses.dense, test.responses.uniform, test.responses.best)
    )
    return (
        f" Responses alone, {test.responses.tokens:,} tokens: dense {dense}, uniform {uniform}, best {best}."
    )


def _sentence_on_divergence(test: TestResult) -> str:
    """State the divergences from the dense model; "" if they were not measured."""
    if test.kl is None:
        return ""
    gain = ""
    if test.kl.gain is not None:
        t = "" if test.kl.gain.t is None else f", t = {test.kl.gain.t:.1f}"
        change = 100 * test.kl.gain.mean / test.kl.uniform if test.kl.uniform > 0 else 0.0
        gain = f" ({abs(change):.1f} % {'below' if change < 0 else 'above'} uniform{t})"
    uniform, best = format_divergence(test.kl.uniform), format_divergence(test.kl.best)
    return f" {KL} from the dense model, in nats: uniform {uniform}, best {best}{gain}."
