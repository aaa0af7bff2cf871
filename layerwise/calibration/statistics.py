"""Input statistics of the linears of a decoder layer: the norm of every input channel over the calibration tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from layerwise.calibration.counted_tokens import counted_batches, counted_rows
from layerwise.models.experts import counted_by
from layerwise.models.skeleton import Linear


@dataclass
class InputStatistics:
    """Running sum of squares of every input channel of one linear.

    A batch is summed in float32, and batches are added in float64. A sum in bfloat16 stops growing once it is 256
    times larger than one addend, which would silently ignore the rest of a long calibration text.
    """

    sum_of_squares: Tensor  # (in_features,), float64; on the CPU once the collection has ended
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | None = None) -> Self:
        return cls(torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, sum_of_squares: Tensor, tokens: int) -> None:
        """Add one batch.

        Args:
            sum_of_squares: sum over the batch's tokens, per channel, shape ``(in_features,)``.
            tokens: number of tokens in the batch.
        """
        self.sum_of_squares += sum_of_squares.double()
        self.tokens += tokens

    @property
    def norms(self) -> Tensor:
        """Return the L2 norm of every input channel over all calibration tokens, shape ``(in_features,)``, float32."""
        return self.sum_of_squares.sqrt().float()


@contextmanager
def collect_statistics(
    layer: nn.Module, linears: Sequence[Linear], counted: Tensor | None = None
) -> Iterator[dict[str, InputStatistics]]:
    """Collect the input statistics of ``linears`` from every forward pass of ``layer`` within the block.

    Args:
        counted: mask of the tokens that count in all passes together, shape ``(windows, seqlen)``; None for all. The
            passes take the windows batch by batch.
    """
    masks = counted_batches(counted)
    mask: list[Tensor | None] = [None]  # of the current pass
    statistics = {
        linear.name: InputStatistics.empty(
            linear.in_features,
            layer.get_submodule(linear.name).weight.device,  # type: ignore[union-attr,arg-type]
        )
        for linear in linears
    }
    # q, k and v (and gate and up) receive the same tensor object; its squares are summed once.
    last_inputs: list[tuple[Tensor, Tensor, int]] = []

    def watch(linear: Linear) -> object:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not last_inputs or last_inputs[0][0] is not inputs[0]:
                counted = None if mask[0] is None else counted_by(layer, linear.name, mask[0])
                flat = counted_rows(inputs[0], counted).reshape(-1, linear.in_features).float()
                last_inputs[:] = [(inputs[0], flat.square().sum(dim=0), len(flat))]
            statistics[linear.name].add(*last_inputs[0][1:])

        return layer.get_submodule(linear.name).register_forward_pre_hook(count)

    def begin_pass(*_: object) -> None:
        mask[0] = next(masks)

    hooks = [layer.register_forward_pre_hook(begin_pass), *(watch(linear) for linear in linears)]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    _move_to_cpu(list(statistics.values()))


def _move_to_cpu(statistics: Sequence[InputStatistics]) -> None:
    """Move all sums in one copy, because each waits for the device."""
    if not statistics or statistics[0].sum_of_squares.is_cpu:
        return
    sizes = [len(each.sum_of_squares) for each in statistics]
    for each, sums in zip(
        statistics, torch.cat([each.sum_of_squares for each in statistics]).cpu().split(sizes), strict=True
    ):
        each.sum_of_squares = sums
