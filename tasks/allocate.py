"""Allocate: compute the sparsity plans that may be tried."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.allocators.allocator import Allocator, ByShape, Given, spread_out, strength_of
from layerwise.allocators.atp import ATP
from layerwise.allocators.attention_offset import with_offset
from layerwise.allocators.beta_grid import beta_grid, beta_grid_size, beta_spread
from layerwise.allocators.budget import fitted
from layerwise.allocators.sparsity_plan import Granularity, SparsityPlan, units_of
from layerwise.models.expert_names import kind_of
from layerwise.models.skeleton import Linear
from layerwise.pruners.patterns import Pattern, on_levels
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import MOST_PLANS
from layerwise.tasks.measure import is_measured, read_scores
from layerwise.tasks.running.stage_task import stage_task

PLANS_FILE = "plans.json"


@dataclass(frozen=True)
class AllocateSettings:
    """Settings of the plans: an allocator, its strengths, and offsets between attention and MLP.

    Attributes:
        target: overall sparsity.
        betas: strengths to try (for ATP: common differences); 0, the uniform plan, is always added.
        count: number of betas, spread evenly over ATP's legal range.
        step: distance between betas, which are its multiples within ATP's legal range; 0.002 in the paper.
        allocator: allocator that the strengths belong to. An allocator other than ATP has a default strength, which is
            tried if ``betas`` is not given.
        offsets: sparsity of attention minus sparsity of the MLP; 0 is always added.
        granularity: part of a layer that gets a sparsity of its own, see ``units_of``; "linear" and "expert" need an
            allocator that measures linears, "linear" may also use their shapes.
        pattern: N:M pattern, e.g. "2:4"; None for unstructured sparsity.
    """

    target: float
    betas: tuple[float, ...] | None = None
    count: int | None = None
    step: float | None = None
    allocator: Allocator = ATP()
    offsets: tuple[float, ...] = ()
    granularity: Granularity = "layer"
    pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("betas", "count", "step") if getattr(self, name) is not None]
        # Checked before any plan is computed: the count may be a billion.
        self._check_number(1 + self.count if self.count else len({0.0, *(self.betas or ())}))
        if self._is_fixed:
            self._check_fixed(given)
        elif isinstance(self.allocator, ATP):
            if len(given) != 1:
                raise ValueError(
                    f"the betas are given by {' and '.join(given) or 'nothing'}; "
                    "give exactly one of a list of betas, their count, or the grid's step."
                )
        elif given and given != ["betas"]:
            raise ValueError(
                f"the strengths of {self.allocator.method} are given by {' and '.join(given)}, which only ATP has. "
                "Give a list of strengths (betas), or leave it out to use the allocator's default."
            )
        if isinstance(self.allocator, Given) and given:
            raise ValueError(
                f"sparsities are given, and betas are given by {' and '.join(given)}. Leave out the betas."
            )
        if isinstance(self.allocator, ByShape):
            if self.granularity != "linear":
                raise ValueError(
                    f"{self.allocator.method} only uses the shapes of the linears, which are the same in all layers of most "
                    "models. Give every linear a sparsity of its own (granularity linear), or choose another allocator."
                )
        elif self.granularity != "layer" and not is_measured(self.allocator):
            raise ValueError(
                f"{self.allocator.method} only uses the depth of a layer and cannot tell its linears apart. Allocate by "
                "layer, or choose an allocator that measures linears, e.g. owl."
            )
        if self.granularity != "layer" and self.offsets:
            raise ValueError(
                f"offsets between attention and MLP cannot be combined with a sparsity per {self.granularity}. Leave out "
                "the offsets, or allocate by layer."
            )

    @property
    def _is_fixed(self) -> bool:
        """True if an N:M pattern fixes the sparsity of every layer."""
        return self.pattern is not None and Pattern.parse(self.pattern).kept is not None

    def _check_fixed(self, given: Sequence[str]) -> None:
        pattern = Pattern.parse(str(self.pattern))
        assert pattern.kept is not None, "a fixed pattern has a number N"
        removed = 1 - pattern.kept / pattern.group
        if abs(self.target - removed) > 1e-9:
            raise ValueError(
                f"the pattern {self.pattern} removes {removed:g} of the weights, and the overall sparsity is "
                f"{self.target:g}. Set it to {removed:g}, or use N:{pattern.group}."
            )
        if given or self.offsets or not isinstance(self.allocator, ATP):
            raise ValueError(
                f"the pattern {self.pattern} gives every layer the same sparsity, so there is nothing to allocate. "
                f"Leave out allocator, betas and offsets, or use N:{pattern.group}."
            )

    def _check_number(self, betas: int) -> None:
        """Refuse a number of betas that gives more plans than fit into one group."""
        plans = betas * len({0.0, *self.offsets})
        if plans > MOST_PLANS:
            raise ValueError(
                f"the settings give {plans} plans, including uniform, but at most {MOST_PLANS} can be tried together. "
                "Give fewer betas or offsets, or a wider step."
            )

    @property
    def identity(self) -> dict[str, object]:
        """Settings as part of a key. Fields that were added later are left out at their default, to keep older keys."""
        unused = {
            name
            for name, default in (
                ("allocator", ATP()),
                ("offsets", ()),
                ("granularity", "layer"),
                ("pattern", None),
            )
            if getattr(self, name) == default
        }
        used = {name: value for name, value in vars(self).items() if name not in unused}
        if self.granularity == "linear":  # written as before there were experts, to keep older keys
            del used["granularity"]
            used["by_linear"] = True
        return used

    def plans(
        self, linears: Sequence[Sequence[Linear]], scores: Sequence[float] = ()
    ) -> tuple[SparsityPlan, ...]:
        """Compute the plans: the uniform plan first, then by rising beta, then by rising offset.

        Args:
            linears: the prunable linears, by layer.
            scores: scores of the layers or linears, for an allocator that measures them.

        Raises:
            ValueError: a strength or an offset that this model does not allow, or too many plans.
        """
        layer_sizes = [sum(linear.numel for linear in layer) for layer in linears]
        if self.step is not None:
            self._check_number(beta_grid_size(self.target, layer_sizes, self.step))
        betas = self._betas(layer_sizes)
        self._check_number(len(betas))
        offsets = sorted({0.0, *self.offsets})
        points = [(beta, offset) for beta in betas for offset in offsets]
        points.sort(key=lambda point: point != (0.0, 0.0))  # stable
        return tuple(self._plan(beta, offset, linears, scores) for beta, offset in points)

    def _betas(self, layer_sizes: Sequence[int]) -> Sequence[float]:
        if self._is_fixed:
            return [0.0]
        if self.betas is not None:
            return sorted({0.0, *self.betas})
        if self.count is not None:
            return beta_spread(self.target, layer_sizes, self.count)
        if self.step is not None:
            return beta_grid(self.target, layer_sizes, self.step)
        return sorted({0.0, strength_of(self.allocator) or 0.0})

    def plan_of_layers(
        self, beta: float, layers: Sequence[float], layer_sizes: Sequence[int]
    ) -> SparsityPlan:
        """Return the plan with these sparsities; with an N:M pattern, with the nearest sparsities it allows.

        Args:
            layers: sparsity of every layer; their mean, weighted by size, is the target.
        """
        return SparsityPlan(beta, self._on_levels(layers, layer_sizes))

    def plan_of_kinds(
        self,
        beta: float,
        plan: SparsityPlan,
        offset_of: Mapping[str, float],
        linears: Sequence[Sequence[Linear]],
    ) -> SparsityPlan:
        """Add an offset per kind of linear to a plan by layer, and fit the result to the target.

        Args:
            plan: one sparsity per layer.
            offset_of: offset by the name of a linear within its layer; the same linear of all experts has one offset, see
                ``kind_of``.
            linears: the prunable linears, by layer.
        """
        sizes = [[linear.numel for linear in layer] for layer in linears]
        flat = [size for layer in sizes for size in layer]
        by_linear = zip(linears, plan.by_linear(sizes), strict=True)
        moved = [
            share + offset_of[kind_of(linear.name)]
            for layer, shares in by_linear
            for linear, share in zip(layer, shares, strict=True)
        ]
        return SparsityPlan(beta, _nested(fitted(moved, flat, self.target), sizes))

    def _on_levels(self, shares: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """Move sparsities to the nearest ones that an N:M pattern with a free N allows."""
        if self.pattern is None or self._is_fixed:
            return tuple(shares)
        return on_levels(shares, sizes, self.target, Pattern.parse(self.pattern).group)

    def _plan(
        self, beta: float, offset: float, linears: Sequence[Sequence[Linear]], scores: Sequence[float]
    ) -> SparsityPlan:
        sizes = [[linear.numel for linear in layer] for layer in linears]
        if isinstance(self.allocator, ByShape):
            scores = [linear.in_features + linear.out_features for layer in linears for linear in layer]
        names = [[linear.name for linear in layer] for layer in linears]
        units = [[positions for _, positions in units_of(layer, self.granularity)] for layer in names]
        entries = [
            sum(of_layer[position] for position in positions)
            for of_layer, parts in zip(sizes, units, strict=True)
            for positions in parts
        ]
        shares = spread_out(self.allocator, beta, scores, entries, self.target)
        if not offset:
            shares = self._on_levels(shares, entries)
        if self.granularity != "layer":
            return SparsityPlan(beta, _of_units(shares, units))
        if not offset:
            return SparsityPlan(beta, shares)
        layers = with_offset(shares, offset, names, sizes, self.target)
        if self.pattern is not None:
            of_all = [share for layer in layers for share in layer]
            layers = _nested(self._on_levels(of_all, [size for layer in sizes for size in layer]), sizes)
        return SparsityPlan(beta, layers, offset)


def _nested(shares: Sequence[float], sizes: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Group the sparsities of all linears by layer."""
    every = iter(shares)
    return tuple(tuple(next(every) for _ in layer) for layer in sizes)


