"""What a page shows of the paper's theorems: on a page of its own, and as a section of a search's report."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from layerwise.scoring.theory import Findings, Outcome
from layerwise.scoring.theory_plans import UNIFORM
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.pages import theory_text
from layerwise.tasks.results.theory_findings import Rows, findings_of, read_tables, verdicts


@dataclass(frozen=True)
class TheorySection:
    """What was measured, and all that the template ``theory_sections.html`` says of it.

    Attributes:
        key: of the artifact of ``layerwise.tasks.theory.measure_theory``.
        layers: by plan and layer.
        plans: by plan.
    """

    key: str
    layers: Rows
    plans: Rows

    subjects = theory_text.SUBJECTS
    claims = theory_text.CLAIMS

    @cached_property
    def found(self) -> Findings:
        """What the tables say of the theorems."""
        return findings_of(self.layers, self.plans)

    @property
    def verdicts(self) -> Mapping[str, bool]:
        """By theorem, whether it held everywhere."""
        return verdicts(self.found)

    @property
    def short(self) -> Mapping[str, str]:
        """By theorem, what was found in some words."""
        return theory_text.short(self.found)

    @property
    def sentences(self) -> Mapping[str, str]:
        """By theorem, what was found, with its numbers."""
        return theory_text.sentences(self.found)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of every order, the ascending one first and the uniform plan last."""
        return (*self.found.orders.outcomes, self.found.uniform)

    @property
    def done(self) -> str:
        """What was measured, in two sentences."""
        uniform = sum(plan["order"] == UNIFORM for plan in self.plans)
        orders = len(self.plans) - uniform
        beta = max(plan["beta"] for plan in self.plans)
        depth, windows = len({row["layer"] for row in self.layers}), len(self.plans[0]["losses"])
        return (
            f"{uniform} uniform plans, and {orders} orders of the arithmetic progression with beta {beta:.4g}, went "
            f"through all {depth} decoder layers together, on {windows} windows of the selection text; every layer's "
            f"error was taken apart on {self.layers[0]['windows']} of them. The test text was not touched."
        )

    @property
    def own_errors(self) -> list[tuple[int, list[float]]]:
        """Of the uniform plans: one line per layer, one value per sparsity."""
        lines: dict[int, list[float]] = {}
        for row in self.layers:
            if row["order"] == UNIFORM:
                lines.setdefault(row["layer"], []).append(row["local"] / row["energy"])
        return sorted(lines.items())

    @property
    def shifted(self) -> str:
        """What layers of different sizes have to do with the orders."""
        if len({row["weights"] for row in self.layers}) == 1:
            return (
                "All layers have the same number of weights: the orders are of exactly the same sparsities."
            )
        return (
            "Layers differ in their number of weights: each order's sparsities are shifted by one common amount, so "
            "that all orders remove the same share of the model."
        )


def read_section(store: ArtifactStore, measured: Artifact) -> TheorySection:
    """What an artifact of ``layerwise.tasks.theory.measure_theory`` gives a page to show."""
    return TheorySection(measured.key, *read_tables(store, measured))
