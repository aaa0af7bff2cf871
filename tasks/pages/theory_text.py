"""The sentences on ATP's theorems: what each says and does not say, and what was found of it on a model."""

from collections.abc import Iterable

from layerwise.scoring.theory import Findings
from layerwise.scoring.theory_plans import ASCENDING
from layerwise.tasks.results.summary import number

SUBJECTS = {
    "3.1": "more sparsity, more error of the layer's own",
    "3.2": "the error that arrives is handed on",
    "3.5": "ascending is the order with the least error",
}
CLAIMS = {
    "3.1": "It says: pruned more, and with the same input, a layer has a larger error of its own. The proof needs an "
    "inner product to be positive, which is certain only for one matrix whose masks are nested and whose inputs do not "
    "correlate. For pruners that correct weights, and for a decoder layer with its residual stream, norms and "
    "attention, it has to be measured: here on the dense model's hidden states, so that no other layer has a part in "
    "it.",
    "3.2": "It says: E of layer i+1 is larger than s² times E of layer i, where s is the smallest singular value of "
    "layer i+1 as one pruned matrix; so errors are handed on. The proof leaves out the inner product of the layer's "
    "own error and the propagated one. Of a matrix with more columns than rows, as an MLP's last one, s is 0, and the "
    "bound promises nothing. So two things are measured: whether the error after a layer is larger than what the layer "
    "makes of the arriving one, and how much it makes of it. At the first layer no error arrives.",
    "3.5": "It says: the sum of all layers' errors is least if the sparsities ascend. It is about the order of the "
    "same numbers; neither which numbers they should be, nor that they should be evenly spaced, follows from it. The "
    "proof supposes E of layer i+1 = c · E of layer i + f(s), with c above 1 and the same f for every layer; for the "
    "order any c above 0 will do. In a real model layers differ: f is not the same for all, and where the signal is "
    "large the error is, too, whatever the order.",
}


def sentences(found: Findings) -> dict[str, str]:
    """What was found of each theorem, with its numbers."""
    return {"3.1": _on_rise(found), "3.2": _on_propagation(found), "3.5": _on_orders(found)}


def short(found: Findings) -> dict[str, str]:
    """The same in some words."""
    rise, propagation, orders = found.rise, found.propagation, found.orders
    held = rise.steps - len(rise.falls)
    return {
        "3.1": f"rises in {_of(held, rise.steps)} steps",
        "3.2": f"exceeds in {_of(propagation.exceeding, len(propagation.layers))} layers",
        "3.5": f"below {_of(orders.below('total'), len(orders.outcomes) - 1)} other orders",
    }


def ranges(layers: Iterable[int]) -> str:
    """Numbers for people: "1 to 3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(", ".join(map(str, run)) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in runs)


def _of(count: int, total: int) -> str:
    return f"all {total}" if count == total else f"{count} of {total}"


def _on_rise(found: Findings) -> str:
    rise, levels = found.rise, found.levels
    between = f"from sparsity {levels[0]:g} to {levels[-1]:g}"
    if rise.holds:
        return (
            f"Held: {between} the error of its own rises with every step in each of the {rise.layers} layers "
            f"({rise.steps} of {rise.steps} steps)."
        )
    where = ranges(sorted({layer for layer, _ in rise.falls}))
    return (
        f"Did not hold everywhere: {between} the error of its own rises in {rise.steps - len(rise.falls)} of "
        f"{rise.steps} steps; it falls in the layers {where}, by {100 * rise.largest_fall:.2g} % at most."
    )


def _on_propagation(found: Findings) -> str:
    measured = found.propagation
    count = len(measured.layers)
    verdict = "Held" if measured.holds else "Did not hold everywhere"
    left_out = f"{100 * measured.median('cross'):+.2g} %"
    return (
        f"{verdict}: at sparsity {found.target:g} the error after a layer is larger than what the layer makes of the "
        f"arriving one in {measured.exceeding} of {count} layers, and larger than the arriving one in "
        f"{measured.growing}. The factor of the arriving error is {measured.median('factor'):.3g} in the median; "
        f"{_below(measured.shrinking)}. Relative to the signal it is {measured.median('relative_factor'):.3g}; "
        f"{_below(measured.relatively_shrinking)}. What the proof leaves out is {left_out} "
        "of the error after a layer, in the median."
    )


def _below(layers: tuple[int, ...]) -> str:
    if not layers:
        return "it is below 1 in no layer"
    return f"it is below 1 in {len(layers)}, layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"


def _on_orders(found: Findings) -> str:
    orders, ascending = found.orders, found.orders.outcomes[0]
    others = len(orders.outcomes) - 1
    verdict = "Held" if orders.holds else "Did not hold"
    least = min(orders.outcomes, key=lambda outcome: outcome.total)
    total = (
        f"the ascending order's total error is below that of {orders.below('total')} of {others} other orders"
    )
    if least.order != ASCENDING:
        total += f"; the least is {least.order}'s, {100 * (1 - least.total / ascending.total):.2g} % below it"
    gain, t = orders.gain, ""
    if gain.t is not None:
        t = f", paired t = {gain.t:.1f}: {'' if gain.significant else 'not '}significant"
    return (
        f"{verdict}: {total}. With each layer's error over its energy the sum is below that of "
        f"{orders.below('relative_total')}, the error after the last layer below that of {orders.below('last')}, the "
        f"perplexity {number(ascending.perplexity)} below that of {orders.below('perplexity')} of them (the best of "
        f"these, {orders.runner_up.order}: {number(orders.runner_up.perplexity)}{t}; the uniform plan: "
        f"{number(found.uniform.perplexity)})."
    )
