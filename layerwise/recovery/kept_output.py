"""Output of a layer's first module, kept for the calibration windows, so that later passes through the layer skip it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class KeptOutput:
    """Output of the first direct submodule of a layer that contains linears to recover: attention, in most models.

    A refit runs the layer once for every group of linears. When all linears of the module have their last weights, its
    output does not change any more, and the next passes use the kept one. It has the same bits, because every pass has the
    same batches. Output that is more than one tensor is not kept; then every pass computes it.

    Args:
        layer: the layer.
        linears: names of its linears to recover.
        room: takes the outputs, shape ``(windows, seqlen, hidden_size)``, on any device; overwritten.
    """

    def __init__(self, layer: nn.Module, linears: Collection[str], room: Tensor) -> None:
        self._room = room
        self._windows = 0  # number of windows whose output is kept: the first ones
        self._rest: tuple[None, ...] | None = None  # what the module returns after the output; None: no tuple
        self._module: nn.Module | None = None
        self._linears: set[str] = set()
        for name, child in layer.named_children():
            self._linears = {each for each in linears if f"{each}.".startswith(f"{name}.")}
            if self._linears:
                self._module = child
                break

    @contextmanager
    def in_pass(self, windows: slice, target: str, final: Collection[str]) -> Iterator[None]:
        """Within the block, use the kept output, or keep the output for the next pass.

        Args:
            windows: the windows of the pass.
            target: the linear whose input the pass computes. If the module contains it, nothing is used or kept.
            final: the linears that have their last weights.
        """
        module = self._module
        if module is None or target in self._linears or not self._linears <= set(final):
            yield
        elif windows.stop <= self._windows:
            computed = module.forward
            module.forward = lambda *args, **kwargs: self._kept(windows)
            try:
                yield
            finally:
                module.forward = computed
        else:
            hook = module.register_forward_hook(lambda module, inputs, output: self._keep(windows, output))
            try:
                yield
            finally:
                hook.remove()

    def _keep(self, windows: slice, output: object) -> None:
        rest: tuple[None, ...] | None = None
        if isinstance(output, tuple):
            output, *others = output
            if any(other is not None for other in others):
                return
            rest = (None,) * len(others)
        room = self._room[windows]
        if not isinstance(output, Tensor) or (output.shape, output.dtype) != (room.shape, room.dtype):
            return
        if windows.start == self._windows:
            room.copy_(output)
            self._windows, self._rest, self._device = windows.stop, rest, output.device

    def _kept(self, windows: slice) -> Tensor | tuple[Tensor | None, ...]:
        output = self._room[windows].to(self._device)
        return output if self._rest is None else (output, *self._rest)
