"""ALPS: find the weights to keep by ADMM, then fit them to what the dense weight computes (arXiv:2406.07831)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.gram import require_full_float32
from layerwise.pruners.masks import lowest, removal_levels, removed_per_group, require_prunable

# Up to so many inputs the inverse for every level of rho is kept: four take 1.1 GB at 8192 inputs. Beyond (13 GB at
# 28672) each weight computes them again: about a quarter more time where inputs are three times the outputs.
KEPT_INPUTS = 8192
MOST_STEPS = 1000  # of every kind: a search with a typing error would not end


@dataclass(frozen=True, eq=False)
class AlpsInput:
    """What ``ALPS.prune`` has to know of the inputs of a linear, in units in which every input has mean square 1.

    An eigendecomposition, as in the paper, would give the inverse of ``hessian + rho`` for any ``rho``. For a few
    values Cholesky inverses take the same time at 1536 inputs, little memory, and half the products of an iteration.
    float32 is enough: ``rho`` bounds the condition number, and an inverse serves to find the support only. With
    float64 the supports were no better, at up to 1536 inputs, some of them with nearly parallel ones.
    """

    scale: Tensor  # (in_features,), float32: root mean square of every input
    hessian: Tensor  # (in_features, in_features), float32: diagonal 1 + damping
    inverses: tuple[Tensor, ...]  # of hessian + rho, by level; empty beyond KEPT_INPUTS


@dataclass(frozen=True)
class ALPS:
    """Compares all weights of a matrix, and corrects the ones that stay.

    ADMM alternates between the weights that the inputs ask for and the nearest ones with enough zeros; ``rho`` ties the
    two, and doubles from level to level. The paper lets it grow by up to 30 % every 3 iterations, at most 300 of them;
    on real layers the defaults came within 3 % of the error of 100 such iterations (1 % on other text).

    Attributes:
        damping: added to the Hessian, in units of every input's mean square. With five to fifteen tokens per input
            0.1 had 5 % less error on other text; from thirty on, anything from 2 % less to 8 % more.
        rho: of the first level, in the same units.
        levels: how many values ``rho`` takes.
        iterations: of ADMM, at each level.
        refit_steps: of conjugate gradients, for the weights that stay.
    """

    method: Literal["alps"] = "alps"
    damping: float = 0.01
    rho: float = 0.1
    levels: int = 4
    iterations: int = 4
    refit_steps: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"damping is {self.damping:g}; it is a fraction of the Hessian's diagonal, e.g. 0.01."
            )
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is {self.rho:g}; it must be positive and finite, e.g. 0.1.")
        for name, least in (("levels", 1), ("iterations", 1), ("refit_steps", 0)):
            if not least <= getattr(self, name) <= MOST_STEPS:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least {least}, and at most {MOST_STEPS}."
                )

    def prepare(self, gram: Tensor, tokens: int) -> AlpsInput:
        """Scale the second moments, and invert them for every level of ``rho``.

        It depends on the inputs alone: one serves every sparsity of every linear that shares them. An input
        that was always zero is unrelated to all others.

        Memory: ``1 + levels`` times the size of ``gram`` up to ``KEPT_INPUTS`` inputs. Beyond, once, and twice more
        during ``prune``: 9.9 GB in all at 28672 inputs.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``, float32; left unchanged.
            tokens: how many tokens.

        Raises:
            ValueError: no token, inputs that are not finite, or a matrix that is no sum of ``x x^T`` (which wide
                inputs show in ``prune`` only).
        """
        diagonal = gram.diagonal().double()
        if tokens < 1 or not diagonal.isfinite().all():
            raise ValueError(
                f"ALPS needs second moments, but they come from {tokens} tokens and "
                f"{int((~diagonal.isfinite()).sum())} of {len(gram)} inputs are not finite. "
                "Pass at least one window, and compute in bfloat16 or float32. A linear whose weight the model uses "
                "without calling it (Mamba's dt_proj) gets none: leave it dense (--exclude with its name)."
            )
        inverse_norms = _reciprocal(diagonal.sqrt()).float()
        hessian = (gram.float() * inverse_norms).mul_(inverse_norms[:, None])
        hessian.diagonal().fill_(1 + self.damping)
        levels = range(self.levels if len(gram) <= KEPT_INPUTS else 0)
        inverses = tuple(self._inverse(hessian, level) for level in levels)
        return AlpsInput((diagonal / tokens).sqrt().float(), hessian, inverses)

    def prune(self, weight: Tensor, prepared: AlpsInput, count: int, group: int | None = None) -> Tensor:
        """The weight with ``count`` entries removed, and the others corrected for it.

        The error ``||W X - W' X||^2``, before rounding to the dtype of ``weight``, is never larger than that of
        removing the entries of least ``|w|`` times input norm and correcting the others by as many steps: on inputs
        that are hardly correlated ADMM may find worse ones, which are then not used.

        Weights of inputs that were always zero count as zeros, which go first; those that stay are left as they are.
        Memory beside the result: about eight copies of the weight in float32.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: of the linear's inputs, see ``prepare``.
            count: how many weights to remove, of the whole matrix; of equally important ones the first go first.
            group: M of an N:M pattern: of M consecutive inputs every row loses the same number; None for none.

        Returns:
            Same shape and dtype as ``weight``; computed in float32.

        Raises:
            ValueError: a count that is out of range or does not fit the pattern; shapes that do not fit; a weight
                that is not finite.
        """
        require_prunable(weight, len(prepared.scale), count)
        if group is not None:
            removed_per_group(count, weight.shape, group)  # refuses what does not fit the pattern
        require_full_float32()
        scaled = weight.detach().float() * prepared.scale
        removed = _smallest(scaled, count, group)
        change = refit(scaled.where(removed, 0).neg_(), prepared.hessian, removed, self.refit_steps)
        other, found = self._search(scaled, prepared, removed, count, group)
        found = refit(found.sub_(scaled), prepared.hessian, other, self.refit_steps)
        if self._error(found, prepared) < self._error(change, prepared):
            removed, change = other, found
        # Changes are added, so that what did not change keeps its very value.
        pruned = change.mul_(_reciprocal(prepared.scale)).add_(weight.detach())
        return pruned.masked_fill_(removed, 0).to(weight.dtype)

    def _search(
        self, scaled: Tensor, prepared: AlpsInput, removed: Tensor, count: int, group: int | None
    ) -> tuple[Tensor, Tensor]:
        """ADMM: mask of what to remove, and the sparse weight; ``removed`` is the mask to start from."""
        products = scaled @ prepared.hessian
        sparse = scaled.masked_fill(removed, 0)
        dual = scaled - sparse  # in units of rho
        for level in range(self.levels):
            inverse = (
                prepared.inverses[level] if prepared.inverses else self._inverse(prepared.hessian, level)
            )
            if level:
                dual.div_(2)
            for _ in range(self.iterations):
                wanted = torch.add(products, sparse.sub_(dual), alpha=self._rho(level)) @ inverse
                dual.add_(wanted)
                removed = _smallest(dual, count, group)
                sparse = dual.masked_fill(removed, 0)
                dual.sub_(sparse)
            del inverse  # before the next one is computed
        return removed, sparse

    def _rho(self, level: int) -> float:
        return self.rho * 2**level

    def _inverse(self, hessian: Tensor, level: int) -> Tensor:
        shifted = hessian.clone()
        shifted.diagonal().add_(self._rho(level))
        factor, info = torch.linalg.cholesky_ex(shifted)
        del shifted
        if info:
            raise ValueError(
                f"the Hessian of {len(hessian)} inputs is not positive definite with damping {self.damping:g} and rho "
                f"{self._rho(level):g}: its Gram matrix is no sum of x x^T, or rounding outweighs both. Raise rho, "
                "e.g. tenfold, and look for inputs that are not finite."
            )
        return torch.cholesky_inverse(factor)

    def _error(self, change: Tensor, prepared: AlpsInput) -> float:
        """Mean squared change of the outputs, summed over the outputs; without damping."""
        damped = (change @ prepared.hessian).mul_(change).sum(dtype=torch.float64)
        return float(damped - self.damping * change.square().sum(dtype=torch.float64))


def refit(change: Tensor, hessian: Tensor, removed: Tensor, steps: int) -> Tensor:
    """Lower ``trace(change hessian change^T)`` by moving the entries that are not removed.

    Every row takes the same number of steps, with step lengths of its own: how ALPS refines the weights once it has
    found which to keep (arXiv:2406.07831). The quadratic form never rises from one step to the next, and is least
    after as many steps as a row has free entries. There is no preconditioner: a Hessian of unit diagonal is its own.

    Args:
        change: from the dense to the sparse weight, shape ``(out_features, in_features)``, float32; left unchanged.
        hessian: positive semidefinite, shape ``(in_features, in_features)``.
        removed: mask, shape of ``change``; what it marks stays as it is.
        steps: number of products with the Hessian, beside a first one.

    Returns:
        The new change, same shape.
    """
    change = change.clone()
    residual = (change @ hessian).neg_().masked_fill_(removed, 0)
    direction = residual.clone()
    squared_norm = residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        product = (direction @ hessian).masked_fill_(removed, 0)
        step = _quotient(squared_norm, (direction * product).sum(dim=1, keepdim=True))
        change.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        previous, squared_norm = squared_norm, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(_quotient(squared_norm, previous)).add_(residual)
    return change


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is not positive: such a row has nothing left to gain."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def _reciprocal(values: Tensor) -> Tensor:
    """Zero where the value is zero."""
    return torch.where(values > 0, 1 / values, 0)


def _smallest(values: Tensor, count: int, group: int | None) -> Tensor:
    """Mask of the ``count`` entries of least magnitude, of equal ones the first."""
    magnitudes = values.abs()
    if group is not None:
        return removal_levels(magnitudes, lambda rows: rows, [count], by_row=True, group=group) == 0
    return lowest(magnitudes, count)
