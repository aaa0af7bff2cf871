"""Diagnosis of a set-up: facts of the machine, the packages and the store in; lines and problems out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.display.byte_size import size, size_in
from layerwise.display.duration import duration
from layerwise.flows.orchestration.chosen_server import ChosenServer
from layerwise.flows.orchestration.embedded_server import DATABASE_BYTES
from layerwise.storage.files.storage_rates import PROBED, StorageRates
from layerwise.tasks.models.dtype_speed import TOLERABLE
from layerwise.tasks.running.machine import Cpu, Disk, Gpus, Memory

if TYPE_CHECKING:  # it imports Prefect, which fails if Prefect refuses its settings
    from layerwise.flows.plan import Plan

Line = tuple[str, str]  # name and value
# Stages of a plan, by the beginning of their names; export and test share one pass.
STAGES = {
    "import": ("import",),
    "capture": ("capture", "dense_states"),
    "lanes": ("branch",),
    "export and test": ("export", "evaluate"),
}


@dataclass(frozen=True)
class Problem:
    """A problem of the set-up, and what to do.

    Attributes:
        stops: whether a search cannot run, or would not run on the intended device. Otherwise it is a warning.
    """

    text: str
    stops: bool = False


@dataclass(frozen=True)
class Kernel:
    """The compiled sparse kernel.

    Attributes:
        level: its instruction set; None if it cannot be used.
        reason: why it cannot be used.
        advice: how to build it.
    """

    level: str | None
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Hub:
    """Settings of the Hugging Face Hub."""

    home: str
    is_offline: bool
    has_token: bool


@dataclass(frozen=True)
class Store:
    """The store of ``--store``.

    Attributes:
        place: its folder or URL, without credentials.
        server: URL of the server of a remote store; "" on a local disk.
        disk: disk of a local store; None if it is remote.
        rates: None if it cannot be used.
        problem: reason why it cannot be used.
    """

    place: str
    server: str = ""
    disk: Disk | None = None
    rates: StorageRates | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Facts of a set-up.

    Attributes:
        versions: versions of the packages and of Python, by name.
        device: device that a search uses by default.
        slower: how many times longer a matrix product takes on it in bfloat16 than in float32; None if it failed.
        refusal: why torch cannot compute on the device; "" if it can.
        omp_threads: value of OMP_NUM_THREADS; None if it is not set.
        scratch: default folder of hidden states that exceed the memory for them.
        server: Prefect's server.
        home: disk of the embedded server's folder; None if that server is not used.
        store: None without ``--store``.
    """

    versions: Mapping[str, str]
    cpu: Cpu
    device: str
    slower: float | None
    omp_threads: str | None
    memory: Memory
    gpus: Gpus
    kernel: Kernel
    scratch: Disk
    server: ChosenServer
    home: Disk | None
    hub: Hub
    refusal: str = ""
    store: Store | None = None


def lines_of(setup: Setup) -> Iterator[Line]:
    """Yield what the machine and its set-up have."""
    packages = (f"{name} {version}" for name, version in setup.versions.items() if name != "torch")
    yield "versions", ", ".join(packages)
    yield "torch", f"{setup.versions['torch']}, built for {setup.gpus.build}"
    yield "CPU", f"{setup.cpu.name}: {', '.join(setup.cpu.instructions) or 'no AVX2'}"
    omp = "is not set" if setup.omp_threads is None else f"is {setup.omp_threads}"
    threads = f"threads of torch: {setup.cpu.threads} (OMP_NUM_THREADS {omp})"
    yield "cores", f"{setup.cpu.usable:g} usable of {setup.cpu.cores}; {threads}"
    if setup.slower is not None:
        times = f"takes {setup.slower:.2g} times as long as in float32"
        yield "bfloat16", f"a matrix product {times} ({setup.device})"
    limited = " (limit of the control group)" if setup.memory.is_limited else ""
    yield "memory", f"{_gib(setup.memory.available)} available of {_gib(setup.memory.total)}{limited}"
    yield "GPUs", _gpus_in_one_line(setup.gpus)
    yield "sparse kernel", setup.kernel.level or "not available"
    yield "scratch", f"{setup.scratch.folder}: {size(setup.scratch.free)} free ({setup.scratch.kind})"
    yield "Prefect", _server_in_one_line(setup.server, setup.home)
    offline = "offline (HF_HUB_OFFLINE)" if setup.hub.is_offline else "online"
    yield "hub", f"{offline}, {'with a' if setup.hub.has_token else 'no'} token, cache in {setup.hub.home}"
    if setup.store is not None:
        yield from _lines_of_store(setup.store)


