"""The findings on the theorems of ATP as text and rows, for a page of their own and for a search's report."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from layerwise.scoring.perplexity import format_perplexity
from layerwise.scoring.theorem_checks import Findings, Outcome
from layerwise.scoring.theorem_plans import ASCENDING, UNIFORM
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.theory_findings import Rows, findings_of, read_tables, verdicts

SUBJECTS = {
    "3.1": "the error that a layer adds grows with its sparsity",
    "3.2": "layers propagate the error that arrives",
    "3.5": "the ascending order has the smallest error",
}
CLAIMS = {
    "3.1": "Claim: with the same input, a layer adds a larger error if more of it is pruned. The proof needs an inner "
    "product to be positive. That is certain only for a single matrix with nested masks and uncorrelated inputs. For "
    "pruners that correct weights, and for a decoder layer with its residual stream, norms and attention, it has to be "
    "measured. The measurement uses the hidden states of the dense model, so other layers do not contribute to the "
    "error.",
    "3.2": "Claim: E of layer i+1 is larger than s² times E of layer i, where s is the smallest singular value of "
    "layer i+1 as a single pruned matrix. Errors are therefore propagated. The proof omits the inner product of the "
    "error that the layer adds and the propagated error. For a matrix with more columns than rows, such as the last "
    "one of an MLP, s is 0 and the bound is trivial. Two things are measured instead: whether the error after a layer "
    "is larger than the propagated error, and the factor by which the layer changes the arriving error. No error "
    "arrives at the first layer.",
    "3.5": "Claim: the sum of the errors of all layers is smallest if the sparsities ascend. The claim is about the "
    "order of given sparsities. It says neither which sparsities to use, nor that they should be evenly spaced. The "
    "proof assumes E of layer i+1 = c · E of layer i + f(s), with c above 1 and the same f for every layer; for the "
    "order alone, any positive c is enough. Real layers differ: f is not the same for all of them, and where the "
    "signal is large, the error is large too, in every order.",
}


@dataclass(frozen=True)
class TheorySection:
    """The measurements, and the content of the template ``theory_sections.html``.

    Attributes:
        key: key of the artifact of ``layerwise.tasks.theory.measure_theory``.
        layers: one row for each plan and layer.
        plans: one row for each plan.
    """

    key: str
    layers: Rows
    plans: Rows

    subjects = SUBJECTS
    claims = CLAIMS

    @cached_property
    def found(self) -> Findings:
        """Findings on the theorems."""
        return findings_of(self.layers, self.plans)

    @property
    def verdicts(self) -> Mapping[str, bool]:
        """Verdict on each theorem: True if it held everywhere."""
        return verdicts(self.found)

    @property
    def headlines(self) -> Mapping[str, str]:
        """The main finding on each theorem, in a few words."""
        return headlines(self.found)

    @property
    def sentences(self) -> Mapping[str, str]:
        """The findings on each theorem, with numbers."""
        return sentences(self.found)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Outcomes of all orders, the ascending one first, followed by that of the uniform plan."""
        return (*self.found.orders.outcomes, self.found.uniform)

    @property
    def method(self) -> str:
        """Description of the measurement."""
        uniform = sum(plan["order"] == UNIFORM for plan in self.plans)
        orders = len(self.plans) - uniform
        beta = max(plan["beta"] for plan in self.plans)
        depth, windows = len({row["layer"] for row in self.layers}), len(self.plans[0]["losses"])
        return (
            f"{uniform} uniform plans, and {orders} orders of the arithmetic progression with beta {beta:.4g}, were run "
            f"through all {depth} decoder layers together, on {windows} windows of the selection text. The error of "
            f"every layer was split into its parts on {self.layers[0]['windows']} of them. The test text was not used."
        )

    @property
    def own_errors(self) -> list[tuple[int, list[float]]]:
        """Errors that layers add in the uniform plans: one line per layer, one value per sparsity."""
        lines: dict[int, list[float]] = {}
        for row in self.layers:
            if row["order"] == UNIFORM:
                lines.setdefault(row["layer"], []).append(row["local"] / row["energy"])
        return sorted(lines.items())

    @property
    def size_note(self) -> str:
        """Effect of different layer sizes on the sparsities of the orders."""
        if len({row["weights"] for row in self.layers}) == 1:
            return (
                "All layers have the same number of weights, so all orders have exactly the same sparsities."
            )
        return (
            "Layers differ in their number of weights. The sparsities of each order are shifted by a common amount, so "
            "that all orders remove the same share of the model."
        )


