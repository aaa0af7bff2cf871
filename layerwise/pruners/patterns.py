"""N:M patterns: N weights remain out of M consecutive inputs of every output."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.sparsity_plan import SparsityPlan

PATTERN = re.compile(r"^([1-9][0-9]?|N):([1-9][0-9]?)$")
TOLERANCE = 1e-4  # allowed error of the overall sparsity, which multiples of 1 / M may not meet exactly


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern.

    Attributes:
        kept: N; None if every layer (or linear) has its own N.
        group: M.
    """

    kept: int | None
    group: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parse "2:4", or "N:8" for a separate N of every layer.

        Raises:
            ValueError: ``text`` has another format, or N is not below M.
        """
        match = PATTERN.match(text)
        kept, group = (
            (None, 0) if match is None else (None if match[1] == "N" else int(match[1]), int(match[2]))
        )
        if match is None or group < 2 or (kept is not None and kept >= group):
            raise ValueError(
                f"{text!r} is not an N:M pattern with N below M (N of M consecutive weights remain). Give e.g. 2:4 or "
                "4:8, or N:8 for a separate N of every layer."
            )
        return cls(kept, group)


def removed_on_levels(
    plan: SparsityPlan, group: int, linear_sizes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Count the weights to remove from every linear for a plan whose sparsities are multiples of ``1 / group``.

    Args:
        plan: a plan with sparsities from ``on_levels``.
        group: M.
        linear_sizes: number of weights of every linear, by layer.
    """
    return tuple(
        tuple(round(share * group) * (size // group) for share, size in zip(shares, sizes, strict=True))
        for shares, sizes in zip(plan.by_linear(linear_sizes), linear_sizes, strict=True)
    )


def on_levels(
    sparsities: Sequence[float], sizes: Sequence[int], target: float, group: int
) -> tuple[float, ...]:
    """Round every sparsity to a multiple of ``1 / group``, so that their weighted mean is ``target``.

    All sparsities are rounded down. Those with the largest remainders are then rounded up until the target is met;
    of equal remainders the first.

    Args:
        sparsities: sparsity of every entry (a layer or a linear); their weighted mean is ``target``.
        sizes: number of weights of every entry.
        target: overall sparsity.
        group: M.

    Raises:
        ValueError: the rounded sparsities miss the target by more than 1e-4.
    """
    levels = [math.floor(sparsity * group + 1e-9) for sparsity in sparsities]
    left = target * sum(sizes) - sum(level * size for level, size in zip(levels, sizes, strict=True)) / group
    by_loss = sorted(range(len(levels)), key=lambda index: (levels[index] - sparsities[index] * group, index))
    for index in by_loss:
        if levels[index] < group and sizes[index] / group <= left + TOLERANCE * sum(sizes):
            levels[index] += 1
            left -= sizes[index] / group
    rounded = tuple(level / group for level in levels)
    mean = weighted_mean(rounded, sizes)
    if abs(mean - target) > TOLERANCE:
        raise ValueError(
            f"multiples of 1/{group} give {len(sizes)} layers an overall sparsity of {mean:.5f}, not {target:g}. "
            f"Set the overall sparsity to {mean:.5f}."
        )
    return rounded
