"""Where and how a search runs: no part of any key."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from layerwise.flows.setting_types import BareUrl, Settings
from layerwise.tasks.lanes.grouping import MOST_PLANS
from layerwise.tasks.running.execution import Execution

FAN_OUT = re.compile(r"^(local|processes:[1-9][0-9]{0,2}|pool:\S.*)$")


def _known_place(value: str) -> str:
    if not FAN_OUT.match(value):
        raise PydanticCustomError(
            "fan_out", "give local, processes:N (N from 1 to 999), or pool:NAME with the name of a work pool"
        )
    return value


class Runtime(Settings):
    """Where and how a search runs; changes nothing in its result, but that minutes end it earlier."""

    store: BareUrl = Field(description="Folder or fsspec URL (s3://bucket/prefix) for all artifacts.")
    device: str = Field(
        default="auto",
        description="Torch device, e.g. cuda, cuda:1 or cpu; auto: cuda if there is one, else cpu.",
    )
    hidden_states_gib: float = Field(
        title="Memory for hidden states in GiB",
        default=4,
        ge=0,
        le=1_000_000,
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
        le=MOST_PLANS,
        description="In how many groups the betas are spread, each of which reads the model once; empty: as many as "
        "the workers and their memory for hidden states ask for.",
    )
    minutes: float | None = Field(
        title="Minutes for the search",
        default=None,
        gt=0,
        description="With a strategy that does not try all plans: begin no more of them after so long a run, and "
        "choose from those that were tried; the same search again goes on from there. Empty: no limit.",
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

        # NVIDIA's containers allow TF32, whose 10 bits would decide which weights go, and differ from other machines'.
        torch.set_float32_matmul_precision("highest")
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
