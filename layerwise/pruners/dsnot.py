"""DSnoT: improve a mask by growing and pruning weights until the expected output matches (Zhang et al., arXiv:2310.08915).

Dynamic sparse no training. The values of the remaining weights do not change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.models.nan_check import is_finite
from layerwise.pruners.masks import removal_levels, require_prunable
from layerwise.pruners.sparsegpt import SparseGPT

# The official threshold is for the sum of the outputs over a window of this number of tokens.
WINDOW = 2048
MOST_CYCLES = 1000  # guards against a mistyped number that would make a run endless
# Weights in the rows that are refined at a time, which limits the temporary memory.
REFINED_ENTRIES = 1 << 20


@dataclass(frozen=True)
class DSnoTInput:
    """Statistics of the inputs of a linear that ``DSnoT`` uses; tensors of shape ``(in_features,)``, float32.

    Attributes:
        importance: factor of absolute weights that gives the scores of the first mask.
        norms: norm over all tokens, as for Wanda.
        mean: mean over all tokens.
        variance: variance over all tokens.
    """

    importance: Tensor
    norms: Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class DSnoT:
    """Refine the mask of another pruner (see ``refine``).

    Attributes:
        initial: pruner of the first mask. wanda: by absolute weight times input norm. sparsegpt: by SparseGPT's score of the
            dense weights, without its correction, as published. Both compare weights within an output row.
        cycles: maximum number of weights that each row grows, and prunes.
        threshold: a row is finished once the expected change of its output, summed over 2048 tokens, is at most this.
    """

    method: Literal["dsnot"] = "dsnot"
    initial: Literal["wanda", "sparsegpt"] = "wanda"
    cycles: int = 50
    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.cycles <= MOST_CYCLES:
            raise ValueError(
                f"cycles is {self.cycles}; it must be from 0 (the first mask) to {MOST_CYCLES}. Give a number of weights per "
                "row, e.g. 50."
            )
        if not 0 <= self.threshold < math.inf:
            raise ValueError(
                f"threshold is {self.threshold:g}; it must be 0 or more and finite. Give a sum of outputs over {WINDOW} "
                "tokens, e.g. 0.1."
            )

    def prepare(
        self, gram: Tensor, tokens: int, overwrite: bool = False, sums: Tensor | None = None
    ) -> DSnoTInput:
        """Compute means, variances and norms of the inputs, and the scores' factors of the first mask.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``.
            tokens: number of tokens.
            overwrite: allow the memory of ``gram`` to be used.
            sums: sum of ``x`` over the tokens, shape ``(in_features,)``.

        Raises:
            ValueError: there are no tokens or no sums, the inputs are not finite, or ``SparseGPT`` cannot use them.
        """
        if tokens < 1 or sums is None or not is_finite(sums):
            raise ValueError(
                f"DSnoT needs the means of the inputs, but they come from {tokens} tokens, with "
                f"{'no' if sums is None else 'finite' if is_finite(sums) else 'infinite'} sums. Pass at least one window, and "
                "compute in bfloat16 or float32. A linear that the model does not call (such as Mamba's dt_proj) receives no "
                "tokens; leave it dense (--exclude with its name)."
            )
        squares = gram.diagonal().double()
        mean = sums.to(gram.device).double() / tokens
        norms = squares.sqrt().float()
        variance = (squares / tokens - mean.square()).clamp_(min=0).float()
        importance = norms
        if self.initial == "sparsegpt":
            importance = 1 / SparseGPT().prepare(gram, tokens, overwrite).diagonal()
        return DSnoTInput(importance, norms, mean.float(), variance)

    def prune(self, weight: Tensor, prepared: DSnoTInput, count: int, group: int | None = None) -> Tensor:
        """Return the weight with ``count`` entries set to zero.

        Every row loses the same number of weights, the first rows one more if ``count`` is not a multiple of the rows.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: result of ``prepare`` for the linear's inputs.
            count: number of weights to remove.
            group: M of an N:M pattern; None without a pattern.

        Raises:
            ValueError: the count is out of range or does not fit the pattern, the shapes do not match, or the weight is
                not finite.
        """
        require_prunable(weight, len(prepared.mean), count)

        def score(rows: Tensor) -> Tensor:
            return rows.abs().float() * prepared.importance

        counts: Sequence[int] = [count]
        mask = removal_levels(weight, score, counts, by_row=True, group=group) == 0
        step = max(1, REFINED_ENTRIES // max(weight.shape[1], 1))
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            mask[rows] = refine(
                weight[rows].detach().float(), mask[rows], prepared, self.cycles, self.threshold, group
            )
        return weight.masked_fill(mask, 0)


def refine(
    weight: Tensor,
    mask: Tensor,
    inputs: DSnoTInput,
    cycles: int,
    threshold: float,
    group: int | None = None,
) -> Tensor:
    """Exchange removed and remaining weights until the expected change of every output is small.

    The expected change of a row is the sum of ``weight * mean`` over its removed weights. A cycle grows the weight whose
    ``weight * mean / variance`` reduces it most, and prunes a remaining weight: of those whose ``weight * mean`` reduces it
    too, the one with the lowest Wanda score. A weight is exchanged once at most. With a pattern, the pruned weight is the
    one with the lowest first score in the grown weight's group, and the exchange is made only if the sign of the expected
    change stays what it was at first. A row is finished when it is within the threshold, or has no exchange.

    The official code differs in three details: it averages the variances within windows; without a pattern it takes any
    weight if none has the sign that reduces the change; its default leaves the MLP with the first mask.

    Args:
        weight: shape ``(rows, in_features)``, float32; left unchanged.
        mask: same shape, ``True`` means "remove"; left unchanged.
        inputs: statistics of the inputs.
        cycles: maximum number of exchanges in a row.
        threshold: largest allowed expected change, summed over ``WINDOW`` tokens.
        group: M of an N:M pattern; None without a pattern.

    Returns:
        New mask with the same number of marks in every row (and group) as ``mask``.
    """
    means = weight * inputs.mean
    changes = means.masked_fill(~mask, 0).sum(dim=1)
    first_signs, allowed = changes.sign(), threshold / WINDOW
    gains = torch.where(mask & (means != 0), means / inputs.variance, 0)  # infinite for a constant input
    scores = weight.abs() * inputs.norms
    most = min(cycles, weight.shape[1])
    # The candidates of each row, the best ones first: those for a positive and those for a negative change.
    grown = [gains.topk(most, dim=1).indices, gains.topk(most, dim=1, largest=False).indices]
    pruned = [
        scores.masked_fill(mask | (means * sign >= 0), math.inf).topk(most, dim=1, largest=False).indices
        for sign in (1, -1)
    ]
    left = (weight.abs() * inputs.importance).masked_fill_(mask, math.inf)  # used by a pattern only
    refined = mask.clone()
    rows = torch.arange(len(weight), device=weight.device)
    taken = torch.zeros(4, len(weight), dtype=torch.long, device=weight.device)  # of grown, then of pruned
    active = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(most):
        negative = changes < 0
        active &= changes.abs() > allowed
        if not active.any():
            break
        growing = _next(grown, taken[:2], negative, rows)
        active &= torch.where(negative, -gains[rows, growing], gains[rows, growing]) > 0
        if group is None:
            pruning = _next(pruned, taken[2:], negative, rows)
            reduces = torch.where(negative, means[rows, pruning] > 0, means[rows, pruning] < 0)
            active &= reduces & ~mask[rows, pruning]
        else:
            begins = growing // group * group
            members = begins[:, None] + torch.arange(group, device=weight.device)
            best = left.gather(1, members).min(dim=1)
            pruning = begins + best.indices
            after = changes + means[rows, pruning] - means[rows, growing]
            active &= best.values.isfinite() & (after.sign() == first_signs)
        some, grow, prune = rows[active], growing[active], pruning[active]
        refined[some, grow], refined[some, prune] = False, True
        left[some, prune] = math.inf
        changes[some] += means[some, prune] - means[some, grow]
        sign = negative[active].long()
        taken[sign, some] += 1
        taken[sign + 2, some] += 1
    return refined


def _next(candidates: Sequence[Tensor], taken: Tensor, negative: Tensor, rows: Tensor) -> Tensor:
    """Return the next candidate of every row for the sign of its change, shape ``(rows,)``.

    Args:
        candidates: those for positive and those for negative changes, shape ``(rows, number)`` each.
        taken: number of candidates used before, less than there are, shape ``(2, rows)``.
        negative: whether the change of a row is negative.
    """
    return torch.where(negative, candidates[1][rows, taken[1]], candidates[0][rows, taken[0]])
