"""Trials and strategies: how a search for the best parameters of an allocator goes on, given what has been tried."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerwise.scoring.perplexity import mean_loss, paired_difference

Point = tuple[float, ...]  # parameters of an allocator, or one sparsity per layer


@dataclass(frozen=True)
class Trial:
    """One point and how it scored.

    Attributes:
        losses: of the first selection windows, in nats; fewer than those of other trials if it was beaten early.
    """

    point: Point
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.losses or not all(map(math.isfinite, self.losses)):
            raise ValueError(
                f"the trial of {self.point} has the losses {self.losses}; at least one is needed, all finite. Score it "
                "on a selection window, and count a loss that is not finite as perplexity.DIVERGED."
            )

    @property
    def loss(self) -> float:
        """Mean over its own windows, in nats; see ``comparable_losses`` for trials of different windows."""
        return mean_loss(self.losses)


class Strategy(Protocol):
    """A deterministic function of the trials so far: a search that died is resumed by replaying its trials."""

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """The points that are tried next; ``()`` when the search is finished.

        They advance as lanes of one group, a read of the model serving them all. No point is proposed twice.

        Args:
            trials: one for every point that was proposed, in that order.
        """
        ...


def comparable_losses(trials: Sequence[Trial]) -> list[float]:
    """Losses of all trials on one scale, in nats, although some were scored on fewer windows.

    Windows differ more from each other than plans do, so a mean over the first few is no estimate of the mean over all.
    The difference to another trial on the same windows is: it is added to the loss of the best of those trials
    that have seen the most windows. Trials that have seen as many keep their own mean.
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
    """Comparable loss of every trial, by the index of its point among ``points``.

    Raises:
        ValueError: a trial of another point.
    """
    index = {point: position for position, point in enumerate(points)}
    for trial in trials:
        if trial.point not in index:
            raise ValueError(
                f"the point {trial.point} was tried, but it is none of the {len(points)} candidates of this search. "
                "Replay only trials that were proposed with the same candidates."
            )
    losses = comparable_losses(trials)
    return {index[trial.point]: loss for trial, loss in zip(trials, losses, strict=True)}


def seed_of_proposal(seed: int, trials: Sequence[Trial]) -> int:
    """32 random bits that depend only on the seed of a search and on how many trials it has made."""
    digest = hashlib.sha256(f"{seed}/{len(trials)}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
