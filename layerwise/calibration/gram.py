"""Gram matrices of the inputs of linears: second moments for the pruners that correct weights or swap masks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from layerwise.calibration.counted_tokens import counted_batches, counted_rows
from layerwise.calibration.upper_triangle import PANEL
from layerwise.models.experts import counted_by
from layerwise.models.skeleton import Linear


@dataclass(eq=False)  # compared by identity: linears with the same object share their input
class InputGram:
    """Running sum of ``x x^T`` over the input tokens ``x`` of one or several linears.

    Products and sums are in float32 for every input dtype, because squares of float16 activations overflow and sums in
    bfloat16 stop growing. Memory: 4 bytes per entry, 67 MB for 4096 features, 3.3 GB for 28672.
    """

    gram: Tensor  # (in_features, in_features), float32
    tokens: int = 0
    sums: Tensor | None = None  # sum of the tokens, (in_features,), float64; None if it is not collected

    @classmethod
    def empty(cls, in_features: int, device: torch.device | None = None, with_sums: bool = False) -> Self:
        gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        sums = torch.zeros(in_features, dtype=torch.float64, device=device) if with_sums else None
        return cls(gram, sums=sums)

    def add(self, inputs: Tensor) -> None:
        """Add one batch of inputs, shape ``(..., in_features)``, any dtype.

        Raises:
            ValueError: the inputs have another width.
            RuntimeError: see ``require_full_float32``.
        """
        in_features = len(self.gram)
        if inputs.shape[-1] != in_features:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} were added to the Gram matrix of {in_features} features. "
                "Pass the inputs of the linear, features last."
            )
        require_full_float32()
        tokens = inputs.detach().reshape(-1, in_features).float()
        # Blocks on and right of the diagonal are computed, the others are mirrored.
        for start in range(0, in_features, PANEL):
            stop = start + PANEL
            self.gram[start:stop, start:].addmm_(tokens[:, start:stop].T, tokens[:, start:])
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T
        if self.sums is not None:
            self.sums += tokens.sum(dim=0).double()
        self.tokens += len(tokens)


def require_full_float32() -> None:
    """Raise if float32 products may be computed in TF32 (CUDA, 10 bits) or bfloat16 (CPU, 7 bits).

    The setting is not changed here, because it applies to the whole process, including other threads.

    Raises:
        RuntimeError: reduced precision is allowed by a call or by the environment.
    """
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        precision = backend.matmul.fp32_precision  # type: ignore[attr-defined]
        if precision not in ("none", "ieee"):
            raise RuntimeError(
                f"float32 matrix products are allowed to run in {precision}, which is too coarse for "
                "second moments. Call torch.set_float32_matmul_precision('highest') when the process starts, and "
                "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE."
            )


@contextmanager
def collect_grams(
    layer: nn.Module,
    linears: Sequence[Linear],
    counted: Tensor | None = None,
    with_sums: bool = False,
) -> Iterator[dict[str, InputGram]]:
    """Collect the Gram matrices of ``linears`` from every forward pass of ``layer`` within the block.

    Linears that receive the same tensor object within a pass (q, k and v; gate and up) share one ``InputGram``; see
    ``linears_by_input``. Entries are added by the first pass; a linear that the pass does not call has no entry.

    Args:
        counted: mask of the tokens that count, see ``collect_statistics``.
        with_sums: also collect the sum of the tokens.

    Raises:
        ValueError: a linear runs twice in a pass, or a pass shares inputs differently from the first pass.
    """
    watched = _GramHooks(layer, counted, with_sums)
    try:
        for linear in linears:
            watched.watch(linear.name)
        yield watched.grams
    finally:
        watched.stop()


def linears_by_input(grams: Mapping[str, InputGram]) -> tuple[tuple[str, ...], ...]:
    """Group the names of the linears that share an ``InputGram``, in the order of their first appearance."""
    groups: dict[InputGram, list[str]] = {}
    for name, gram in grams.items():
        groups.setdefault(gram, []).append(name)
    return tuple(map(tuple, groups.values()))


class _GramHooks:
    """Hooks on one layer, and the Gram matrices that they collect."""

    def __init__(self, layer: nn.Module, counted: Tensor | None, with_sums: bool) -> None:
        self._masks = counted_batches(counted)
        self._mask: Tensor | None = None  # of the current pass
        self.grams: dict[str, InputGram] = {}
        self._with_sums = with_sums
        self._layer = layer
        # Inputs of the current pass. They are kept until it ends, so that the id of one cannot be reused. The version
        # reveals a tensor that was changed in place.
        self._inputs: list[tuple[Tensor, int, list[str]]] = []
        self._groups: set[frozenset[str]] = set()
        self._hooks = [
            layer.register_forward_pre_hook(lambda *_: self._begin()),
            layer.register_forward_hook(lambda *_: self._finish()),
        ]

    def watch(self, name: str) -> None:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._count(name, inputs[0])

        self._hooks.append(self._layer.get_submodule(name).register_forward_pre_hook(count))

    def stop(self) -> None:
        self._inputs.clear()
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self._inputs.clear()
        self._mask = next(self._masks)

    def _count(self, name: str, inputs: Tensor) -> None:
        if any(name in names for _, _, names in self._inputs):
            raise ValueError(
                f"{name} ran twice in one pass of its layer, so it does not have a single input. "
                "Exclude it from the linears to prune."
            )
        for tensor, version, names in self._inputs:
            if tensor is inputs and version == inputs._version:
                self.grams.setdefault(name, self.grams[names[0]])
                names.append(name)
                return
        self._inputs.append((inputs, inputs._version, [name]))
        if name not in self.grams:
            self.grams[name] = InputGram.empty(inputs.shape[-1], inputs.device, self._with_sums)
        counted = None if self._mask is None else counted_by(self._layer, name, self._mask)
        self.grams[name].add(counted_rows(inputs, counted))

    def _finish(self) -> None:
        groups = {frozenset(names) for _, _, names in self._inputs}
        self._inputs.clear()
        self._groups = self._groups or groups
        if groups != self._groups:
            raise ValueError(
                f"the linears shared their inputs as {_listed(self._groups)} in the first pass of the layer and as "
                f"{_listed(groups)} in a later pass, so their Gram matrices are mixed up. "
                "Prune this model with a method that needs no Gram matrix, such as Wanda."
            )


def _listed(groups: set[frozenset[str]]) -> str:
    return " | ".join(sorted("+".join(sorted(names)) for names in groups)) or "none"
