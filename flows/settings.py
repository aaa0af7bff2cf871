"""What a user can set: the form in Prefect's UI, the options of the command line, the parameters of a
deployment.

``Search`` decides the result and is part of the artifacts' keys; ``Runtime`` says where and how, and is not.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from layerwise.allocation import ATP, BETA_STEP
from layerwise.allocators import Given
from layerwise.alpha_pruning import AlphaPruning
from layerwise.depth_schedules import Erf, Power
from layerwise.dlp import DLP
from layerwise.dsa import DSA
from layerwise.layer_pruning import MaskPruner
from layerwise.lsa import LSA
from layerwise.magnitude import Magnitude
from layerwise.owl import OWL
from layerwise.patterns import Pattern
from layerwise.sparsegpt import SparseGPT
from layerwise.wanda import Wanda
from tasks.allocate import AllocateSettings
from tasks.execution import Execution
from tasks.lane_group import PruneSettings
from tasks.measure import needs_grams
from tasks.run_names import title_of
from tasks.sources import holds_credentials


def _method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _bare_url(value: Any) -> Any:
    """Refuse credentials in a URL before it becomes a parameter of a flow run, a file of the store or a log line."""
    if isinstance(value, str) and holds_credentials(value):
        raise PydanticCustomError(
            "credentials",
            "the URL holds credentials (not shown), which would end up in logs and reports; put them into the "
            "environment or the fsspec configuration and give the bare URL",
        )
    return value


FAN_OUT = re.compile(r"^(local|processes:[1-9][0-9]{0,2}|pool:\S.*)$")


def _known_place(value: str) -> str:
    if not FAN_OUT.match(value):
        raise PydanticCustomError(
            "fan_out", "give local, processes:N (N from 1 to 999), or pool:NAME with the name of a work pool"
        )
    return value


# The pattern is for Prefect's server, which then stores no parameters with a password in them.
BareUrl = Annotated[
    str, BeforeValidator(_bare_url), Field(min_length=1, json_schema_extra={"pattern": r"^(?!.*://[^/]*@)"})
]
Strategy = Literal["grid", "race", "adaptive", "two-parameter"]
# Enough for a dozen betas on curves like those of the paper; and as many again for the offset.
TRIALS: dict[str, int] = {"adaptive": 6, "two-parameter": 12}
PrunerChoice = Annotated[
    Wanda | Magnitude | SparseGPT, Field(discriminator="method"), BeforeValidator(_method)
]
AllocatorChoice = Annotated[
    ATP | OWL | AlphaPruning | DSA | DLP | LSA | Erf | Power | Given,
    Field(discriminator="method"),
    BeforeValidator(_method),
]


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise PydanticCustomError(
            "regex", "is no regular expression ({problem})", {"problem": str(error)}
        ) from error
    return value


def _pattern(value: str) -> str:
    Pattern.parse(value)
    return value


class _Settings(BaseModel):
    # An error must not show what was given: it might be a URL with a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Search(_Settings):
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
        description="How the weights to remove are chosen: wanda, magnitude; or sparsegpt, which corrects the others.",
    )
    pattern: Annotated[str, AfterValidator(_pattern)] | None = Field(
        title="N:M pattern",
        default=None,
        description="N of M consecutive weights of every output stay: 2:4, 4:8; or N:8, where the allocator gives "
        "every layer a N of its own. Empty: none.",
    )
    exclude: Annotated[str, AfterValidator(_regular_expression)] | None = Field(
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
        description="Text for calibration: hf:owner/name[/config][:split], a .txt, .jsonl or .parquet file "
        "(path or URL), or 'builtin' (the documentation in Python's pydoc_data.topics).",
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
    calibration_windows: int = Field(default=128, ge=1, description="Number of calibration windows.")
    selection_windows: int | None = Field(
        default=64, ge=2, description="Number of selection windows; empty: all that the text gives."
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
        "of the U-shaped curve down, with a handful of them. two-parameter: the same for beta and offset.",
    )
    trials: int | None = Field(
        title="Most plans that are tried",
        default=None,
        ge=2,
        description="With a strategy that does not try all: at most so many, uniform among them; empty: "
        f"{' or '.join(f'{count} ({name})' for name, count in TRIALS.items())}.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        title="Dtype of the computation",
        default="auto",
        description="In which the model computes; auto: the checkpoint's own.",
    )
    retain: Literal["none", "sampled", "all"] = Field(
        title="Hidden states to keep",
        default="none",
        description="Windows whose hidden states are kept at every layer boundary of the dense model.",
    )

    @model_validator(mode="after")
    def _betas_given_once(self) -> "Search":
        _ = self.allocation
        if self.trials is not None and self.strategy not in TRIALS:
            raise ValueError(
                f"trials is {self.trials}, but the strategy {self.strategy} tries all plans. Leave trials empty, or "
                f"set strategy to {' or '.join(TRIALS)}."
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
        step = self.beta_step
        fixed = self.pattern is not None and Pattern.parse(self.pattern).kept is not None
        searched = isinstance(self.allocator, ATP) and not fixed
        if searched and step is None and self.betas is None and self.beta_count is None:
            step = BETA_STEP
        return AllocateSettings(
            self.sparsity,
            self.betas,
            self.beta_count,
            step,
            self.allocator,
            self.offsets,
            self.granularity == "linear",
            self.pattern,
        )

    @property
    def needs_grams(self) -> bool:
        """Whether second moments of the linears' inputs are captured."""
        return not isinstance(self.pruner, MaskPruner) or needs_grams(self.allocator)

    @property
    def title(self) -> str:
        """The search in some words, for lists of runs: the model, and the sparsity."""
        return f"{title_of(self.model)} at {self.sparsity:g}"

    def pruning(self, dtype: str) -> PruneSettings:
        """How lanes are pruned, with the dtype that ``auto`` stands for."""
        return PruneSettings(
            self.sparsity, self.pruner, self.calibration_mode, dtype, self.pattern, self.exclude
        )


