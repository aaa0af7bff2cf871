"""N:M patterns: of M consecutive inputs of every output, N weights stay."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.sparsity_plan import SparsityPlan

PATTERN = re.compile(r"^([1-9][0-9]?|N):([1-9][0-9]?)$")
TOLERANCE = 1e-4  # of the overall sparsity, where levels of 1 / M cannot meet it exactly


@dataclass(frozen=True)
class Pattern:
    """N of M.

    Attributes:
        kept: N; None where every layer (or linear) has one of its own.
        group: M.
    """

    kept: int | None
    group: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """From "2:4", or "N:8" for a N of every layer's own.

        Raises:
            ValueError: another text, or a N that is not below M.
        """
        match = PATTERN.match(text)
        kept, group = (
            (None, 0) if match is None else (None if match[1] == "N" else int(match[1]), int(match[2]))
        )
        if match is None or group < 2 or (kept is not None and kept >= group):
            raise ValueError(
                f"{text!r} is no N:M pattern: N of M consecutive weights stay. Give e.g. 2:4 or 4:8, or N:8 to let "
                "every layer have a N of its own."
            )
        return cls(kept, group)


def removed_on_levels(
    plan: SparsityPlan, group: int, linear_sizes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """How many weights of every linear are removed by a plan whose sparsities are multiples of ``1 / group``.

    Args:
        plan: see ``on_levels``.
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
    """Every sparsity rounded to a multiple of ``1 / group``, so that their weighted mean is ``target``.

    All are rounded down; then those that lost most to that are rounded up, as far as the budget goes, the earlier of
    equal ones first.

    Args:
        sparsities: of the entries, layers or linears; their weighted mean is ``target``.
        sizes: number of weights of every entry.
        group: M.

    Raises:
        ValueError: no such levels come within 1e-4 of the target.
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
            f"levels of 1/{group} give {len(sizes)} layers an overall sparsity of {mean:.5f}, not of {target:g}. "
            f"Ask for {mean:.5f}."
        )
    return rounded
