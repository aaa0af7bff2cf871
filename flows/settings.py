"""Settings of a search: options of the command line, form in Prefect's UI, parameters of a deployment.

``Search`` determines the result and is part of the artifacts' keys. ``layerwise.flows.runtime`` has the settings that
do not change the result; they are not part of any key.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from layerwise.allocators.allocator import parameter_name
from layerwise.allocators.atp import ATP
from layerwise.allocators.beta_grid import BETA_STEP
from layerwise.allocators.sparsity_plan import Granularity
from layerwise.flows.setting_types import (
    AllocatorChoice,
    BareUrl,
    PatternText,
    PrunerChoice,
    RecoverChoice,
    RegularExpression,
    Settings,
    StrategyName,
)
from layerwise.pruners.layer_pruning import MaskPruner
from layerwise.pruners.patterns import Pattern
from layerwise.pruners.wanda import Wanda
from layerwise.scoring.criterion import Criterion
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.results.selection import TRIAL
from layerwise.tasks.texts.calibrate_on import CalibrateOn
from layerwise.tasks.texts.documents import Role
from layerwise.tasks.texts.text_mix import MixSource, parse_mix

if TYPE_CHECKING:  # imports Prefect: the help of a command does without it
    from layerwise.tasks.allocate import AllocateSettings

# Maximum number of plans to try, by strategy. adaptive, auto: enough for a dozen betas on curves like those of the paper;
# two-parameter: as many again for the offset; projections: two rounds over the seven kinds of projections of a LLaMA.
# The paper's Bayesian search over all layers took about 1000 trials.
TRIALS: dict[str, int] = {
    "auto": 6,
    "adaptive": 6,
    "two-parameter": 12,
    "projections": 48,
    "bayesian": 64,
    "evolutionary": 64,
}
# Limits that catch typing errors, far above real uses: the longest context of a model is 10 million tokens; a search
# over layers took 1000 trials; torch accepts seeds of 63 bits.
MOST: dict[str, int] = {
    "calibration_windows": 1_000_000,
    "selection_windows": 1_000_000,
    "test_windows": 1_000_000,
    "seqlen": 2**24,
    "seed": 2**63 - 1,
    "recover_windows": 1_000_000,
    "trials": 10_000,
    "stop_after": 10_000,
}
FEW_PLANS = 3  # that are all scored by the strategy auto: it would try as many anyway
# Not in the settings of stored searches: left out where they have their defaults.
LATER_FIELDS = ("recover", "recover_windows", "criterion", "calibrate_on")
OVER_LAYERS = ("bayesian", "evolutionary")
PLAN_MAKERS = (*OVER_LAYERS, "projections")

# Number of windows for "auto" if the text is long enough: the calibration of the papers on Wanda and SparseGPT, and half
# of it for the selection. The built-in text has about 27 and 13 windows of 2048 tokens.
AUTO_WINDOWS: dict[Role, int] = {"calibration": 128, "selection": 64}


class Search(Settings):
    """Find the best common difference beta for one model and one overall sparsity, and export the pruned model."""

    essential: ClassVar[tuple[str, ...]] = (
        "model",
        "sparsity",
        "pruner",
        "recover",
        "calibration",
        "selection",
        "strategy",
        "export",
    )

    model: BareUrl = Field(
        description="Model to prune: a hub id (owner/name[@revision]), a folder, an fsspec URL of a folder (s3://, "
        "hf://, ...), a .gguf file, or demo (SmolLM2-135M-Instruct)."
    )
    sparsity: float = Field(
        gt=0, lt=1, description="Fraction of the weights of all decoder linears to remove, between 0 and 1."
    )
    pruner: PrunerChoice = Field(
        default=Wanda(),
        description="Method that chooses the weights to remove. wanda: by weight times input norm. magnitude: by weight. "
        "wanda_swaps: like wanda, refined by the correlations of the inputs. dsnot: like wanda (or sparsegpt's mask), refined by "
        "the means of the inputs. sparsegpt, alps: also correct the remaining weights.",
    )
    pattern: PatternText | None = Field(
        title="N:M pattern",
        default=None,
        description="Keep N of every M consecutive weights of each output: 2:4 or 4:8. With N:8 the allocator chooses N "
        "for every layer. Empty: no pattern.",
    )
    exclude: RegularExpression | None = Field(
        title="Linears to leave dense",
        default=None,
        description="Regular expression; linears whose name (LAYER.LINEAR, such as 0.mlp.down_proj) contains a match "
        "stay dense and do not count in the sparsity. Head and embeddings always stay dense. Empty: none.",
    )
    allocator: AllocatorChoice = Field(
        default=ATP(),
        description="Method that spreads the sparsity over the layers: atp, owl, alpha_pruning, dsa, dlp, lsa, global "
        "(one threshold on the pruner's scores over all layers), lamp (one threshold on layer-adaptive magnitudes), er, er_plus "
        "(by the shapes of the linears; need granularity linear), erf, power; or given, with a list of sparsities.",
    )
    granularity: Granularity = Field(
        title="Unit with its own sparsity",
        default="layer",
        description="Unit that gets its own sparsity. layer: every decoder layer. linear: every linear. expert: every "
        "expert of a mixture of experts, and the other linears of each layer together. linear and expert need an allocator "
        "that measures linears (owl, alpha_pruning, dsa, dlp, lsa, global, lamp); linear may also use their shapes (er, er_plus).",
    )
    offsets: tuple[Annotated[float, Field(gt=-1, lt=1)], ...] = Field(
        title="Offsets between attention and MLP",
        default=(),
        description="Offsets to try: sparsity of attention minus sparsity of the MLP, such as -0.1 and 0.1. 0 is always "
        "tried. Empty: 0 only.",
    )
    calibration_mode: Literal["dense", "sequential"] = Field(
        default="dense",
        description="Model that calibrates the pruning. dense: one capture of the dense model serves all betas. "
        "sequential: every beta calibrates each layer on its own pruned model, as the original Wanda code does; takes "
        "about three times as long.",
    )
    recover: RecoverChoice | None = Field(
        title="Recovery of the remaining weights",
        default=None,
        description="Fit the weights that remain after pruning to the dense model's outputs, layer by layer. refit: by a "
        "few conjugate-gradient steps, in every beta and in the chosen model. train: the same, and then train every layer "
        "of the chosen model by Adam, which takes several times as long. Empty: plain one-shot pruning, as in papers.",
    )
    recover_windows: int | None = Field(
        title="Calibration windows for recovery in the search",
        default=None,
        ge=2,
        description="Number of calibration windows on which every beta is recovered while the search compares them; fewer "
        "are faster. The chosen plan and the uniform plan are always recovered on all. Empty: all.",
    )
    calibration: BareUrl = Field(
        title="Calibration text",
        default="builtin",
        description="Text for calibration: wikitext2, c4 or ptb, as used in papers; hf:owner/name[/config][:split]; a "
        ".txt, .jsonl, .json or .parquet file, a folder of such files, or a pattern such as 'data/*.jsonl.gz' (path or "
        "URL); or builtin (the documentation in Python's pydoc_data.topics). Rows of messages, or of prompt and completion, "
        "are written by the model's chat template. A mix of texts: names separated by commas, file: before every path, and "
        "the number of windows after each text or none, such as c4:64,file:chat.jsonl:32,wikitext2:32 (none: equal shares).",
    )
    calibrate_on: CalibrateOn = Field(
        title="Tokens that calibration uses",
        default="all",
        description="Tokens of the calibration windows that input statistics, recovery and distillation use. all: every "
        "token. responses: the tokens that the model writes in conversations, and every token of plain texts in a mix.",
    )
    selection: BareUrl = Field(
        title="Selection text",
        default="builtin",
        description="Text on which beta is chosen; the same choices as for calibration, except a mix.",
    )
    criterion: Criterion = Field(
        title="Figure that the best plan minimises",
        default="perplexity",
        description="Figure on the selection text by which plans are compared, in every strategy. perplexity: of the "
        "pruned model. kl: KL divergence of the pruned model's distribution of the next token from the dense model's, mean "
        "over the tokens; perplexity is measured too.",
    )
    test: BareUrl | None = Field(
        title="Test text",
        default=None,
        description="Text for the final perplexity, used only once. Empty: another part of the selection text (the test "
        "split of a hub data set).",
    )
    calibration_windows: Annotated[int, Field(ge=1)] | Annotated[Literal["auto"], Field(title="auto")] = (
        Field(
            default="auto",
            description=f"Number of calibration windows. auto: {AUTO_WINDOWS['calibration']}, or all windows of its part of "
            "the text if there are fewer. A number: exactly that many; a text that is too short is refused. With a mix that has "
            "numbers of windows: their sum.",
        )
    )
    selection_windows: (
        Annotated[int, Field(ge=2)] | Annotated[Literal["auto"], Field(title="auto")] | None
    ) = Field(
        default="auto",
        description=f"Number of selection windows. auto: {AUTO_WINDOWS['selection']}, or all windows of its part of the "
        "text if there are fewer. A number: exactly that many. Empty: all windows.",
    )
    test_windows: int | None = Field(
        default=None, ge=1, description="Number of test windows. Empty: all windows of the text."
    )
    seqlen: int = Field(
        title="Window length in tokens", default=2048, ge=2, description="Length of every window, in tokens."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random choice of calibration windows.")
    betas: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="Betas to try, in addition to 0 (uniform). For an allocator other than atp: its strengths (spread of "
        "owl, dsa and power, alpha of dlp, beta of lsa, epsilon of alpha_pruning, log_amplification of erf, strength of global, "
        "lamp, er and er_plus). Empty: the "
        "grid of beta_step; for another allocator its default strength.",
    )
    beta_count: int | None = Field(
        default=None,
        ge=1,
        description="Number of betas, spread evenly over the legal range. Empty: the grid of beta_step.",
    )
    beta_step: float | None = Field(
        default=None,
        gt=0,
        description=f"Step of the grid of betas within the legal range. Empty: {BETA_STEP:g}, as in the paper.",
    )
    strategy: StrategyName = Field(
        default="auto",
        description="Method that searches the plans. auto: narrow down the best beta on the first 8 selection windows, "
        "then score uniform and the best two plans on all windows, or three if the first windows do not tell the third "
        "from the best; betas that you list are all scored on all windows. grid: score every beta on all selection windows. "
        "race: score the betas in rounds of windows, and stop those that are clearly worse (paired t above 4, or worse on every window). "
        "adaptive: narrow down the minimum of the U-shaped curve with a few betas. two-parameter: the same for beta and "
        "offset. projections: first beta, then a difference for every kind of linear (q_proj, ..., down_proj). bayesian "
        "(needs Optuna), evolutionary: vary the sparsities of all layers, starting from uniform and the given betas.",
    )
    trials: int | None = Field(
        title="Maximum number of plans",
        default=None,
        ge=2,
        description="Maximum number of plans to try, including uniform, for a strategy that does not try all plans. "
        f"Empty: {', '.join(f'{count} ({name})' for name, count in TRIALS.items())}.",
    )
    stop_after: int | None = Field(
        title="Number of plans to stop after",
        default=None,
        ge=1,
        description="Stop after this number of plans has been scored, for a strategy that does not try all plans. A "
        "search that reached its time limit records its number of plans here, so that it can be repeated exactly. "
        "Empty: no limit.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        title="Dtype of the computation",
        default="auto",
        description="Dtype that the model computes in: bfloat16, float16, float32, or auto for the dtype of the checkpoint.",
    )
    export: bool = Field(
        title="Write the pruned model",
        default=True,
        description="Write the checkpoint that is pruned by the best plan. false: only report the plan.",
    )
    retain: Literal["none", "sampled", "all"] = Field(
        title="Hidden states to keep",
        default="none",
        description="Windows whose hidden states of the dense model are kept in the store at every layer boundary: none, "
        "sampled (four of each text) or all.",
    )

    @model_serializer(mode="wrap")
    def _without_unused_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later fields that have their defaults: searches of older versions do not have them."""
        values: dict[str, Any] = serialize(self)
        return {
            name: value
            for name, value in values.items()
            if name not in LATER_FIELDS or value != type(self).model_fields[name].default
        }

    @field_validator("calibration")
    @classmethod
    def _text_or_mix(cls, value: str) -> str:
        parse_mix(value)
        return value

    @field_validator(*MOST)
    @classmethod
    def _at_most(cls, value: int | str | None, field: ValidationInfo) -> int | str | None:
        most = MOST[str(field.field_name)]
        if isinstance(value, int) and value > most:
            raise PydanticCustomError("too_many", "must be {most} or less", {"most": most})
        return value

    @model_validator(mode="after")
    def _check_combination(self) -> "Search":
        _ = self.allocation
        self._check_mix()
        for name in ("trials", "stop_after"):
            if getattr(self, name) is not None and self.tries_all:
                listed = " and listed betas" if self.strategy in TRIALS else ""
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but the strategy {self.strategy}{listed} tries all plans. Leave "
                    f"{name} empty, set trials, or set strategy to {', '.join(TRIALS)}."
                )
        if self.strategy == "projections" and self.pattern is not None:
            raise ValueError(
                f"strategy is projections, and pattern is {self.pattern}, whose levels are further apart than the "
                "differences that this strategy tries. Leave out the pattern, or use grid, race or two-parameter."
            )
        if self.makes_plans and (self.granularity != "layer" or self._is_fixed_pattern):
            raise ValueError(
                f"strategy is {self.strategy}, which chooses a sparsity for every layer, but pattern is {self.pattern} "
                f"and granularity is {self.granularity}. Use N:8 or no pattern, and granularity layer."
            )
        needs_offsets = self.strategy == "two-parameter"
        if bool(self.offsets) != needs_offsets and self.strategy in TRIALS and self.strategy != "auto":
            raise ValueError(
                f"strategy is {self.strategy}, and there are {len(self.offsets)} offsets. The strategy two-parameter needs "
                "offsets; auto, grid and race accept them; leave them out for the others."
            )
        if self.recover_windows is not None and self.recover is None:
            raise ValueError(
                f"recover_windows is {self.recover_windows}, but there is no recovery. Set recover, or leave "
                "recover_windows empty."
            )
        if self.recover is not None and self.calibration_mode == "sequential":
            raise ValueError(
                f"recover is {self.recover.method}, which chooses the weights to remove by the dense model's calibration, "
                "but calibration_mode is sequential. Set calibration_mode to dense."
            )
        if self.recover is not None and self.strategy == "race":
            raise ValueError(
                f"recover is {self.recover.method}, and strategy is race, whose every round would recover all plans again. "
                "Use grid or adaptive."
            )
        if self.calibration_mode == "sequential" and not isinstance(self.pruner, MaskPruner):
            raise ValueError(
                f"the pruner {self.pruner.method} is calibrated on the inputs of the dense model: one set of Gram matrices "
                "serves all plans and the export. Set calibration_mode to dense, or use wanda or magnitude."
            )
        return self

    def _check_mix(self) -> None:
        counts, asked = [source.windows for source in self.mix], self.calibration_windows
        total = sum(count or 0 for count in counts)
        if total and asked not in ("auto", total):
            raise ValueError(
                f"calibration_windows is {asked}, but the windows of the calibration mix ({self.calibration}) add up to "
                f"{total}. Leave calibration_windows out, correct it, or leave the numbers out of the mix for equal shares."
            )
        if total > MOST["calibration_windows"]:
            raise ValueError(
                f"the windows of the calibration mix ({self.calibration}) add up to {total}, more than "
                f"{MOST['calibration_windows']}. Give fewer."
            )
        if isinstance(asked, int) and asked < len(counts):
            raise ValueError(
                f"calibration_windows is {asked}, which is too few for the {len(counts)} texts of the calibration mix "
                f"({self.calibration}). Use {len(counts)} or more."
            )

    @property
    def mix(self) -> tuple[MixSource, ...]:
        """Texts of the calibration mix; empty if the calibration has one text."""
        return parse_mix(self.calibration)

    @property
    def allocation(self) -> "AllocateSettings":
        """Settings of the plans that may be tried."""
        from layerwise.tasks.allocate import AllocateSettings

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
            self.granularity,
            self.pattern,
        )

    @property
    def parameter(self) -> str:
        """Name of the parameter that distinguishes the plans, such as "beta"."""
        return TRIAL if self.makes_plans else parameter_name(self.allocator)

    @property
    def allocation_title(self) -> str:
        """Name of the allocation in tables: the allocator, and what is searched in addition to its strength."""
        searched = "offset" if self.offsets else self.strategy if self.makes_plans else None
        parts = [self.allocator.method] if searched is None else [self.allocator.method, searched]
        return "+".join(parts) + ("" if self.granularity == "layer" else f" by {self.granularity}")

    @property
    def makes_plans(self) -> bool:
        """Whether the strategy makes its own plans instead of trying those of the allocator."""
        return self.strategy in PLAN_MAKERS

    def trials_of(self, plans: int) -> int:
        """Return the maximum number of plans to try.

        Args:
            plans: number of plans of the allocator.
        """
        name = self.strategy_for(plans)
        most = self.trials or TRIALS.get("two-parameter" if self.offsets and name == "auto" else name, plans)
        return most if self.makes_plans else min(most, plans)

    @property
    def tries_all(self) -> bool:
        """Whether the strategy tries all plans, however many they are."""
        listed = self.strategy == "auto" and self.betas is not None and self.trials is None
        return listed or self.strategy not in TRIALS

    def strategy_for(self, plans: int) -> StrategyName:
        """Return the strategy; where ``auto`` scores all plans on the same windows, the one that does the same.

        Args:
            plans: number of plans of the allocator.
        """
        if self.strategy != "auto":
            return self.strategy
        if self.tries_all or (plans <= FEW_PLANS and self.stop_after is None):
            return "grid"
        if self.recover is not None:  # a second round would recover its plans again
            return "two-parameter" if self.offsets else "adaptive"
        return "auto"

    @property
    def _is_fixed_pattern(self) -> bool:
        return self.pattern is not None and Pattern.parse(self.pattern).kept is not None

    @property
    def needs_grams(self) -> bool:
        """Whether the search captures second moments of the linears' inputs."""
        from layerwise.tasks.measure import needs_grams

        return not isinstance(self.pruner, MaskPruner) or needs_grams(self.allocator)

    def windows_to_recover_on(self, calibration: int) -> int:
        """Return the number of calibration windows on which plans are recovered while they are compared.

        Args:
            calibration: number of all calibration windows.
        """
        return calibration if self.recover_windows is None else min(self.recover_windows, calibration)

    @property
    def title(self) -> str:
        """Short name of the search for lists of runs: model and sparsity."""
        return f"{title_of(self.model)} at {self.sparsity:g}"

    def dtype_for(self, stored: str) -> str:
        """Return the dtype of the computation for a checkpoint that is stored in the dtype ``stored``."""
        return stored if self.dtype == "auto" else self.dtype

    def pruning(self, dtype: str) -> PruneSettings:
        """Return the settings that lanes are pruned with, for a computation in ``dtype``."""
        return PruneSettings(
            self.sparsity,
            self.pruner,
            self.calibration_mode,
            dtype,
            self.pattern,
            self.exclude,
            self.recover,
            self.calibrate_on,
        )
