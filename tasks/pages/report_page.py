"""The HTML page of a report: its sentences, and its tables by layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from layerwise.scoring.criterion import KL
from layerwise.scoring.perplexity import DIVERGED, format_divergence
from layerwise.tasks.pages.page_template import perplexity_text, render
from layerwise.tasks.pages.report_data import ReportData
from layerwise.tasks.results.distillation import distillation_rows
from layerwise.tasks.results.measured_on import summary_of
from layerwise.tasks.results.report_tables import BEST, UNIFORM, Row, Rows, by_kind
from layerwise.tasks.results.roles import DENSE_LINEARS
from layerwise.tasks.results.selection import TRIAL
from layerwise.tasks.results.speed_table import speed_rows, speed_sentence
from layerwise.tasks.results.summary import sentence_on_stop, sentences_on_dense_linears


def report_page(data: ReportData, figures: Mapping[str, str]) -> str:
    """Render the page. Everything except the figures is escaped, because names of models and texts come from users.

    Args:
        figures: SVG by name, see ``layerwise.tasks.report.figures_of``.
    """
    tables = data.tables
    text = {
        "cost": cost_sentence(data),
        "more_costs": sentences_on_more_costs(data),
        "method": method_sentence(data),
        "test": gain_sentence(data),
        "curve": curve_sentence(tables["betas"], data.parameter),
        "linears": linears_sentence(by_kind(tables["linears"])),
        "dense": sentences_on_dense_linears(
            data.checkpoint.get(DENSE_LINEARS, ()), data.checkpoint.get("num_layers", 0)
        ),
        "failed": failed_sentence(tables["betas"]),
        "errors": errors_sentence(tables["errors"]),
        "recovery": data.recovery,
        "speed": "" if data.extras.speed is None else speed_sentence(data.extras.speed),
        "measured": {name: summary_of(each) for name, each in data.measured.items()},
    }
    return render(
        "report_page.html",
        data=data,
        text=text,
        models=tables["models"],
        betas=tables["betas"],
        stages=tables["stages"],
        artifacts=tables["artifacts"],
        texts=tables["texts"],
        mixed="share" in tables["texts"][0],
        exported=next((row["bytes"] for row in tables["artifacts"] if row["role"] == "export"), None),
        sparsities=_by_layer(tables["sparsities"], "plan", "sparsity"),
        errors=_by_layer(tables["errors"], "model", "relative_error"),
        linears=_by_layer(by_kind(tables["linears"]), "linear", "sparsity"),
        recovery=tables.get("recovery"),
        recovered_layers=_by_layer(tables.get("recovered_layers", []), "error", "value"),
        theory=data.theory,
        figures={name: Markup(svg) for name, svg in figures.items()},
        speeds=[] if data.extras.speed is None else speed_rows(data.extras.speed),
        distilled=[] if data.distillation is None else distillation_rows(data.distillation),
        by_kl=data.criterion == "kl",
        best=BEST,
        early=len({row["windows"] for row in tables["betas"]}) > 1,
    )


def cost_sentence(data: ReportData) -> str:
    """State what the pruning costs on text that no choice used: the headline of the page."""
    dense, uniform, best = data.tables["models"]
    cost = f"perplexity {perplexity_text(dense['test_perplexity'])} → "
    steps = [f"{100 * best['zeros'] / best['weights']:.3g} % removed"]
    if data.settings.get("recover"):
        steps.append(
            "the rest refitted" if data.settings["recover"]["method"] == "refit" else "the rest trained"
        )
    if data.distillation is None:
        cost += perplexity_text(best["test_perplexity"])
    else:
        steps.append("distilled")
        distilled = next(row.test for row in data.distillation.rows if row.model == "distilled")
        cost += f"{perplexity_text(distilled)} ({perplexity_text(best['test_perplexity'])} before the distillation)"
    return (
        f"{', '.join(steps)}: {cost} on unseen text; uniform {perplexity_text(uniform['test_perplexity'])}."
    )


def sentences_on_more_costs(data: ReportData) -> str:
    """State the cost by other measures: without recovery, in divergence and in accuracy, as far as measured."""
    _, uniform, best = data.tables["models"]
    sentences, before = [], "" if data.distillation is None else " before the distillation"
    for row in data.tables.get("recovery", ()):
        if row["model"] == "best, pruned":
            sentences.append(f"Without recovery, the chosen plan has perplexity {row['test text']}.")
    if "test_kl" in best:
        sentences.append(
            f"{KL} from the dense model: {format_divergence(best['test_kl'])} nats per token{before}; uniform "
            f"{format_divergence(uniform['test_kl'])}."
        )
    if data.extras.zero_shot and (average := data.extras.zero_shot[-1]).task == "average":
        cost = f"{100 * average.dense:.1f} % → "
        if average.distilled is None:
            cost += f"{100 * average.best:.1f} %{before}"
        else:
            cost += f"{100 * average.distilled:.1f} % ({100 * average.best:.1f} % before the distillation)"
        sentences.append(
            f"Average accuracy on the tasks below: {cost}; uniform {100 * average.uniform:.1f} %."
        )
    return " ".join(sentences)


def method_sentence(data: ReportData) -> str:
    """Describe the search: how the model was pruned, and how the plan was chosen and tested."""
    settings, tables = data.settings, data.tables
    best, betas, linears = tables["models"][-1], tables["betas"], tables["linears"]
    layers = len({row["layer"] for row in linears})
    windows = max(row["windows"] for row in betas)
    tested = next(row for row in tables["texts"] if row["text"] == "test")["windows"]
    pattern = f" in the pattern {settings['pattern']}" if settings.get("pattern") else ""
    by_kl = f"They were compared by the {KL} from the dense model. " if data.criterion == "kl" else ""
    plans = "1 plan was" if len(betas) == 1 else f"{len(betas)} plans were"
    return (
        f"{settings['pruner']['method']} removed {best['zeros']:,} of {best['weights']:,} weights{pattern} "
        f"({100 * best['zeros'] / best['weights']:.2f} %) from {len(linears)} linears in {layers} decoder layers of "
        f"{data.source}. The sparsity of each layer was set by {_allocation(data)}. {plans} scored on "
        f"{windows} windows of {settings['seqlen']} tokens of the selection text. {by_kl}The best plan was tested on "
        f"{'all' if tested is None else tested} windows of the test text, which had no part in the choice. "
        f"{data.counted} {sentence_on_stop(settings.get('stop_after'), len(betas))}"
    ).strip()


def _allocation(data: ReportData) -> str:
    method = data.settings["allocator"]["method"]
    return (
        f"{method} with the strategy {data.settings['strategy']}" if data.parameter == TRIAL else f"{method}"
    )


def linears_sentence(linears: Rows) -> str:
    """State the sparsity of every kind of linear; empty if all kinds have the same."""
    weights, zeros = Counter[str](), Counter[str]()
    for row in linears:
        weights[row["linear"]] += row["weights"]
        zeros[row["linear"]] += row["zeros"]
    shares = {kind: zeros[kind] / weights[kind] for kind in weights}
    if max(shares.values()) - min(shares.values()) < 0.005:
        return ""
    return "By kind: " + ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items()) + "."


def gain_sentence(data: ReportData) -> str:
    """State the gain of the best plan over the uniform one on the test text, and its significance."""
    _, uniform, best = data.tables["models"]
    if data.gain is None:
        return "The uniform plan is the best one, so there is no gain to test."
    t = "undefined" if data.gain["t"] is None else f"{data.gain['t']:.1f}"
    change = 100 * (best["test_perplexity"] / uniform["test_perplexity"] - 1)
    direction = "below" if change < 0 else "above"
    sentence = (
        f"On the test text, the best plan's perplexity is {abs(change):.1f} % {direction} that of the uniform plan "
        f"(paired t = {t}, {data.gain['windows']} windows)."
    )
    if data.kl_gain is None:
        return sentence
    t = "undefined" if data.kl_gain["t"] is None else f"{data.kl_gain['t']:.1f}"
    change = 100 * data.kl_gain["mean"] / uniform["test_kl"] if uniform["test_kl"] > 0 else 0.0
    direction = "below" if change < 0 else "above"
    return (
        f"{sentence} Its {KL} from the dense model is {abs(change):.1f} % {direction} that of the uniform plan (paired "
        f"t = {t})."
    )


def curve_sentence(betas: Sequence[Row], parameter: str) -> str:
    """State whether the curve has the U shape of the paper, and what to do if its minimum is at an end."""
    if parameter == TRIAL:
        return (
            "Trials are numbered in the order of the search. The strategy chose each one by the results before it, so "
            "the points do not form a curve."
        )
    curve = sorted((row for row in betas if not row["offset"]), key=lambda row: row["beta"])
    losses = [row["compared"] for row in curve]
    lowest = losses.index(min(losses))
    if len(curve) < 3:
        return f"{'One point does' if len(curve) == 1 else 'Two points do'} not show the shape of the curve."
    if lowest == len(curve) - 1:
        return (
            f"The curve still falls at the largest {parameter} that was tried, so the minimum may lie beyond it. "
            "Try larger values."
        )
    if lowest == 0:
        return f"No {parameter} above 0 is better than the uniform plan here."
    falls = all(left > right for left, right in zip(losses[:lowest], losses[1 : lowest + 1], strict=True))
    rises = all(left < right for left, right in zip(losses[lowest:-1], losses[lowest + 1 :], strict=True))
    if falls and rises:
        return (
            f"The curve has the U shape of the paper (arXiv:2502.14770): it falls to {curve[lowest]['plan']} and "
            "rises after it."
        )
    return f"The curve is not a clear U. Its minimum is at {curve[lowest]['plan']}."


def errors_sentence(errors: Rows) -> str:
    """Compare the errors of the best plan with those of the uniform one."""
    by_model = {
        model: {row["layer"]: row["relative_error"] for row in errors if row["model"] == model}
        for model in (UNIFORM, BEST)
    }
    uniform, best = by_model[UNIFORM], by_model[BEST]
    both = [layer for layer in uniform if None not in (uniform[layer], best.get(layer))]
    if not both:
        return "There is only one plan."
    below, last = sum(best[layer] < uniform[layer] for layer in both), both[-1]
    return (
        f"The best plan's error is below that of the uniform plan in {below} of {len(both)} layers. After the last "
        f"layer it is {best[last]:.3g}, and that of the uniform plan {uniform[last]:.3g}."
    )


def failed_sentence(betas: Sequence[Row]) -> str:
    """Name the plans that failed; empty if none did."""
    names = [row["plan"] for row in betas if row["failed"]]
    diverged = [row["plan"] for row in betas if row["loss"] >= DIVERGED]
    if not names:
        return ""
    how = f" ({', '.join(diverged)}: the loss is not finite)" if diverged else ""
    return f"Failed plans, marked by crosses: {', '.join(names)}{how}."


def _by_layer(rows: Rows, column: str, value: str) -> Mapping[str, Any]:
    """Arrange rows as a table: one line per layer, one column per plan, model or linear; None for missing values."""
    names = list(dict.fromkeys(row[column] for row in rows))
    values = {(row["layer"], row[column]): row[value] for row in rows}
    layers = sorted({row["layer"] for row in rows})
    return {
        "columns": names,
        "lines": [(layer, [values.get((layer, name)) for name in names]) for layer in layers],
    }
