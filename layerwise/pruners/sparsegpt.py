"""SparseGPT: remove weights column by column and correct the columns to the right (arXiv:2301.00774)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.gram import require_full_float32
from layerwise.pruners.masks import lowest, removal_levels, removed_per_group, require_prunable

# Maximum number of inputs for which the factor is computed in float64 (at most 2.1 GB); includes every linear of an 8B
# model (14336). With more inputs (28672 in a 70B model), float32 halves 6.6 GB; on strongly correlated inputs its error
# was 1e-3.
DOUBLE_INPUTS = 16384
# Rows of the triangular factor that are inverted at a time.
PANEL = 256
# Entries that are moved at a time when a matrix is reversed.
REVERSED_ENTRIES = 1 << 20
MOST_COLUMNS = 2**20  # limit of block_size; larger than the number of inputs of any linear


class NotPositiveDefinite(ValueError):
    """The Hessian of a linear's inputs has no Cholesky factor; the message gives a remedy."""


@dataclass(frozen=True)
class SparseGPT:
    """Compare the weights within a block of columns, and correct the remaining ones.

    Attributes:
        block_size: number of columns whose weights are compared. Corrections of later columns are applied once per
            block. With an N:M pattern, the block size affects speed only.
        damping: added to the Hessian's diagonal, as a fraction of its mean over the inputs that are not always zero.
    """

    method: Literal["sparsegpt"] = "sparsegpt"
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MOST_COLUMNS:
            raise ValueError(
                f"block_size is {self.block_size}; it must be from 1 to {MOST_COLUMNS}. Give a number of columns, e.g. "
                "128."
            )
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"damping is {self.damping:g}; it must be 0 or more and finite. Give a fraction of the mean Hessian "
                "diagonal, e.g. 0.01."
            )

    def prepare(self, gram: Tensor, tokens: int, overwrite: bool = False) -> Tensor:
        """Compute the upper triangular ``U`` with ``U^T U = (gram / tokens + damping)^-1``, for ``prune``.

        The result depends on the inputs alone and serves every sparsity of every linear that shares them. The inverse
        is not computed: if ``L`` is the Cholesky factor of the Hessian with its inputs in reverse order, ``U`` is
        ``L^-1`` in reverse order.

        Removing the weights of an input that was always zero costs nothing, so its ``U_kk`` is infinite. It does not
        affect the other inputs.

        Memory in addition to the result: twice its size if computed in float64, nothing in float32.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``.
            tokens: number of tokens.
            overwrite: store the result in the memory of ``gram``, which must be contiguous and in float32. Otherwise
                ``gram`` is left unchanged.

        Returns:
            ``U`` in float32, shape ``(in_features, in_features)``.

        Raises:
            NotPositiveDefinite: some inputs are linear combinations of others, and the damping is too small.
            ValueError: ``tokens`` is 0, or the inputs are not finite.
        """
        diagonal = gram.diagonal().double()
        in_features, dead = len(gram), diagonal == 0
        if tokens < 1 or not diagonal.isfinite().all():
            raise ValueError(
                f"SparseGPT needs second moments, but they come from {tokens} tokens and "
                f"{int((~diagonal.isfinite()).sum())} of {in_features} inputs are not finite. "
                "Pass at least one window, and compute in bfloat16 or float32. A linear that the model does not call "
                "(such as Mamba's dt_proj, whose weight is used without a call) receives no tokens; leave it dense "
                "(--exclude with its name)."
            )
        require_full_float32()
        mean = diagonal.sum().item() / max(int((~dead).sum()), 1) or 1.0
        dtype = torch.float64 if in_features <= DOUBLE_INPUTS else torch.float32
        prepared = gram.to(torch.float32, copy=not overwrite, memory_format=torch.contiguous_format)
        hessian = prepared.to(dtype)  # in float32, all steps are in the memory of the result
        _reverse(hessian)
        # Divided by the mean, so that the damping and the 1 of a dead input do not depend on the scale.
        hessian.div_(mean)
        hessian.diagonal().add_(self.damping)
        hessian.diagonal()[dead.flip(0)] = 1
        info = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(hessian.mT, upper=True, out=(hessian.mT, info))
        if not info:
            _invert(hessian)
        if info or self._is_noise(hessian):
            raise NotPositiveDefinite(
                f"the Hessian of {in_features} inputs is not positive definite with damping {self.damping:g} after "
                f"{tokens} tokens: some inputs are linear combinations of others. Raise the damping, e.g. to "
                f"{max(10 * self.damping, 0.01):g}, or calibrate on more windows."
            )
        if dtype == torch.float64:
            prepared.copy_(hessian)
        _reverse(prepared)
        prepared.mul_(math.sqrt(tokens / mean))
        prepared.diagonal()[dead] = math.inf
        return prepared

    def _is_noise(self, inverse_factor: Tensor) -> bool:
        """Return whether the Hessian's smallest eigenvalue may be a rounding error of a float32 Gram matrix.

        Because of rounding, a singular matrix can appear positive definite and give corrections of any size.
        """
        resolution = len(inverse_factor) * torch.finfo(torch.float32).eps  # for a matrix of this trace
        # The squared norm of the factor is the trace of the inverse, which bounds its largest eigenvalue.
        return self.damping < resolution and float(inverse_factor.norm()) ** 2 * resolution >= 1

    def prune(self, weight: Tensor, prepared: Tensor, count: int, group: int | None = None) -> Tensor:
        """Remove ``count`` entries of a weight and correct the others.

        Every block of columns loses its share of ``count``: after each block, the number removed is proportional to the
        number of columns, rounded. Within a block, the weights with the smallest ``w^2 / U_kk^2`` are removed,
        independently of their row; of equal weights those of the first columns. Weights of inputs that were always zero
        are removed before all others of their block. Those that remain keep their value, because setting them to zero
        would remove too many weights.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: result of ``prepare`` for the linear's inputs.
            count: number of weights to remove.
            group: M of an N:M pattern: every row loses the same number of M consecutive inputs. None without a pattern.

        Returns:
            Pruned weight, same shape and dtype as ``weight``; computed in float32.

        Raises:
            ValueError: the count is out of range or does not fit the pattern, the shapes do not match, or the weight is
                not finite.
        """
        require_prunable(weight, len(prepared), count)
        in_group = 0 if group is None else removed_per_group(count, weight.shape, group)
        require_full_float32()
        # Transposed, so that the weights of one input are adjacent in memory.
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