def problems_of(setup: Setup) -> Iterator[Problem]:
    """Yield what is wrong with a set-up, and what to do."""
    if setup.store is not None and setup.store.problem:
        yield Problem(f"the store cannot be used: {setup.store.problem}", stops=True)
    if setup.server.problem:
        yield Problem(setup.server.problem, stops=True)
    if setup.home is not None:
        setting = "XDG_CACHE_HOME" if setup.server.home_is_ours else "PREFECT_HOME"
        yield from _problems_of_home(setup.home, setting)
    yield from _problems_of_gpus(setup.gpus)
    if setup.refusal:
        yield Problem(
            f"torch {setup.versions['torch']} cannot compute on {setup.device} ({setup.refusal}). Install torch for this "
            "GPU, or use --device cpu.",
            stops=True,
        )
    if not setup.scratch.is_writable:
        yield Problem(
            f"the temporary folder {setup.scratch.folder} cannot be written: set TMPDIR, or use --scratch.",
            stops=True,
        )
    if setup.kernel.level is None:
        yield Problem(
            f"the sparse kernel cannot be used ({setup.kernel.reason}): ranking takes four times as long, and "
            f"compressed models do not run faster than dense ones. {setup.kernel.advice}"
        )
    if setup.slower is not None and setup.slower > TOLERABLE:
        yield Problem(
            f"bfloat16 is {setup.slower:.0f} times slower than float32 on {setup.device}: give --dtype float32 for a "
            "model that is stored in bfloat16."
        )
    if setup.cpu.threads > max(setup.cpu.usable, 1):
        yield Problem(
            f"torch uses {setup.cpu.threads} threads on {setup.cpu.usable:g} usable cores: set "
            f"OMP_NUM_THREADS={max(int(setup.cpu.usable), 1)}."
        )
    elif setup.omp_threads is not None and 2 * setup.cpu.threads < setup.cpu.usable:
        yield Problem(
            f"torch uses {setup.cpu.threads} of {setup.cpu.usable:g} usable cores, because OMP_NUM_THREADS is "
            f"{setup.omp_threads}: unset it, unless other processes use the rest."
        )


def lines_of_model(plan: "Plan", store: Store | None) -> Iterator[Line]:
    """Yield what a search with the default settings and sparsity 0.5 needs for a model.

    Args:
        store: the store that the plan is for; None if it is for an empty one on the disk of the scratch folder.
    """
    layers = f"{len(plan.layer_bytes)} decoder layers"
    yield "model", f"{layers}, {size(plan.weights)}; the largest layer {size(max(plan.layer_bytes))}"
    needs = [f"memory {size(sum(plan.memory.values()))}"]
    if plan.device_memory:
        needs.append(f"memory of {plan.device} {size(sum(plan.device_memory.values()))}")
    if plan.scratch:
        needs.append(f"scratch files {size(plan.scratch)}")
    yield "search needs", ", ".join([*needs, f"space in the store {size(_written(plan)) or '0 B'}"])
    if plan.measuring is not None:
        parts = [f"{name} {_time_of(plan, beginnings)}" for name, beginnings in STAGES.items()]
        where = plan.device if store is not None else f"{plan.device}; store on the scratch disk"
        yield "takes", f"about {duration(plan.seconds)} ({where}): {', '.join(parts)}"
    if store is not None and store.disk is None and store.rates is not None:
        seconds = _written(plan) / store.rates.written
        yield "upload", f"{duration(seconds)} more to write into the store, at its rate"


def problems_of_model(plan: "Plan", setup: Setup) -> Iterator[Problem]:
    """Yield what stops the search of ``lines_of_model`` on this machine."""
    fewer = "Use fewer windows or betas, a smaller --hidden-states-gib, or another machine"
    gpu = setup.gpus.usable[0] if setup.gpus.usable and plan.device_memory else None
    rows = [("memory", plan.memory, setup.memory.available, setup.memory.total)]
    if gpu is not None:
        rows.append((f"memory of {plan.device}", plan.device_memory, gpu.free, gpu.total))
    for name, parts, free, total in rows:
        needed = sum(parts.values())
        if needed > free:
            largest = max(parts, key=lambda part: parts[part])
            yield Problem(
                f"a search of this model needs {size(needed)} of {name} (the largest part: {largest}), but {size(free)} of "
                f"{size(total)} are free. {fewer}.",
                stops=needed > total,
            )
    disks = [("--scratch", plan.scratch, setup.scratch)]
    if setup.store is not None and setup.store.disk is not None:
        disks.append(("--store", _written(plan), setup.store.disk))
    for option, needed, disk in disks:
        if needed > disk.free:
            yield Problem(
                f"a search of this model writes {size(needed)} into {disk.folder}, where {size(disk.free) or '0 B'} are "
                f"free. Free space, or use another folder ({option}).",
                stops=True,
            )
    if plan.measuring is None and any(stage.to_do for stage in plan.stages):
        yield Problem(" ".join(plan.notes))