def _of_units(
    shares: Sequence[float], units: Sequence[Sequence[Sequence[int]]]
) -> tuple[tuple[float, ...], ...]:
    """Return the sparsity of every linear, by layer, given those of the units that it belongs to."""
    every = iter(shares)
    layers = []
    for parts in units:
        of_linear = {
            position: share for positions, share in zip(parts, every, strict=False) for position in positions
        }
        layers.append(tuple(share for _, share in sorted(of_linear.items())))
    return tuple(layers)


def allocate_stage(
    linears: Sequence[Sequence[Linear]], settings: AllocateSettings, measured: Artifact | None
) -> Stage:
    """Describe an allocation."""
    layer_sizes = [sum(linear.numel for linear in layer) for layer in linears]
    sizes: dict[str, object] = {"layer_sizes": layer_sizes}
    if settings.offsets or settings.granularity != "layer":
        sizes["linears"] = [[[linear.name, linear.numel] for linear in layer] for layer in linears]
    if isinstance(settings.allocator, ByShape):
        sizes["inputs"] = [[linear.in_features for linear in layer] for layer in linears]
    inputs = {} if measured is None else {"scores": measured.content}
    return Stage("allocate", 1, settings.identity | sizes, inputs)


@stage_task(about=lambda linears, settings, **_: f"at {settings.target:g}, {len(linears)} layers")
def allocate(
    store: ArtifactStore,
    linears: Sequence[Sequence[Linear]],
    settings: AllocateSettings,
    measured: Artifact | None,
) -> Artifact:
    """Write the plans to ``plans.json``: beta, offset and the sparsity of every layer (or linear).

    Args:
        linears: the prunable linears, by layer.
        measured: an artifact of ``measure``, for an allocator that measures the model.
    """

    def build(draft: Draft) -> None:
        plans = settings.plans(linears, () if measured is None else read_scores(store, measured))
        draft.write(PLANS_FILE, json.dumps([vars(plan) for plan in plans], indent=1).encode())
        draft.facts |= {"betas": [plan.beta for plan in plans]}

    return store.get_or_build(allocate_stage(linears, settings, measured), build)


def read_plans(store: ArtifactStore, artifact: Artifact) -> tuple[SparsityPlan, ...]:
    """Read the plans of an artifact of ``allocate``, uniform first."""
    rows = json.loads(store.read(artifact, PLANS_FILE))
    return tuple(
        SparsityPlan(
            row["beta"],
            tuple(tuple(layer) if isinstance(layer, list) else layer for layer in row["layers"]),
            row.get("offset", 0.0),
        )
        for row in rows
    )