def read_section(store: ArtifactStore, measured: Artifact) -> TheorySection:
    """Read the content of the section from an artifact of ``layerwise.tasks.theory.measure_theory``."""
    return TheorySection(measured.key, *read_tables(store, measured))


def headlines(found: Findings) -> dict[str, str]:
    """State the main finding on each theorem in a few words."""
    rise, propagation, orders = found.rise, found.propagation, found.orders
    held = rise.steps - len(rise.falls)
    return {
        "3.1": f"grows in {_of(held, rise.steps)} steps",
        "3.2": f"holds in {_of(propagation.exceeding, len(propagation.layers))} layers",
        "3.5": f"below {_of(orders.below('total'), len(orders.outcomes) - 1)} other orders",
    }


def sentences(found: Findings) -> dict[str, str]:
    """State the findings on each theorem, with numbers."""
    return {"3.1": _on_rise(found), "3.2": _on_propagation(found), "3.5": _on_orders(found)}


def ranges(layers: Iterable[int]) -> str:
    """Format layer numbers, e.g. "1 to 3, 7"."""
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
            f"Held: {between}, the error that a layer adds grows with every step in each of the {rise.layers} layers "
            f"({rise.steps} of {rise.steps} steps)."
        )
    where = ranges(sorted({layer for layer, _ in rise.falls}))
    return (
        f"Did not hold everywhere: {between}, the error that a layer adds grows in {rise.steps - len(rise.falls)} of "
        f"{rise.steps} steps. It falls in the layers {where}, by at most {100 * rise.largest_fall:.2g} %."
    )


def _on_propagation(found: Findings) -> str:
    measured = found.propagation
    count = len(measured.layers)
    verdict = "Held" if measured.holds else "Did not hold everywhere"
    omitted = f"{100 * measured.median('cross'):+.2g} %"
    return (
        f"{verdict}: at sparsity {found.target:g}, the error after a layer is larger than the propagated error in "
        f"{measured.exceeding} of {count} layers, and larger than the arriving error in {measured.growing}. The median "
        f"factor of the arriving error is {measured.median('factor'):.3g}; {_below(measured.shrinking)}. Relative to "
        f"the signal, the median factor is {measured.median('relative_factor'):.3g}; "
        f"{_below(measured.relatively_shrinking)}. The term that the proof omits is, in the median, {omitted} of the "
        "error after a layer."
    )


def _below(layers: tuple[int, ...]) -> str:
    if not layers:
        return "it is not below 1 in any layer"
    if len(layers) == 1:
        return f"it is below 1 in layer {layers[0]}"
    return f"it is below 1 in {len(layers)} layers ({ranges(layers)})"


def _on_orders(found: Findings) -> str:
    orders, ascending = found.orders, found.orders.outcomes[0]
    others = len(orders.outcomes) - 1
    verdict = "Held" if orders.holds else "Did not hold"
    least = min(orders.outcomes, key=lambda outcome: outcome.total)
    total = f"the total error of the ascending order is below that of {orders.below('total')} of {others} other orders"
    if least.order != ASCENDING:
        total += f"; the order {least.order} has the smallest, {100 * (1 - least.total / ascending.total):.2g} % lower"
    gain, t = orders.gain, ""
    if gain.t is not None:
        t = f", paired t = {gain.t:.1f}: {'' if gain.significant else 'not '}significant"
    return (
        f"{verdict}: {total}. The ascending order is below {orders.below('relative_total')} of them in the sum of the "
        f"errors relative to the layers' energies, and below {orders.below('last')} in the error after the last layer. "
        f"Its perplexity, {format_perplexity(ascending.perplexity)}, is below that of {orders.below('perplexity')} of them (best "
        f"other order: {orders.runner_up.order}, {format_perplexity(orders.runner_up.perplexity)}{t}; uniform plan: "
        f"{format_perplexity(found.uniform.perplexity)})."
    )