def _gpus_in_one_line(gpus: Gpus) -> str:
    driver = f"; driver {gpus.driver}" if gpus.driver else ""
    if not gpus.usable:
        return f"none that torch can use{driver}" if gpus.are_present else "none"
    free: dict[str, list[int]] = {}  # by kind of GPU
    for gpu in gpus.usable:
        kind = f"{gpu.name} (capability {gpu.capability[0]}.{gpu.capability[1]}, {_gib(gpu.total)})"
        free.setdefault(kind, []).append(gpu.free)
    return ", ".join(f"{len(each)} x {kind}, {_gib(min(each))} free" for kind, each in free.items()) + driver


def _problems_of_gpus(gpus: Gpus) -> Iterator[Problem]:
    if gpus.usable:
        return
    reason = f" ({gpus.reason})" if gpus.reason else ""
    if gpus.build == "CPU":
        if gpus.are_present:
            yield Problem(
                "this machine has an NVIDIA GPU, but torch is built for the CPU, so searches run on the CPU. Install "
                "torch for CUDA (pytorch.org/get-started/locally)."
            )
        return
    if gpus.are_present and gpus.visible is not None and (gpus.visible.strip() in ("", "-1") or not reason):
        yield Problem(
            f"CUDA_VISIBLE_DEVICES is {gpus.visible!r}, which hides all GPUs, so searches run on the CPU: unset it to use "
            "the GPUs."
        )
    elif gpus.driver is not None:
        yield Problem(
            f"torch for {gpus.build} cannot use the GPU with driver {gpus.driver}{reason}. Update the driver, or install "
            "torch for an older CUDA; in a container, pass the devices on (docker run --gpus all).",
            stops=True,
        )
    elif gpus.are_present:
        yield Problem(
            f"this machine has an NVIDIA GPU, but no driver that torch for {gpus.build} can use{reason}. Install NVIDIA's "
            "driver; in a container, pass the devices on (docker run --gpus all).",
            stops=True,
        )
    else:
        yield Problem(
            f"torch is built for {gpus.build}, but no GPU or driver was found{reason}. Searches run on the CPU; if this "
            "machine has a GPU, install its driver."
        )


def _server_in_one_line(server: ChosenServer, home: Disk | None) -> str:
    if server.url is not None:
        return f"{server.url}: {'cannot be used' if server.problem else 'answers'}"
    if home is None:
        return "cannot be used"
    return f"embedded server, database in {home.folder} ({home.kind})"


def _problems_of_home(home: Disk, setting: str) -> Iterator[Problem]:
    """Yield problems of the folder of the embedded server."""
    where = f"the folder of Prefect's embedded server, {home.folder},"
    if not home.is_writable:
        yield Problem(f"{where} cannot be written: set {setting} to a folder that you can write.", stops=True)
    if home.free < DATABASE_BYTES:
        yield Problem(
            f"{where} has only {size_in('MB', home.free, 1)} left: free {size_in('MB', DATABASE_BYTES)}, or set "
            f"{setting} to a folder on another disk.",
            stops=True,
        )
    if home.is_remote:
        yield Problem(
            f"{where} is on a network disk ({home.kind}), on which its SQLite database is slow and can be locked or "
            f"damaged: set {setting} to a folder on a local disk."
        )


def _lines_of_store(store: Store) -> Iterator[Line]:
    at = f" at {store.server}" if store.server else ""
    room = f": {size(store.disk.free) or '0 B'} free ({store.disk.kind})" if store.disk is not None else ""
    yield "store", f"{store.place}{at}{room}"
    if store.rates is not None:
        rates = f"writes {size(store.rates.written)}/s, reads {size(store.rates.read)}/s"
        yield "", f"{rates} (a file of {size(PROBED)}); creates files exclusively"


def _time_of(plan: "Plan", beginnings: tuple[str, ...]) -> str:
    to_do = [stage for stage in plan.stages if stage.to_do and stage.name.startswith(beginnings)]
    if not to_do:
        return "done"
    if any(stage.seconds is None for stage in to_do):
        return "not measured"
    return duration(sum(stage.seconds or 0.0 for stage in to_do))


def _written(plan: "Plan") -> int:
    return sum(stage.writes for stage in plan.stages)


def _gib(count: int) -> str:
    return size_in("GiB", count, 1)
