"""Settings that all lanes of a search are pruned with, apart from their plans."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from layerwise.allocators.sparsity_plan import SparsityPlan, removed_per_linear
from layerwise.models.skeleton import Linear
from layerwise.pruners.dsnot import DSnoT
from layerwise.pruners.layer_pruning import Pruner, WeightPruner
from layerwise.pruners.patterns import Pattern, removed_on_levels
from layerwise.recovery.layer_recovery import Recovery
from layerwise.recovery.train import Train
from layerwise.tasks.texts.calibrate_on import CalibrateOn, only_if_masked

# 2: other last bits, as narrow outputs are fitted to the sums of the dense model's outputs.
RECOVERY_VERSION = 2


@dataclass(frozen=True)
class PruneSettings:
    """Settings shared by all lanes of a search.

    Attributes:
        target: overall sparsity, the fraction of all linears' weights to remove.
        pruner: method that chooses the weights to remove, and may correct the others.
        calibration_mode: "dense": one capture of the dense model serves all lanes; "sequential": every lane calibrates
            each layer on the hidden states that its own pruned layers produce.
        dtype: dtype that the model computes in.
        pattern: N:M pattern, such as "2:4" or "N:8"; None for unstructured sparsity.
        exclude: regular expression. Linears whose name (``layer.linear``, e.g. "0.mlp.down_proj") contains a match stay
            dense, and do not count in the target or in the realised sparsity.
        recover: recovery of the remaining weights of every layer; None for plain pruning.
        calibrate_on: tokens of the calibration windows that statistics, recovery and losses on these windows use.
    """

    target: float
    pruner: Pruner
    calibration_mode: Literal["dense", "sequential"]
    dtype: str
    pattern: str | None = None
    exclude: str | None = None
    recover: Recovery | None = None
    calibrate_on: CalibrateOn = "all"

    @property
    def identity(self) -> dict[str, object]:
        """Settings as part of a key. Fields that were added later are left out if unused, to keep older keys."""
        unused = [name for name in ("pattern", "exclude", "recover") if getattr(self, name) is None]
        unused.append("calibrate_on")
        own = {name: value for name, value in vars(self).items() if name not in unused}
        own |= only_if_masked(self.calibrate_on)
        if self.recover is not None:
            own["recovery version"] = RECOVERY_VERSION
        return {"type": type(self).__name__, **own}

    @property
    def recovery(self) -> Recovery:
        """The recovery of a search that has one."""
        assert self.recover is not None, "this search does not recover"
        return self.recover

    @property
    def refitting(self) -> "PruneSettings":
        """These settings with the refit alone, if they train."""
        return replace(self, recover=self.recover.refit) if isinstance(self.recover, Train) else self

    @property
    def one_shot(self) -> "PruneSettings":
        """These settings without recovery."""
        return replace(self, recover=None)

    @property
    def pattern_group(self) -> int | None:
        """M of the N:M pattern; None without a pattern."""
        return None if self.pattern is None else Pattern.parse(self.pattern).group

    def prunable(self, linears: Sequence[Sequence[Linear]]) -> list[list[Linear]]:
        """Return the linears that are not excluded, by layer."""
        return [
            [linear for linear in layer if not self._excludes(index, linear)]
            for index, layer in enumerate(linears)
        ]

    def _excludes(self, index: int, linear: Linear) -> bool:
        return self.exclude is not None and re.search(self.exclude, f"{index}.{linear.name}") is not None

    def removed(self, plan: SparsityPlan, linears: Sequence[Sequence[Linear]]) -> tuple[tuple[int, ...], ...]:
        """Return the number of weights that ``plan`` removes from every linear, by layer; 0 for an excluded linear.

        Raises:
            ValueError: the plan was made for other linears, or misses the target.
        """
        prunable = self.prunable(linears)
        sizes = [[linear.numel for linear in layer] for layer in prunable]
        if self.pattern_group is None:
            counts = removed_per_linear(plan, self.target, sizes)
        else:
            counts = removed_on_levels(plan, self.pattern_group, sizes)
        count_of = {
            (index, linear.name): count
            for index, (layer, of_layer) in enumerate(zip(prunable, counts, strict=True))
            for linear, count in zip(layer, of_layer, strict=True)
        }
        return tuple(
            tuple(count_of.get((index, linear.name), 0) for linear in layer)
            for index, layer in enumerate(linears)
        )

    @property
    def needs_grams(self) -> bool:
        """True if the pruner uses second moments of the linears' inputs."""
        return isinstance(self.pruner, WeightPruner)

    @property
    def needs_sums(self) -> bool:
        """True if the pruner also uses the means of the linears' inputs."""
        return isinstance(self.pruner, DSnoT)
