"""What a report may show beside the search itself: measured elsewhere, each left out where it is missing."""

from dataclasses import dataclass

from layerwise.sparse.speed import SpeedTable


@dataclass(frozen=True)
class ZeroShotRow:
    """Accuracies on one zero-shot task, as fractions.

    Attributes:
        stderr: standard error of the best plan's accuracy.
        difference: accuracy of the best plan minus that of the uniform one, on the same questions.
        p: McNemar's, of that difference; None where the two never differ.
    """

    task: str
    dense: float
    uniform: float
    best: float
    stderr: float
    difference: float
    p: float | None


@dataclass(frozen=True)
class Sizes:
    """Bytes of all files of a checkpoint; None where there is none."""

    dense: int
    exported: int | None = None  # pruned, zeros stored as zeros
    compressed: int | None = None  # pruned, zeros left out


@dataclass(frozen=True)
class Extras:
    """All of it.

    Attributes:
        theory: key of the artifact of ``layerwise.tasks.theory.measure_theory``.
    """

    zero_shot: tuple[ZeroShotRow, ...] = ()
    sizes: Sizes | None = None
    speed: SpeedTable | None = None
    theory: str = ""