def _reverse(matrix: Tensor) -> None:
    """Reverse the order of the rows and of the columns of a contiguous matrix in place."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for start in range(0, half, REVERSED_ENTRIES):
        stop = min(start + REVERSED_ENTRIES, half)
        head, tail = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        moved = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(moved)


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, one panel of rows at a time, at half the cost of a solve."""
    for start in range(0, len(lower), PANEL):
        rows = lower[start : start + PANEL]
        size = len(rows)
        corner = rows[:, start : start + size]
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        # In these rows [A L], with corner L, A becomes -L^-1 A B, where B is the inverse of the rows above.
        for first in range(0, start, PANEL):
            above = lower[first:start, first : first + PANEL]
            rows[:, first : first + PANEL] = rows[:, first:start] @ above
        rows[:, :start] = inverse @ rows[:, :start].neg_()
        corner.copy_(inverse)


def _share(count: int, columns: int, in_features: int) -> int:
    """Return the share of the first ``columns`` columns in ``count``, rounded to the nearest integer."""
    return (2 * count * columns + in_features) // (2 * in_features)


def _prune_block(block: Tensor, factor: Tensor, in_group: int, group: int | None) -> Tensor:
    """Prune one block of columns in place.

    Args:
        block: transposed, shape ``(columns, out_features)``.
        factor: the block's part of the prepared factor, shape ``(columns, columns)``.
        in_group: number of weights to remove from the block; with ``group``, from each group of each row.
        group: M of an N:M pattern; None without a pattern.

    Returns:
        Removed values divided by ``U_kk``, shape ``(columns, out_features)``, zero for remaining weights. The product
        with the factor's rows gives the correction of the columns after the block.
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
    """Mark the ``count`` lowest scores of every output; ``scores`` has the shape ``(columns, out_features)``."""
    by_row = scores.T
    return removal_levels(by_row, lambda rows: rows, [count * len(by_row)], by_row=True).T == 0
