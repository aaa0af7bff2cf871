"""Allocate: which sparsity plans are tried."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocation import SparsityPlan, arithmetic, beta_grid, beta_spread
from storage.artifact import Artifact
from storage.draft import Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.stage_task import stage_task

PLANS_FILE = "plans.json"
MOST_PLANS = 255  # that advance together: a ranking gives every weight one byte (layerwise.masks)


@dataclass(frozen=True)
class AllocateSettings:
    """Which betas of ATP's arithmetic progression are tried; at most one of the three is given.

    Attributes:
        target: overall sparsity.
        betas: these, and 0 (uniform) beside them.
        count: so many, spread evenly over the legal range.
        step: multiples of it within the legal range; the paper's grid is .002.
    """

    target: float
    betas: tuple[float, ...] | None = None
    count: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("betas", "count", "step") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the betas are given by {' and '.join(given) or 'nothing'}; "
                "give exactly one of a list of betas, their count, or the grid's step."
            )

    def plans(self, layer_sizes: Sequence[int]) -> tuple[SparsityPlan, ...]:
        """The plans by rising beta, uniform (beta 0) first.

        Raises:
            ValueError: a beta outside of the legal range for this target and depth, or too many of them.
        """
        if self.betas is not None:
            betas: Sequence[float] = sorted({0.0, *self.betas})
        elif self.count is not None:
            betas = beta_spread(self.target, layer_sizes, self.count)
        else:
            assert self.step is not None
            betas = beta_grid(self.target, layer_sizes, self.step)
        if len(betas) > MOST_PLANS:
            raise ValueError(
                f"these are {len(betas)} betas, and at most {MOST_PLANS} can be tried together. Give a count of betas, "
                "a wider step, or a list."
            )
        return tuple(arithmetic(self.target, beta, layer_sizes) for beta in betas)


def allocate_stage(layer_sizes: Sequence[int], settings: AllocateSettings) -> Stage:
    """The stage of an allocation."""
    return Stage("allocate", 1, {**vars(settings), "layer_sizes": list(layer_sizes)})


@stage_task(about=lambda layer_sizes, settings, **_: f"at {settings.target:g}, {len(layer_sizes)} layers")
def allocate(store: ArtifactStore, layer_sizes: Sequence[int], settings: AllocateSettings) -> Artifact:
    """The plans as an artifact: ``plans.json`` with beta and every layer's sparsity."""

    def build(draft: Draft) -> None:
        plans = settings.plans(layer_sizes)
        draft.write(PLANS_FILE, json.dumps([vars(plan) for plan in plans], indent=1).encode())
        draft.facts |= {"betas": [plan.beta for plan in plans]}

    return store.get_or_build(allocate_stage(layer_sizes, settings), build)


def read_plans(store: ArtifactStore, artifact: Artifact) -> tuple[SparsityPlan, ...]:
    """Plans of an artifact of ``allocate``, uniform first."""
    rows = json.loads(store.read(artifact, PLANS_FILE))
    return tuple(SparsityPlan(row["beta"], tuple(row["layers"])) for row in rows)
