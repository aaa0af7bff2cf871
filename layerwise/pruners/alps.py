"""ALPS: select the weights to keep by ADMM, then fit them to the dense outputs (arXiv:2406.07831)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.gram import require_full_float32
from layerwise.calibration.upper_triangle import fill_symmetric, upper_panels
from layerwise.pruners.conjugate_gradient import minimize
from layerwise.pruners.masks import lowest, removal_levels, removed_per_group, require_prunable

# Limit of every number of steps; guards against a mistyped number that would make a run endless.
MOST_STEPS = 1000


@dataclass(frozen=True, eq=False)
class AlpsInput:
    """Second moments of the inputs of a linear, prepared for ``ALPS.prune`` and scaled to mean square 1 per input.

    An eigendecomposition, as in the paper, gives the inverse of ``hessian + rho`` for any ``rho``. For a few values of
    ``rho``, Cholesky inverses take the same time at 1536 inputs, little memory, and half the products per iteration.
    float32 is sufficient: ``rho`` bounds the condition number, and the inverses only select the weights to keep. In
    float64 the selection was not better, in tests with up to 1536 inputs, including nearly parallel inputs.

    Inverses are symmetric, so half of each is kept. Completing it takes a small part of the time of one product.
    """

    scale: Tensor  # (in_features,), float32: root mean square of every input
    hessian: Tensor  # (in_features, in_features), float32: diagonal 1 + damping
    inverses: tuple[
        tuple[tuple[int, Tensor], ...], ...
    ]  # upper panels of the inverse of hessian + rho, by level


@dataclass(frozen=True)
class ALPS:
    """Compare all weights of a matrix, and correct the remaining ones.

    ADMM alternates between the weights that minimize the output error and the nearest weights with enough zeros.
    ``rho`` penalizes the difference of the two and doubles from level to level. In the paper it grows by up to 30 %
    every 3 iterations, for at most 300 iterations. On real layers, the error with the defaults was within 3 % of that
    of 100 such iterations (1 % on other text).

    Attributes:
        damping: added to the Hessian, in units of every input's mean square. With 5 to 15 tokens per input, 0.1 gave
            5 % less error on other text; with 30 or more, between 2 % less and 8 % more.
        rho: ``rho`` of the first level, in the same units.
        levels: number of values of ``rho``.
        iterations: number of ADMM iterations per level.
        refit_steps: number of conjugate-gradient steps for the remaining weights.
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
                f"damping is {self.damping:g}; it must be 0 or more and finite. Give a fraction of the Hessian's "
                "diagonal, e.g. 0.01."
            )
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is {self.rho:g}; it must be positive and finite, e.g. 0.1.")
        for name, least in (("levels", 1), ("iterations", 1), ("refit_steps", 0)):
            if not least <= getattr(self, name) <= MOST_STEPS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from {least} to {MOST_STEPS}.")

    def prepare(self, gram: Tensor, tokens: int, overwrite: bool = False) -> AlpsInput:
        """Scale the second moments and invert them for every level of ``rho``.

        The result depends on the inputs alone and serves every sparsity of every linear that shares them. An input that
        was always zero is treated as uncorrelated with all others.

        Memory of the result: ``1 + levels / 2`` times the size of ``gram``, and once that size more here and in
        ``prune``: 13.4 GB in total at 28672 inputs.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``, float32.
            tokens: number of tokens.
            overwrite: keep the result in the memory of ``gram``. Otherwise ``gram`` is left unchanged.

        Raises:
            ValueError: ``tokens`` is 0, the inputs are not finite, or the matrix is not a sum of ``x x^T``.
        """
        diagonal = gram.diagonal().double()
        if tokens < 1 or not diagonal.isfinite().all():
            raise ValueError(
                f"ALPS needs second moments, but they come from {tokens} tokens and "
                f"{int((~diagonal.isfinite()).sum())} of {len(gram)} inputs are not finite. "
                "Pass at least one window, and compute in bfloat16 or float32. A linear that the model does not call "
                "(such as Mamba's dt_proj, whose weight is used without a call) receives no tokens; leave it dense "
                "(--exclude with its name)."
            )
        inverse_norms = _reciprocal(diagonal.sqrt()).float()
        hessian = gram.to(torch.float32, copy=not overwrite)
        hessian.mul_(inverse_norms).mul_(inverse_norms[:, None])
        hessian.diagonal().fill_(1 + self.damping)
        inverse = torch.empty_like(hessian)
        inverses = []
        for level in range(self.levels):
            self._invert(hessian, level, inverse)
            inverses.append(tuple((first, panel.clone()) for first, panel in upper_panels(inverse)))
        return AlpsInput((diagonal / tokens).sqrt().float(), hessian, tuple(inverses))

    def prune(self, weight: Tensor, prepared: AlpsInput, count: int, group: int | None = None) -> Tensor:
        """Remove ``count`` entries of a weight and correct the others.

        The error ``||W X - W' X||^2``, before rounding to the dtype of ``weight``, is at most that of removing the
        entries with the smallest ``|w|`` times input norm and correcting the others with the same number of steps. On
        almost uncorrelated inputs the selection by ADMM can be worse; it is then not used.

        Weights of inputs that were always zero count as zeros and are removed first; those that remain do not change.
        Memory in addition to the result: the size of the Hessian, and about six copies of the weight in float32.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: result of ``prepare`` for the linear's inputs.
            count: number of weights to remove from the matrix; of equally important weights the first are removed.
            group: M of an N:M pattern: every row loses the same number of M consecutive inputs. None without a pattern.

        Returns:
            Pruned weight, same shape and dtype as ``weight``; computed in float32.

        Raises:
            ValueError: the count is out of range or does not fit the pattern, the shapes do not match, or the weight is
                not finite.
        """
        require_prunable(weight, len(prepared.scale), count)
        if group is not None:
            removed_per_group(count, weight.shape, group)  # raises if the count does not fit the pattern
        require_full_float32()
        scaled = weight.detach().float() * prepared.scale
        removed = _smallest(scaled.abs(), count, group)
        change = refit(scaled.where(removed, 0).neg_(), prepared.hessian, removed, self.refit_steps)
        other, found = self._search(scaled, prepared, removed, count, group)
        found.sub_(scaled)
        del scaled  # its memory is needed for the fit
        refit(found, prepared.hessian, other, self.refit_steps)
        if self._error(found, prepared) < self._error(change, prepared):
            removed, change = other, found
        # Add changes instead of taking new values, so that unchanged weights keep their exact value.
        pruned = change.mul_(_reciprocal(prepared.scale)).add_(weight.detach())
        return pruned.masked_fill_(removed, 0).to(weight.dtype)

    def _search(
        self, scaled: Tensor, prepared: AlpsInput, removed: Tensor, count: int, group: int | None
    ) -> tuple[Tensor, Tensor]:
        """Run ADMM from the mask ``removed``; return the new mask and the sparse weight."""
        products = scaled @ prepared.hessian
        sparse = scaled.masked_fill(removed, 0)
        dual = scaled - sparse  # in units of rho
        whole = torch.empty_like(prepared.hessian)
        for level, panels in enumerate(prepared.inverses):
            inverse = fill_symmetric(
                whole, panels
            ).mT  # by column, as LAPACK returns it: same bits of the products
            if level:
                dual.div_(2)
            for _ in range(self.iterations):
                torch.add(products, sparse.sub_(dual), alpha=self._rho(level), out=sparse)
                dual.add_(sparse @ inverse)
                removed = _smallest(torch.abs(dual, out=sparse), count, group)
                sparse.copy_(dual).masked_fill_(removed, 0)
                dual.sub_(sparse)
        return removed, sparse

    def _rho(self, level: int) -> float:
        return self.rho * 2**level

    def _invert(self, hessian: Tensor, level: int, inverse: Tensor) -> None:
        """Write the inverse of ``hessian + rho`` into ``inverse``."""
        by_column = inverse.mT  # LAPACK works in place on matrices that are stored by column
        by_column.copy_(hessian).diagonal().add_(self._rho(level))
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(by_column, out=(by_column, info))
        if info:
            raise ValueError(
                f"the Hessian of {len(hessian)} inputs is not positive definite with damping {self.damping:g} and rho "
                f"{self._rho(level):g}: its Gram matrix is not a sum of x x^T, or rounding errors are too large. Raise "
                "rho, e.g. tenfold, and look for inputs that are not finite."
            )
        torch.cholesky_inverse(by_column, out=by_column)

    def _error(self, change: Tensor, prepared: AlpsInput) -> float:
        """Return the mean squared change of the outputs, summed over the outputs, without damping."""
        damped = (change @ prepared.hessian).mul_(change).sum(dtype=torch.float64)
        return float(damped - self.damping * change.square().sum(dtype=torch.float64))


def refit(change: Tensor, hessian: Tensor, removed: Tensor, steps: int) -> Tensor:
    """Minimize ``trace(change hessian change^T)`` over the entries that are not removed, by conjugate gradients.

    A preconditioner is not needed, because the Hessian has a constant diagonal.

    Args:
        change: sparse weight minus dense weight, shape ``(out_features, in_features)``, float32; changed in place and
            returned.
        hessian: positive semidefinite, shape ``(in_features, in_features)``.
        removed: mask, same shape as ``change``; marked entries do not change.
        steps: number of products with the Hessian, in addition to the first.
    """
    residual = (change @ hessian).neg_().masked_fill_(removed, 0)
    return minimize(change, residual, hessian, removed, steps)


def _reciprocal(values: Tensor) -> Tensor:
    """Return ``1 / values``, or zero where the value is zero."""
    return torch.where(values > 0, 1 / values, 0)


def _smallest(magnitudes: Tensor, count: int, group: int | None) -> Tensor:
    """Mark the ``count`` smallest entries; of equal entries the first."""
    if group is not None:
        return removal_levels(magnitudes, lambda rows: rows, [count], by_row=True, group=group) == 0
    return lowest(magnitudes, count)
