"""Runtime settings of flows: store, device, memory, fan-out. They are not part of any key."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from layerwise.flows.setting_types import BareUrl, Settings
from layerwise.storage.existing_store import existing_store
from layerwise.storage.layer_cache import LayerCache
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import MOST_PLANS
from layerwise.tasks.running.execution import Execution

FAN_OUT = re.compile(r"^(local|processes:[1-9][0-9]{0,2}|pool:\S.*)$")


def _known_place(value: str) -> str:
    if not FAN_OUT.match(value):
        raise PydanticCustomError(
            "fan_out", "give local, processes:N (N from 1 to 999), or pool:NAME with the name of a work pool"
        )
    return value


class Runtime(Settings):
    """Store, device and memory of a flow. They do not change its result."""

    essential: ClassVar[tuple[str, ...]] = ("store", "device")

    # Validate the runtime of another flow again, by the fields of this one.
    model_config = {**Settings.model_config, "revalidate_instances": "subclass-instances"}

    store: BareUrl = Field(description="Folder or fsspec URL (s3://bucket/prefix) for all artifacts.")
    device: str = Field(
        default="auto",
        description="Torch device, such as cuda, cuda:1 or cpu. auto: cuda if there is one, else cpu.",
    )
    hidden_states_gib: float = Field(
        title="Memory for hidden states in GiB",
        default=4,
        ge=0,
        le=1_000_000,
        description="Memory for hidden states, in GiB. Hidden states beyond it are kept in files.",
    )
    device_memory_gib: float | None = Field(
        title="Device memory for hidden states in GiB",
        default=None,
        ge=0,
        le=1_000_000,
        description="Memory of the device for hidden states, in GiB, if the device is not the CPU. Those beyond it cross to "
        "this machine and back at every layer. Empty: half of the memory that is free on the device.",
    )
    scratch: Path | None = Field(
        title="Scratch folder",
        default=None,
        description="Folder for hidden states that do not fit into memory; empty: the system's temporary folder.",
    )
    boundary_minutes: float = Field(
        title="Minutes between resume points",
        default=5,
        gt=0,
        description="Commit a resume point at the first layer after this time, in minutes. After a slow commit, the next "
        "one waits at least 20 times as long as it took.",
    )
    boundary_layers: int | None = Field(
        title="Layers between resume points",
        default=None,
        ge=1,
        description="Also commit a resume point after this number of layers; empty: by time only.",
    )

    layer_cache: Path | None = Field(
        title="Folder of the layer cache",
        default=None,
        description="Folder on a fast local disk in which layers that come from a remote store or folder are kept, so that "
        "they are read from there once, and not in every stage. Empty: no cache.",
    )
    layer_cache_gib: float | None = Field(
        title="Size of the layer cache in GiB",
        default=None,
        gt=0,
        le=1_000_000,
        description="Maximum size of the layer cache, in GiB. Empty: 90 % of the free space of its disk.",
    )

    @property
    def hidden_states_bytes(self) -> int:
        """Memory for hidden states, in bytes."""
        return int(self.hidden_states_gib * 2**30)

    @field_validator("layer_cache", mode="before")
    @classmethod
    def _a_local_folder(cls, value: Any) -> Any:
        if isinstance(value, str) and (not value.strip() or "://" in value):
            kind = "a URL" if value.strip() else "empty"  # a URL may hold credentials
            raise ValueError(
                f"layer_cache is {kind}; give a folder on a local disk, such as /nvme/layers, or leave it out."
            )
        return value

    @model_validator(mode="after")
    def _size_needs_layer_cache(self) -> "Runtime":
        if self.layer_cache_gib is not None and self.layer_cache is None:
            raise ValueError(
                f"layer_cache_gib is {self.layer_cache_gib:g}, but there is no layer_cache. Give its folder, or leave "
                "layer_cache_gib empty."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_another_flow(cls, values: Any) -> Any:
        """Accept the runtime of another flow if the fields that this flow lacks have their defaults.

        Deployments and clients of older versions send all fields to every flow.
        """
        if isinstance(values, Runtime):
            values = dict(values)
        if not isinstance(values, dict):
            return values
        others = {
            name: field for name, field in SearchRuntime.model_fields.items() if name not in cls.model_fields
        }
        for name, field in others.items():
            if name in values and values[name] != field.default:
                raise ValueError(
                    f"{name} is {values[name]}, which is not a setting of this flow. Leave {name} out."
                )
        return {name: value for name, value in values.items() if name not in others}

    @property
    def device_name(self) -> str:
        """Torch device, such as cuda or cpu: "auto" is resolved. It may be missing on this machine."""
        import torch

        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return automatic if self.device == "auto" else self.device

    def open_store(self) -> ArtifactStore:
        """Open the store, with the layer cache.

        Raises:
            OSError: the folder of the cache cannot be written.
        """
        return ArtifactStore(self.store, self._open_layer_cache())

    def open_existing_store(self) -> ArtifactStore:
        """Open a store that must exist, with the layer cache.

        Raises:
            OSError: the folder of the cache cannot be written; or see ``existing_store``.
        """
        return existing_store(self.store, self._open_layer_cache())

    def _open_layer_cache(self) -> LayerCache | None:
        if self.layer_cache is None:
            return None
        size = None if self.layer_cache_gib is None else int(self.layer_cache_gib * 2**30)
        return LayerCache(self.layer_cache, size)

    def execution(self) -> Execution:
        """Return the settings as the tasks take them.

        Raises:
            ValueError: torch cannot compute on this device here.
        """
        import torch

        # NVIDIA's containers allow TF32, whose 10 bits would decide which weights go, and differ from other machines'.
        torch.set_float32_matmul_precision("highest")
        device = self.device_name
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"torch cannot compute on device {device!r} here ({str(error).splitlines()[0]}). "
                "Use cpu, or install torch for this machine's accelerator."
            ) from error
        optional = {} if self.scratch is None else {"scratch": self.scratch}
        on_device = None if self.device_memory_gib is None else int(self.device_memory_gib * 2**30)
        return Execution(
            device=device,
            hidden_states_bytes=self.hidden_states_bytes,
            device_states_bytes=on_device,
            boundary_layers=self.boundary_layers,
            boundary_seconds=60 * self.boundary_minutes,
            **optional,
        )


class FanOutRuntime(Runtime):
    """Runtime of a flow whose work may be spread over processes. It does not change the result."""

    essential: ClassVar[tuple[str, ...]] = ("store", "device", "fan_out", "track")

    fan_out: Annotated[str, AfterValidator(_known_place)] = Field(
        title="Fan-out",
        default="local",
        json_schema_extra={"pattern": FAN_OUT.pattern},
        description="Where the work is done. local: in this process. processes:N: in N processes on this machine, one "
        "for each of its devices. pool:NAME: by the workers of a Prefect work pool, while this process only waits.",
    )
    groups: int | None = Field(
        title="Groups of betas",
        default=None,
        ge=1,
        le=MOST_PLANS,
        description="Number of groups that the betas are spread over; each group reads the model once. Empty: as many "
        "as keep the workers busy and their hidden states in memory.",
    )

    track: Literal["none", "mlflow", "wandb"] = Field(
        title="Tracking service",
        default="none",
        description="Service that every search is sent to: settings, perplexities, report. mlflow (MLFLOW_TRACKING_URI), wandb, or "
        "none. A service that fails is a warning and does not end the search.",
    )

    @property
    def processes(self) -> int | None:
        """Number of processes on this machine that share the work; None if it is not spread that way."""
        kind, _, count = self.fan_out.partition(":")
        return int(count) if kind == "processes" else None

    @property
    def pool(self) -> str | None:
        """Name of the work pool that shares the work; None if it is not spread that way."""
        kind, _, name = self.fan_out.partition(":")
        return name if kind == "pool" else None

    @property
    def alone(self) -> Runtime:
        """Runtime of one process that does a part of the work."""
        return Runtime(**{name: getattr(self, name) for name in Runtime.model_fields})

    @model_validator(mode="after")
    def _groups_need_processes(self) -> "FanOutRuntime":
        if self.groups is not None and self.fan_out == "local":
            raise ValueError(
                f"groups is {self.groups}, but fan_out is local: one process advances all betas in one group. "
                "Leave groups empty, or set fan_out to processes:N or pool:NAME."
            )
        return self


class SearchRuntime(FanOutRuntime):
    """Runtime of a search. It does not change the result, except that a time limit may end the search earlier."""

    essential: ClassVar[tuple[str, ...]] = ("store", "device", "fan_out", "minutes", "track")

    minutes: float | None = Field(
        title="Minutes for the search",
        default=None,
        gt=0,
        description="Time limit in minutes, for a strategy that does not try all plans: no further plans are started "
        "after it, and the best plan so far is chosen. The same search continues from there. Empty: no limit.",
    )
