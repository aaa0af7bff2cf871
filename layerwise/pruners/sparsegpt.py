"""SparseGPT: remove weights column by column and let the columns to the right make up for it (arXiv:2301.00774)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.gram import require_full_float32
from layerwise.pruners.masks import lowest, removal_levels, removed_per_group, require_prunable

# Up to so many inputs the factor is computed in float64: every linear of an 8B model (14336), in 2.1 GB at most.
# Beyond (28672 in a 70B model) float32 halves 6.6 GB; on strongly correlated inputs its factor was off by 1e-3.
DOUBLE_INPUTS = 16384
# Rows of the triangular factor that are inverted at a time.
PANEL = 256
MOST_COLUMNS = 2**20  # more than any linear has


class NotPositiveDefinite(ValueError):
    """The Hessian of a linear's inputs has no Cholesky factor; the message says what to raise."""


@dataclass(frozen=True)
class SparseGPT:
    """Compares the weights of a block of columns, and corrects the ones that stay.

    Attributes:
        block_size: columns whose weights are compared, and whose corrections are gathered before they reach the
            columns behind them. With an N:M pattern it changes the speed only.
        damping: added to the Hessian's diagonal, as a fraction of its mean over the inputs that are ever
            active.
    """

    method: Literal["sparsegpt"] = "sparsegpt"
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MOST_COLUMNS:
            raise ValueError(
                f"block_size is {self.block_size}; it is a number of columns, from 1 to {MOST_COLUMNS}, e.g. 128."
            )
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"damping is {self.damping:g}; it is a fraction of the mean Hessian diagonal, e.g. 0.01."
            )

    def prepare(self, gram: Tensor, tokens: int) -> Tensor:
        """The upper triangular ``U`` with ``U^T U = (gram / tokens + damping)^-1``, for ``prune``.

        It depends on the inputs alone: one serves every sparsity of every linear that shares them. It is found
        without the inverse: if ``L`` is the Cholesky factor of the Hessian with its inputs in reverse order,
        ``U`` is ``L^-1`` in reverse order.

        An input that was always zero costs nothing to remove, so its ``U_kk`` is infinite; it has no bearing on
        the other inputs.

        Memory beside ``gram``: three times its size in float64, twice in float32.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``; left unchanged.
            tokens: how many tokens.

        Returns:
            float32, shape ``(in_features, in_features)``.

        Raises:
            NotPositiveDefinite: with little damping or none, some inputs follow from the others.
            ValueError: no token, or inputs that are not finite.
        """
        diagonal = gram.diagonal().double()
        in_features, dead = len(gram), diagonal == 0
        if tokens < 1 or not diagonal.isfinite().all():
            raise ValueError(
                f"SparseGPT needs second moments, but they come from {tokens} tokens and "
                f"{int((~diagonal.isfinite()).sum())} of {in_features} inputs are not finite. "
                "Pass at least one window, and compute in bfloat16 or float32. A linear whose weight the model uses "
                "without calling it (Mamba's dt_proj) gets none: leave it dense (--exclude with its name)."
            )
        require_full_float32()
        mean = diagonal.sum().item() / max(int((~dead).sum()), 1) or 1.0
        # In units of the mean, so that neither the damping nor the 1 of a dead input has a scale.
        dtype = torch.float64 if in_features <= DOUBLE_INPUTS else torch.float32
        hessian = gram.flip((0, 1)).to(dtype).div_(mean)
        hessian.diagonal().add_(self.damping)
        hessian.diagonal()[dead.flip(0)] = 1
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(hessian.mT, upper=True, out=(hessian.mT, info))
        factor = factor.mT
        if not info:
            _invert(factor)
        if info or self._is_noise(factor):
            raise NotPositiveDefinite(
                f"the Hessian of {in_features} inputs is not positive definite with damping {self.damping:g} after "
                f"{tokens} tokens: some inputs follow from the others. Raise the damping, e.g. to "
                f"{max(10 * self.damping, 0.01):g}, or calibrate on more windows."
            )
        prepared = factor.float()
        del hessian, factor
        prepared = prepared.flip((0, 1)).mul_(math.sqrt(tokens / mean))
        prepared.diagonal()[dead] = math.inf
        return prepared

    def _is_noise(self, inverse_factor: Tensor) -> bool:
        """Whether the Hessian's smallest eigenvalue may be no more than what rounding left in a float32 Gram matrix.

        A singular matrix often passes for a positive definite one by rounding, and would give corrections of any size.
        """
        resolution = len(inverse_factor) * torch.finfo(torch.float32).eps  # of a matrix with this trace
        # The squared norm of the factor is the trace of the inverse, and bounds its largest eigenvalue.
        return self.damping < resolution and float(inverse_factor.norm()) ** 2 * resolution >= 1

    def prune(self, weight: Tensor, prepared: Tensor, count: int, group: int | None = None) -> Tensor:
        """The weight with ``count`` entries removed, and the others corrected for it.

        Every block of columns loses its share of ``count``, so that after each of them the number removed is that
        share of the columns, rounded. Within a block those with the smallest ``w^2 / U_kk^2`` go, whatever their
        row, of equal ones the first columns' first. Weights of inputs that were always zero go before all others
        of their block; those that stay are left as they are, since a zero would be one weight too many.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: of the linear's inputs, see ``prepare``.
            count: how many weights to remove.
            group: M of an N:M pattern: of M consecutive inputs every row loses the same number; None for none.

        Returns:
            Same shape and dtype as ``weight``; computed in float32.

        Raises:
            ValueError: a count that is out of range or does not fit the pattern; shapes that do not fit; a weight
                that is not finite.
        """
        require_prunable(weight, len(prepared), count)
        in_group = 0 if group is None else removed_per_group(count, weight.shape, group)
        require_full_float32()
        # Transposed: the weights of one input are neighbours in memory.
        columns = torch.empty(weight.T.shape, dtype=torch.float32, device=weight.device)
        columns.copy_(weight.detach().T)
        for start, stop in self._blocks(len(columns), group):
            if group is None:
                in_group = _share(count, stop, len(columns)) - _share(count, start, len(columns))
            block = prepared[start:stop, start:stop]
            errors = _prune_block(columns[start:stop], block, in_group, group)
            columns[stop:].addmm_(prepared[start:stop, stop:].T, errors, alpha=-1)
        return torch.empty_like(weight).copy_(columns.T)

    def _blocks(self, in_features: int, group: int | None) -> Iterator[tuple[int, int]]:
        size = self.block_size if group is None else max(self.block_size // group, 1) * group
        for start in range(0, in_features, size):
            yield start, min(start + size, in_features)


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, a panel of rows after the other, at half the cost of a solve."""
    for start in range(0, len(lower), PANEL):
        rows = lower[start : start + PANEL]
        size = len(rows)
        corner = rows[:, start : start + size]
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        # What lies left of the corner L of these rows [A L] becomes -L^-1 A B, with B the inverse above.
        for first in range(0, start, PANEL):
            above = lower[first:start, first : first + PANEL]
            rows[:, first : first + PANEL] = rows[:, first:start] @ above
        rows[:, :start] = inverse @ rows[:, :start].neg_()
        corner.copy_(inverse)


def _share(count: int, columns: int, in_features: int) -> int:
    """What the first columns lose of ``count``, to the nearest whole number."""
    return (2 * count * columns + in_features) // (2 * in_features)


def _prune_block(block: Tensor, factor: Tensor, in_group: int, group: int | None) -> Tensor:
    """Prune one block of columns in place.

    Args:
        block: transposed, shape ``(columns, out_features)``.
        factor: the block's part of the prepared factor, shape ``(columns, columns)``.
        in_group: how many weights the block loses; with groups, how many each of a row's.

    Returns:
        By how much each weight was moved, over ``U_kk``: shape ``(columns, out_features)``, zero where it stays.
        What multiplies it with a row of the factor is the correction of the columns behind the block.
    """
    errors = torch.zeros_like(block)
    size = group or len(block)
    for first in range(0, len(block), size):
        chosen = slice(first, first + size)
        block[chosen].addmm_(factor[:first, chosen].T, errors[:first], alpha=-1)
        scores = block[chosen].abs() / factor.diagonal()[chosen, None]
        removed = lowest(scores, in_group) if group is None else _lowest_per_row(scores, in_group)
        for column, mask in enumerate(removed, first):
            values = block[column]
            values.addmv_(errors[first:column].T, factor[first:column, column], alpha=-1)
            errors[column] = values * mask / factor[column, column]
            values.masked_fill_(mask, 0)
    return errors


def _lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` lowest scores of every output; ``scores`` has shape ``(columns, out_features)``."""
    by_row = scores.T
    return removal_levels(by_row, lambda rows: rows, [count * len(by_row)], by_row=True).T == 0
