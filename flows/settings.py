"""What a search is for: the form in Prefect's UI, the options of the command line, the parameters of a deployment.

``Search`` decides the result and is part of the artifacts' keys; ``runtime.Runtime`` says where and how, and is not.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from layerwise.allocators.allocation import ATP, BETA_STEP
from layerwise.allocators.allocators import parameter_name
from layerwise.flows.setting_types import (
    AllocatorChoice,
    BareUrl,
    PatternText,
    PrunerChoice,
    RegularExpression,
    Settings,
    Strategy,
)
from layerwise.pruners.layer_pruning import MaskPruner
from layerwise.pruners.patterns import Pattern
from layerwise.pruners.wanda import Wanda
from layerwise.tasks.allocate import AllocateSettings
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.measure import needs_grams
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.results.selection import TRIAL
from layerwise.tasks.texts.documents import Role

# Enough for a dozen betas on curves like those of the paper; as many again for the offset; two rounds over a LLaMA's
# seven kinds of projections. The paper's Bayesian search over all layers took about 1000.
TRIALS: dict[str, int] = {
    "adaptive": 6,
    "two-parameter": 12,
    "projections": 48,
    "bayesian": 64,
    "evolutionary": 64,
}
# Far above what anybody has run, and low enough that a typing error ends at once: the longest context of a model is
# 10 million tokens; a search over layers took 1000 trials; torch takes seeds of 63 bits.
MOST: dict[str, int] = {
    "calibration_windows": 1_000_000,
    "selection_windows": 1_000_000,
    "test_windows": 1_000_000,
    "seqlen": 2**24,
    "seed": 2**63 - 1,
    "trials": 10_000,
    "stop_after": 10_000,
}
OVER_LAYERS = ("bayesian", "evolutionary")

# What "auto" stands for where the text is long enough: the calibration of Wanda's and SparseGPT's papers, and half of
# it for the choice. The built-in text gives about 27 and 13 windows of 2048 tokens.
AUTO_WINDOWS: dict[Role, int] = {"calibration": 128, "selection": 64}


class Search(Settings):
    """Find the best common difference beta for one model and one overall sparsity, and export the pruned model."""

    model: BareUrl = Field(
        description="Model to prune: a hub id (owner/name[@revision]), a folder, any fsspec URL of a folder "
        "(s3://, hf://, ...), a .gguf file, or 'demo' (SmolLM2-135M-Instruct)."
    )
    sparsity: float = Field(
        gt=0, lt=1, description="Overall fraction of the decoder linears' weights to remove, between 0 and 1."
    )
    pruner: PrunerChoice = Field(
        default=Wanda(),
        description="How the weights to remove are chosen: wanda, magnitude; wanda_swaps, by the inputs' correlations; "
        "or sparsegpt and alps, which also correct the weights that stay.",
    )
    pattern: PatternText | None = Field(
        title="N:M pattern",
        default=None,
        description="N of M consecutive weights of every output stay: 2:4, 4:8; or N:8, where the allocator gives "
        "every layer a N of its own. Empty: none.",
    )
    exclude: RegularExpression | None = Field(
        title="Linears to leave dense",
        default=None,
        description="Regular expression that is looked for in LAYER.LINEAR, such as 0.mlp.down_proj; what it is found "
        "in stays dense and does not count in the sparsity. Head and embeddings always stay dense. Empty: none.",
    )
    allocator: AllocatorChoice = Field(
        default=ATP(),
        description="How sparsity is spread over the layers: atp, owl, alpha_pruning, dsa, dlp, lsa, erf, power; or "
        "given, with a list of your own.",
    )
    granularity: Literal["layer", "linear"] = Field(
        title="What has a sparsity of its own",
        default="layer",
        description="Every layer; or every linear, by an allocator that measures them (owl, alpha_pruning, dsa, dlp, "
        "lsa).",
    )
    offsets: tuple[Annotated[float, Field(gt=-1, lt=1)], ...] = Field(
        title="Offsets between attention and MLP",
        default=(),
        description="How much more of attention's weights than of the MLP's is removed, such as -0.1 and 0.1; 0 is "
        "tried in any case. Empty: 0 only.",
    )
    calibration_mode: Literal["dense", "sequential"] = Field(
        default="dense",
        description="dense: one capture of the dense model serves all betas. sequential: every beta calibrates "
        "each layer on its own pruned model, as the original Wanda code does; about three times the time.",
    )
    calibration: BareUrl = Field(
        title="Calibration text",
        default="builtin",
        description="Text for calibration: wikitext2, c4 or ptb, as papers mean them; hf:owner/name[/config][:split]; "
        "a .txt, .jsonl, .json or .parquet file, a folder of such files or a pattern such as 'data/*.jsonl.gz' (path "
        "or URL); or 'builtin' (the documentation in Python's pydoc_data.topics).",
    )
    selection: BareUrl = Field(
        title="Selection text",
        default="builtin",
        description="Text by which beta is chosen; as for calibration.",
    )
    test: BareUrl | None = Field(
        title="Test text",
        default=None,
        description="Text for the final perplexity, touched once; empty: as for selection, of which it gets a part "
        "of its own (the test split of a hub data set).",
    )
    calibration_windows: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description=f"Number of calibration windows. auto: {AUTO_WINDOWS['calibration']}, or all that its part of the "
        "text gives if these are fewer; a number: exactly so many, and a text that is too short is refused.",
    )
    selection_windows: Annotated[int, Field(ge=2)] | Literal["auto"] | None = Field(
        default="auto",
        description=f"Number of selection windows. auto: {AUTO_WINDOWS['selection']}, or all that its part of the text "
        "gives if these are fewer; a number: exactly so many; empty: all that the text gives.",
    )
    test_windows: int | None = Field(
        default=None, ge=1, description="Number of test windows; empty: all that the text gives."
    )
    seqlen: int = Field(
        title="Window length in tokens", default=2048, ge=2, description="Length of every window, in tokens."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random calibration windows.")
    betas: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="These betas, and 0 (uniform) beside them; with another allocator than atp its strengths (the "
        "spread of owl, dsa and power, alpha of dlp, beta of lsa, epsilon of alpha_pruning, log_amplification of erf). "
        "Empty: the grid of beta_step, or that allocator's own strength.",
    )
    beta_count: int | None = Field(
        default=None, ge=1, description="So many betas, spread evenly over the legal range; empty: the grid."
    )
    beta_step: float | None = Field(
        default=None,
        gt=0,
        description=f"Step of the grid of betas within the legal range; empty: {BETA_STEP:g}, as in the paper.",
    )
    strategy: Strategy = Field(
        default="grid",
        description="grid: score every beta on all selection windows. race: score them in rounds of windows, and stop "
        "those that are beaten beyond doubt (paired t above 4, or worse on every window). adaptive: narrow the minimum "
        "of the U-shaped curve down, with a handful of them. two-parameter: the same for beta and offset. "
        "projections: beta, then how much more or less every kind of linear (q_proj, ..., down_proj) loses. bayesian "
        "(Optuna), evolutionary: over the sparsities of all layers, beginning with uniform and the betas given.",
    )
    trials: int | None = Field(
        title="Most plans that are tried",
        default=None,
        ge=2,
        description="With a strategy that does not try all: at most so many, uniform among them; empty: "
        f"{' or '.join(f'{count} ({name})' for name, count in TRIALS.items())}.",
    )
    stop_after: int | None = Field(
        title="Plans after which it stops",
        default=None,
        ge=1,
        description="With such a strategy: begin nothing more once so many plans are scored, however far it would go. "
        "A search whose minutes are over says here where that was; empty: no stop.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        title="Dtype of the computation",
        default="auto",
        description="In which the model computes; auto: the checkpoint's own.",
    )
    export: bool = Field(
        title="Write the pruned model",
        default=True,
        description="Write the checkpoint that the best plan gives; false: only say which plan that is.",
    )
    retain: Literal["none", "sampled", "all"] = Field(
        title="Hidden states to keep",
        default="none",
        description="Windows whose hidden states are kept at every layer boundary of the dense model.",
    )

    @field_validator(*MOST)
    @classmethod
    def _at_most(cls, value: int | str | None, field: ValidationInfo) -> int | str | None:
        most = MOST[str(field.field_name)]
        if isinstance(value, int) and value > most:
            raise PydanticCustomError("too_many", "must be {most} or less", {"most": most})
        return value

    @model_validator(mode="after")
    def _betas_given_once(self) -> "Search":
        _ = self.allocation
        for name in ("trials", "stop_after"):
            if getattr(self, name) is not None and self.strategy not in TRIALS:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but the strategy {self.strategy} tries all plans. Leave {name} "
                    f"empty, or set strategy to {' or '.join(TRIALS)}."
                )
        if self.strategy == "projections" and self.pattern is not None:
            raise ValueError(
                f"strategy is projections, and there is the pattern {self.pattern}, whose levels are further "
                "apart than what this strategy tries. Leave the pattern out, or use grid, race or two-parameter."
            )
        if self.makes_plans and (self.granularity == "linear" or self._is_fixed_pattern):
            raise ValueError(
                f"strategy is {self.strategy}, which chooses sparsities itself, and there is the pattern "
                f"{self.pattern} with granularity {self.granularity}. Use N:8 or no pattern, and granularity layer."
            )
        if bool(self.offsets) != (self.strategy == "two-parameter") and self.strategy in TRIALS:
            raise ValueError(
                f"strategy is {self.strategy}, and there are {len(self.offsets)} offsets. Give offsets with the "
                "strategy two-parameter, grid or race."
            )
        if self.calibration_mode == "sequential" and not isinstance(self.pruner, MaskPruner):
            raise ValueError(
                f"the pruner {self.pruner.method} is calibrated on the dense model's inputs: one set of Gram matrices "
                "serves all plans and the export. Set calibration_mode to dense, or choose wanda or magnitude."
            )
        return self

    @property
    def allocation(self) -> AllocateSettings:
        """Which plans may be tried."""
        step, betas = self.beta_step, self.betas
        searched = isinstance(self.allocator, ATP) and not self._is_fixed_pattern
        if searched and step is None and betas is None and self.beta_count is None:
            step, betas = (None, ()) if self.strategy in OVER_LAYERS else (BETA_STEP, None)
        return AllocateSettings(
            self.sparsity,
            betas,
            self.beta_count,
            step,
            self.allocator,
            self.offsets,
            self.granularity == "linear",
            self.pattern,
        )

    @property
    def parameter(self) -> str:
        """What the beta of a plan is called."""
        return TRIAL if self.makes_plans else parameter_name(self.allocator)

    @property
    def allocation_title(self) -> str:
        """How sparsity is spread, in a word or two: the allocator, and what is searched beside its strength."""
        searched = "offset" if self.offsets else self.strategy if self.makes_plans else None
        parts = [self.allocator.method] if searched is None else [self.allocator.method, searched]
        return "+".join(parts) + (" by linear" if self.granularity == "linear" else "")

    @property
    def makes_plans(self) -> bool:
        """Whether the plans that are tried are others than the allocator's."""
        return self.strategy in (*OVER_LAYERS, "projections")

    def trials_of(self, plans: int) -> int:
        """How many of its allocator's plans the search tries at most; or how many others."""
        return self.trials or TRIALS.get(self.strategy, plans)

    @property
    def _is_fixed_pattern(self) -> bool:
        return self.pattern is not None and Pattern.parse(self.pattern).kept is not None

    @property
    def needs_grams(self) -> bool:
        """Whether second moments of the linears' inputs are captured."""
        return not isinstance(self.pruner, MaskPruner) or needs_grams(self.allocator)

    @property
    def title(self) -> str:
        """The search in some words, for lists of runs: the model, and the sparsity."""
        return f"{title_of(self.model)} at {self.sparsity:g}"

    def dtype_for(self, stored: str) -> str:
        """In which dtype a checkpoint that is stored in ``stored`` is computed."""
        return stored if self.dtype == "auto" else self.dtype

    def pruning(self, dtype: str) -> PruneSettings:
        """How lanes are pruned, with the dtype that ``auto`` stands for."""
        return PruneSettings(
            self.sparsity, self.pruner, self.calibration_mode, dtype, self.pattern, self.exclude
        )