class Runtime(_Settings):
    """Where and how a search runs; changes nothing in its result."""

    store: BareUrl = Field(description="Folder or fsspec URL (s3://bucket/prefix) for all artifacts.")
    device: str = Field(
        default="auto",
        description="Torch device, e.g. cuda, cuda:1 or cpu; auto: cuda if there is one, else cpu.",
    )
    hidden_states_gib: float = Field(
        title="Memory for hidden states in GiB",
        default=4,
        ge=0,
        allow_inf_nan=False,
        description="Memory for hidden states, in GiB; what goes beyond lies in files.",
    )
    scratch: Path | None = Field(
        title="Scratch folder",
        default=None,
        description="Folder for hidden states beyond that; empty: the system's temporary folder.",
    )
    boundary_minutes: float = Field(
        title="Minutes between resume points",
        default=5,
        gt=0,
        description="Commit a resume point at the first layer after this time, in minutes.",
    )
    boundary_layers: int | None = Field(
        title="Layers between resume points",
        default=None,
        ge=1,
        description="Also commit one after so many layers; empty: by time only.",
    )
    fan_out: Annotated[str, AfterValidator(_known_place)] = Field(
        title="Fan-out",
        default="local",
        json_schema_extra={"pattern": FAN_OUT.pattern},
        description="Who computes. local: this process. processes:N: N processes on this machine, one for each of its "
        "devices. pool:NAME: the workers of a Prefect work pool, while this process only waits.",
    )
    groups: int | None = Field(
        title="Groups of betas",
        default=None,
        ge=1,
        description="In how many groups the betas are spread, each of which reads the model once; empty: as many as "
        "the workers and their memory for hidden states ask for.",
    )

    @property
    def processes(self) -> int | None:
        """On how many processes of this machine the work is spread; None if it is not."""
        kind, _, count = self.fan_out.partition(":")
        return int(count) if kind == "processes" else None

    @property
    def pool(self) -> str | None:
        """Over which work pool the work is spread; None if it is not."""
        kind, _, name = self.fan_out.partition(":")
        return name if kind == "pool" else None

    @property
    def hidden_states_bytes(self) -> int:
        """Memory for hidden states."""
        return int(self.hidden_states_gib * 2**30)

    @model_validator(mode="after")
    def _groups_for_whom(self) -> "Runtime":
        if self.groups is not None and self.fan_out == "local":
            raise ValueError(
                f"groups is {self.groups}, but fan_out is local: one process advances all betas in one group. "
                "Leave groups empty, or set fan_out to processes:N or pool:NAME."
            )
        return self

    def execution(self) -> Execution:
        """The settings as the tasks take them.

        Raises:
            ValueError: a device on which torch cannot compute here.
        """
        import torch

        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        device = automatic if self.device == "auto" else self.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"torch cannot compute on device {device!r} here ({str(error).splitlines()[0]}). "
                "Use cpu, or install torch for this machine's accelerator."
            ) from error
        optional = {} if self.scratch is None else {"scratch": self.scratch}
        return Execution(
            device=device,
            hidden_states_bytes=self.hidden_states_bytes,
            boundary_layers=self.boundary_layers,
            boundary_seconds=60 * self.boundary_minutes,
            **optional,
        )
