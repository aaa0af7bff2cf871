"""What a report may show beside the search itself: measured elsewhere, each left out where it is missing."""

from dataclasses import dataclass


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
class SpeedRow:
    """How fast one way of running the model is.

    Attributes:
        prefill, decode: tokens per second.
        weight_bytes: of the weights in memory.
        ratio: of the time per decoded token, the dense model's to this one's; above 1 is faster.
    """

    name: str
    prefill: float
    decode: float
    weight_bytes: int
    ratio: float


@dataclass(frozen=True)
class TheoryFigure:
    """Something the theory predicts, beside what was measured.

    Attributes:
        note: what is to be seen, in a sentence.
        lines: points by the name of their line.
    """

    title: str
    x: str
    y: str
    note: str
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


@dataclass(frozen=True)
class Extras:
    """All of it."""

    zero_shot: tuple[ZeroShotRow, ...] = ()
    sizes: Sizes | None = None
    speed: tuple[SpeedRow, ...] = ()
    theory: tuple[TheoryFigure, ...] = ()
