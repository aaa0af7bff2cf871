"""Trials of a search, and the interface of the strategies that propose the next points to try."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerwise.scoring.perplexity import mean_loss, paired_difference

Point = tuple[float, ...]  # parameters of an allocator, or one sparsity per layer


@dataclass(frozen=True)
class Trial:
    """A point that was tried, and its losses.

    Attributes:
        point: parameters of an allocator, or one sparsity per layer.
        losses: losses of the first selection windows, in nats; fewer than in other trials if racing stopped it early.
    """

    point: Point
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.losses or not all(map(math.isfinite, self.losses)):
            raise ValueError(
                f"the trial of {self.point} has the losses {self.losses}; it needs at least one, all finite. Score it "
                "on a selection window, and replace a loss that is not finite by perplexity.DIVERGED."
            )

    @property
    def loss(self) -> float:
        """Return the mean loss over the trial's own windows, in nats.

        Use ``comparable_losses`` to compare trials with different numbers of windows.
        """
        return mean_loss(self.losses)


class Strategy(Protocol):
    """Search strategy. Proposals depend only on the trials so far, so a search is resumed by replaying its trials."""

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try; ``()`` when the search is finished.

        The points advance as lanes of one lane group, which reads the model once. A point is proposed at most once.

        Args:
            trials: trials of all points proposed so far, in the order of the proposals.
        """
        ...


def comparable_losses(trials: Sequence[Trial]) -> list[float]:
    """Return comparable losses of all trials, in nats, even if some were scored on fewer windows.

    Windows differ more than plans do, so the mean over the first windows does not estimate the mean over all windows.
    The difference to another trial on the same windows does. The reference is the best trial among those with the most
    windows: a trial with fewer windows gets the reference's loss plus its mean difference to the reference on the
    common windows. A trial with the most windows keeps its own mean.
    """
    if not trials:
        return []
    most = max(len(trial.losses) for trial in trials)
    reference = min((trial for trial in trials if len(trial.losses) == most), key=lambda trial: trial.loss)

    def comparable(trial: Trial) -> float:
        seen = len(trial.losses)
        if seen == most:
            return trial.loss
        return reference.loss + paired_difference(trial.losses, reference.losses[:seen]).mean

    return [comparable(trial) for trial in trials]


def losses_by_index(trials: Sequence[Trial], points: Sequence[Point]) -> dict[int, float]:
    """Return the comparable loss of every trial, by the index of its point in ``points``.

    Raises:
        ValueError: the point of a trial is not in ``points``.
    """
    index = {point: position for position, point in enumerate(points)}
    for trial in trials:
        if trial.point not in index:
            raise ValueError(
                f"the point {trial.point} was tried, but it is not among the {len(points)} candidates of this search. "
                "Replay only trials that were proposed with the same candidates."
            )
    losses = comparable_losses(trials)
    return {index[trial.point]: loss for trial, loss in zip(trials, losses, strict=True)}


def seed_of_proposal(seed: int, trials: Sequence[Trial]) -> int:
    """Return a 32-bit seed that depends only on the seed of a search and on its number of trials."""
    digest = hashlib.sha256(f"{seed}/{len(trials)}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
