"""Erdos-Renyi: the fewer weights a linear has per input and output, the more of them it keeps (RigL, arXiv:1911.11134).

The density of a linear is proportional to ``(out_features + in_features) / (out_features * in_features)``, as in the
random graphs of sparse evolutionary training (arXiv:1707.04780). Only shapes count, so the layers of a usual model would
all get the same sparsity: these allocators need one sparsity per linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerwise.allocators.budget import between, check_strength


@dataclass(frozen=True)
class ErdosRenyi:
    """Make the density of every linear proportional to its inputs plus outputs per weight, at most 1.

    Attributes:
        strength: 1 for the published densities; smaller values lie between them and uniform.
    """

    strength: float = 1.0
    method: Literal["er"] = "er"

    def __post_init__(self) -> None:
        check_strength(self.method, self.strength)

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every linear; ``scores`` are the numbers of inputs plus outputs."""
        return between(erdos_renyi(scores, sizes, target), sizes, target, self.strength)


@dataclass(frozen=True)
class ErdosRenyiPlus:
    """Like ``ErdosRenyi``, but the last linear stays dense (arXiv:2202.02643).

    That paper keeps the classifier. The head of a language model always stays dense here, and the last linear is that of
    the last decoder layer: ``down_proj`` in LLaMA.

    Attributes:
        strength: 1 for the published densities; smaller values lie between them and uniform.
    """

    strength: float = 1.0
    method: Literal["er_plus"] = "er_plus"

    def __post_init__(self) -> None:
        check_strength(self.method, self.strength)

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every linear; ``scores`` are the numbers of inputs plus outputs.

        Raises:
            ValueError: the other linears together have fewer weights than are to be removed.
        """
        return between(erdos_renyi_plus(scores, sizes, target), sizes, target, self.strength)


def erdos_renyi(connections: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
    """Compute the sparsity ``1 - min(1, factor * connections / size)`` of every linear.

    As in RigL, a linear whose density would exceed 1 stays dense, and the factor of the others decreases until the
    overall sparsity is ``target``.

    Args:
        connections: inputs plus outputs of every linear.
        sizes: number of weights of every linear.
        target: overall sparsity, above 0.
    """
    dense: set[int] = set()
    while True:
        others = [index for index in range(len(sizes)) if index not in dense]
        kept = (1 - target) * sum(sizes) - sum(sizes[index] for index in dense)
        connected = sum(connections[index] for index in others)
        densities = {index: kept * connections[index] / connected / sizes[index] for index in others}
        full = {index for index, density in densities.items() if density > 1}
        if not full:
            return tuple(1 - densities.get(index, 1.0) for index in range(len(sizes)))
        dense |= full


def erdos_renyi_plus(connections: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
    """Compute sparsities as ``erdos_renyi`` does, with 0 for the last linear.

    Raises:
        ValueError: the other linears together have fewer weights than are to be removed.
    """
    removed, others = target * sum(sizes), sum(sizes[:-1])
    if removed > others:
        raise ValueError(
            f"er_plus keeps the last linear dense, but the other linears have {others} weights, fewer than the "
            f"{removed:.0f} to remove at the overall sparsity {target:g}. Use er, or a lower sparsity."
        )
    return (*erdos_renyi(connections[:-1], sizes[:-1], removed / others), 0.0)
