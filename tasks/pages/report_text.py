"""The sentences of a report: what was done, and what is to be seen in its figures."""

from collections import Counter
from collections.abc import Sequence

from layerwise.scoring.perplexity import DIVERGED
from layerwise.tasks.pages.report_data import ReportData
from layerwise.tasks.pages.report_tables import BEST, UNIFORM, Row, Rows
from layerwise.tasks.results.measured_on import MeasuredOn
from layerwise.tasks.results.selection import TRIAL
from layerwise.tasks.results.summary import sentence_on_stop


def what_was_done(data: ReportData) -> str:
    """The search in two sentences."""
    settings, tables = data.settings, data.tables
    best, betas, linears = tables["models"][-1], tables["betas"], tables["linears"]
    layers = len({row["layer"] for row in linears})
    windows = max(row["windows"] for row in betas)
    tested = next(row for row in tables["texts"] if row["text"] == "test")["windows"]
    pattern = f" in the pattern {settings['pattern']}" if settings.get("pattern") else ""
    plans = "1 plan was" if len(betas) == 1 else f"{len(betas)} plans were"
    return (
        f"{settings['pruner']['method']} removed {best['zeros']:,} of {best['weights']:,} weights{pattern} "
        f"({100 * best['zeros'] / best['weights']:.2f} %) from {len(linears)} linears in {layers} decoder layers of "
        f"{data.source}; how much from which layer is by {_allocation(data)}. {plans} scored on "
        f"{windows} windows of {settings['seqlen']} tokens of the selection text, and the best one was tested on "
        f"{'all' if tested is None else tested} windows of the test text, by which nothing was chosen. "
        f"{sentence_on_stop(settings.get('stop_after'), len(betas))}"
    ).strip()


def _allocation(data: ReportData) -> str:
    method = data.settings["allocator"]["method"]
    return (
        f"{method} and the strategy {data.settings['strategy']}" if data.parameter == TRIAL else f"{method}"
    )


def on_kinds(linears: Rows) -> str:
    """How much every kind of linear lost, if that is not the same for all; else nothing."""
    weights, zeros = Counter[str](), Counter[str]()
    for row in linears:
        weights[row["linear"]] += row["weights"]
        zeros[row["linear"]] += row["zeros"]
    shares = {kind: zeros[kind] / weights[kind] for kind in weights}
    if max(shares.values()) - min(shares.values()) < 0.005:
        return ""
    return "By kind: " + ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items()) + "."


def on_test(data: ReportData) -> str:
    """What the best plan gains over the uniform one on the test text, and how sure that is."""
    _, uniform, best = data.tables["models"]
    if data.gain is None:
        return "The uniform plan is the best one: there is no gain to test."
    t = "undefined" if data.gain["t"] is None else f"{data.gain['t']:.1f}"
    change = 100 * (best["test_perplexity"] / uniform["test_perplexity"] - 1)
    direction = "below" if change < 0 else "above"
    return (
        f"On the test text the best plan's perplexity is {abs(change):.1f} % {direction} uniform's (paired t = {t}, "
        f"{data.gain['windows']} windows)."
    )


def on_what(measured: MeasuredOn) -> str:
    """What perplexities were measured on, in one line."""
    first, end = measured.part_tokens
    part = "" if end - first == measured.text_tokens else f"tokens {first:,} to {end:,} of "
    bos = "BOS" if measured.text_starts_with_bos else "no BOS"
    return (
        f"{measured.corpus}: {measured.windows} windows of {measured.seqlen} tokens from {part}"
        f"{measured.text_tokens:,} ({bos} before the first), SHA-256 {measured.text_sha256[:12]}…; model in "
        f"{measured.dtype}, losses in {measured.loss_dtype}"
    )


def shape_of_curve(betas: Sequence[Row], parameter: str) -> str:
    """Whether the curve is the paper's U, and what to do if its lowest point is at an end."""
    if parameter == TRIAL:
        return (
            "Trials have numbers, in which a curve means nothing: the strategy chose each by those before it."
        )
    curve = sorted((row for row in betas if not row["offset"]), key=lambda row: row["beta"])
    losses = [row["loss"] for row in curve]
    lowest = losses.index(min(losses))
    if len(curve) < 3:
        return f"{'One point tells' if len(curve) == 1 else 'Two points tell'} no shape."
    if lowest == len(curve) - 1:
        return (
            f"The curve still falls at the largest {parameter} that was tried: the minimum may lie beyond it."
        )
    if lowest == 0:
        return f"No {parameter} above 0 is better than the uniform plan here."
    falls = all(left > right for left, right in zip(losses[:lowest], losses[1 : lowest + 1], strict=True))
    rises = all(left < right for left, right in zip(losses[lowest:-1], losses[lowest + 1 :], strict=True))
    if falls and rises:
        return (
            f"The curve is a U, as in the paper (arXiv:2502.14770): it falls down to {curve[lowest]['plan']}, and "
            "rises after it."
        )
    return f"The curve is no clean U; it is lowest at {curve[lowest]['plan']}."


def on_errors(errors: Rows) -> str:
    """Where the error of the best plan is below that of the uniform one."""
    by_model = {
        model: {row["layer"]: row["relative_error"] for row in errors if row["model"] == model}
        for model in (UNIFORM, BEST)
    }
    uniform, best = by_model[UNIFORM], by_model[BEST]
    both = [layer for layer in uniform if None not in (uniform[layer], best.get(layer))]
    if not both:
        return "There is one plan only."
    below, last = sum(best[layer] < uniform[layer] for layer in both), both[-1]
    return (
        f"The best plan's error is below uniform's in {below} of {len(both)} layers; after the last one it is "
        f"{best[last]:.3g}, uniform's {uniform[last]:.3g}."
    )


def failed(betas: Sequence[Row]) -> str:
    """Which plans failed, if any did."""
    names = [row["plan"] for row in betas if row["failed"]]
    diverged = [row["plan"] for row in betas if row["loss"] >= DIVERGED]
    if not names:
        return ""
    how = f" ({', '.join(diverged)}: no finite loss)" if diverged else ""
    return f"Failed, and marked by a cross: {', '.join(names)}{how}."
